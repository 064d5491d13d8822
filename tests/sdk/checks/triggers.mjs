// Triggering a run, and reading it.

import assert from "node:assert/strict";
import { runs, tasks } from "@trigger.dev/sdk";
import { check, checkAtOnce, client, retrieve, retrieveAll, trigger } from "./check.mjs";

const HOUR_MS = 3_600_000;

check(
  "a payload reads as what was sent, in the form that JSON has for it",
  () =>
    trigger({
      text: "héllo \u{1f600} \u0000",
      date: new Date("2024-02-29T12:00:00Z"),
      big: 9007199254740993n,
      nothing: null,
      none: undefined,
      set: new Set([1, 2]),
      map: new Map([["a", 1]]),
      empty: [],
      deep: { list: [{ n: 1.5e300 }] },
    }),
  async (handle) => {
    const run = await retrieve(handle);
    assert.equal(run.status, "QUEUED");
    assert.deepEqual(run.payload, {
      text: "héllo \u{1f600} \u0000",
      date: "2024-02-29T12:00:00.000Z",
      big: "9007199254740993",
      nothing: null,
      none: null,
      set: [1, 2],
      map: [["a", 1]],
      empty: [],
      deep: { list: [{ n: 1.5e300 }] },
    });
    return run;
  },
);

const PAYLOADS = ["text", '{"text": "that looks like JSON"}', 0, 1.5, true, null, [], [1, [2]], {}, undefined];

check(
  "a payload may be text, a number, a list, null or nothing at all",
  () => Promise.all(PAYLOADS.map((payload) => trigger(payload))),
  async (handles) => {
    const found = await retrieveAll(handles);
    assert.deepEqual(found.map((run) => run.payload), PAYLOADS);
    return found;
  },
);

check(
  "a payload of a hundred thousand characters comes back whole",
  () => trigger({ text: "é".repeat(60_000) }),
  async (handle) => {
    const { payload, ...run } = await retrieve(handle);
    assert.equal(payload.text, "é".repeat(60_000));
    return run;
  },
);

check(
  "a run has the options it was triggered with",
  () =>
    trigger("options", {
      tags: ["one", "two"],
      metadata: { progress: 0.5, list: [1], deep: { er: null } },
      ttl: "1h",
      queue: "emails",
      concurrencyKey: "user 1",
      maxAttempts: 2,
      maxDuration: 60,
      priority: 10,
      machine: "small-1x",
      region: "eu-central-1",
      version: "20240101.1",
    }),
  async (handle) => {
    const run = await retrieve(handle);
    assert.deepEqual(run.tags, ["one", "two"]);
    assert.deepEqual(run.metadata, { progress: 0.5, list: [1], deep: { er: null } });
    assert.equal(run.ttl, "1h");
    return run;
  },
);

check(
  "a tag may be given alone, a ttl in seconds",
  () => trigger("short forms", { tags: "alone", ttl: 3690 }),
  async (handle) => {
    const run = await retrieve(handle);
    assert.deepEqual([run.tags, run.ttl], [["alone"], "1h1m30s"]);
    return run;
  },
);

check(
  "a delay is a duration or a date",
  () => Promise.all([trigger("after", { delay: "1h" }), trigger("at", { delay: new Date("2040-01-02T03:04:05.678Z") })]),
  async (handles) => {
    const [after, at] = await retrieveAll(handles);
    assert.deepEqual([after.status, at.status], ["DELAYED", "DELAYED"]);
    assert.equal(after.delayedUntil - after.createdAt, HOUR_MS);
    assert.deepEqual(at.delayedUntil, new Date("2040-01-02T03:04:05.678Z"));
    return [after, at];
  },
);

check(
  "a run whose ttl is over has expired",
  async () => {
    const handle = await trigger("too late", { ttl: 1 });
    await runs.poll(handle, { pollIntervalMs: 100 });
    return handle;
  },
  async (handle) => {
    const run = await retrieve(handle);
    assert.deepEqual([run.status, run.isCompleted, run.isFailed], ["EXPIRED", true, true]);
    assert(run.expiredAt instanceof Date);
    return [run, await client().getRunResult(handle.id)];
  },
);

check(
  "debounced triggers share one delayed run, and pass the gate",
  async () => {
    const debounce = (payload, mode) => trigger(payload, { debounce: { key: mode, delay: "1h", mode } });
    const handles = [];
    for (const mode of ["leading", "trailing"]) {
      handles.push(await debounce(`first ${mode}`, mode));
      assert.equal((await debounce(`last ${mode}`, mode)).id, handles.at(-1).id);
    }
    return handles;
  },
  async (handles) => {
    const found = await retrieveAll(handles);
    assert.deepEqual(found.map((run) => run.payload), ["first leading", "last trailing"]);
    return found;
  },
);

checkAtOnce("a task's id may hold any text", async () => {
  const run = await retrieve(await tasks.trigger("a/b c", "slash"));
  assert.equal(run.taskIdentifier, "a/b c");
  return run;
});

checkAtOnce("the answer to a trigger brings a token for its run", async () => {
  const handle = await trigger("token");
  const claims = JSON.parse(Buffer.from(handle.publicAccessToken.split(".")[1], "base64url"));
  assert.deepEqual(claims.scopes, [`read:runs:${handle.id}`]);
  return handle;
});

checkAtOnce("a trigger whose answer was lost is answered with the same run when it is sent again", async () => {
  const { fetch } = globalThis;
  const answered = [];
  globalThis.fetch = async (...request) => {
    const response = await fetch(...request);
    answered.push((await response.clone().json()).id);
    if (answered.length === 1) throw new TypeError("the connection was reset");
    return response;
  };
  try {
    const handle = await trigger("lost", {}, { retry: { minTimeoutInMs: 10 } });
    assert.deepEqual(answered, [handle.id, handle.id]);
    return handle;
  } finally {
    globalThis.fetch = fetch;
  }
});
