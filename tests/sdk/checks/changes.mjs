// Changing a run: its tags, its metadata, its delay, its end.

import assert from "node:assert/strict";
import { ConflictError, runs, UnprocessableEntityError } from "@trigger.dev/sdk";
import { check, client, refused, retrieve, retrieveAll, trigger } from "./check.mjs";

const HOUR_MS = 3_600_000;

check(
  "tags are added to those the run has, ten in all",
  () => trigger("tags", { tags: ["one", "two"] }),
  async (handle) => {
    const said = await client().addTags(handle.id, { tags: ["two", "three"] });
    const eight = Array.from({ length: 8 }, (_, n) => `more ${n}`);
    const tooMany = await refused(client().addTags(handle.id, { tags: eight }), UnprocessableEntityError);
    const run = await retrieve(handle);
    assert.deepEqual(run.tags, ["one", "two", "three"]);
    return [said, tooMany, run];
  },
);

check(
  "metadata is replaced, and changed by operations",
  () => trigger("metadata", { metadata: { was: "here" } }),
  async (handle) => {
    const before = await client().getRunMetadata(handle.id);
    const answer = await client().updateRunMetadata(handle.id, {
      metadata: { count: 1, list: [1], gone: true },
      operations: [
        { type: "set", key: "deep", value: { er: [] } },
        { type: "increment", key: "count", value: 2 },
        { type: "append", key: "list", value: 2 },
        { type: "remove", key: "list", value: 1 },
        { type: "delete", key: "gone" },
      ],
    });
    assert.deepEqual(answer.metadata, { count: 3, list: [2], deep: { er: [] } });
    return [before, answer, await retrieve(handle)];
  },
);

check(
  "concurrent changes of metadata lose none",
  () => trigger("counting"),
  async (handle) => {
    const increment = { operations: [{ type: "increment", key: "count", value: 1 }] };
    await Promise.all(Array.from({ length: 10 }, () => client().updateRunMetadata(handle.id, increment)));
    const run = await retrieve(handle);
    assert.deepEqual(run.metadata, { count: 10 });
    return run;
  },
);

check(
  "a delayed run is rescheduled, by a duration or to a date",
  () => trigger("delayed", { delay: "1h" }),
  async (handle) => {
    const later = await runs.reschedule(handle.id, { delay: "2h" });
    assert(later.delayedUntil - later.createdAt >= 2 * HOUR_MS);
    const at = await runs.reschedule(handle.id, { delay: new Date("2040-01-02T03:04:05.678Z") });
    assert.deepEqual(at.delayedUntil, new Date("2040-01-02T03:04:05.678Z"));
    return [later, at, await retrieve(handle)];
  },
);

check(
  "rescheduling a run that is not delayed is ConflictError, and not tried again",
  () => trigger("queued"),
  (handle) => refused(runs.reschedule(handle.id, { delay: "1h" }), ConflictError),
);

check(
  "a cancelled run stays cancelled",
  () => trigger("cancelled", { delay: "1h" }),
  async (handle) => {
    const answers = [await runs.cancel(handle.id), await runs.cancel(handle.id)];
    const run = await retrieve(handle);
    assert.deepEqual([run.status, run.isCancelled, run.isCompleted], ["CANCELED", true, true]);
    assert(run.finishedAt instanceof Date);
    const rescheduled = await refused(runs.reschedule(handle.id, { delay: "1h" }), ConflictError);
    return [answers, run, rescheduled, await client().getRunResult(handle.id)];
  },
);

check(
  "a run is replayed with its payload and its options",
  () => trigger({ at: new Date(0) }, { tags: ["again"], metadata: { a: 1 }, idempotencyKey: "again", ttl: "1h" }),
  async (handle) => {
    const again = await runs.replay(handle.id);
    const [first, second] = await retrieveAll([handle, again]);
    assert.notEqual(second.id, first.id);
    assert.deepEqual([second.payload, second.tags, second.ttl], [first.payload, first.tags, first.ttl]);
    return [first, second];
  },
);

check(
  "a run that has not ended has no result",
  () => trigger("no result"),
  async (handle) => assert.equal(await client().getRunResult(handle.id), undefined),
);
