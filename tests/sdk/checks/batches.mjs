// Batches: many runs of one or several tasks, triggered at once.

import assert from "node:assert/strict";
import { batch, idempotencyKeys, NotFoundError, runs, tasks } from "@trigger.dev/sdk";
import { check, checkAtOnce, idsOf, refused, retrieveAll } from "./check.mjs";

const runsOf = async ({ batchId }) => retrieveAll((await batch.retrieve(batchId)).runs.map((id) => ({ id })));

check(
  "a batch of one task makes a run of each item, with the item's own payload and options",
  () =>
    tasks.batchTrigger("echo", [
      { payload: { at: new Date(0), big: 1n } },
      { payload: "text", options: { tags: ["batched"], metadata: { n: 1 }, ttl: "1h" } },
      { payload: undefined, options: { delay: "1h", maxAttempts: 2, queue: "emails", concurrencyKey: "user 1" } },
    ]),
  async (handle) => {
    assert.equal(handle.runCount, 3);
    const found = await batch.retrieve(handle.batchId);
    assert.deepEqual([found.id, found.runCount, found.runs.length], [handle.batchId, 3, 3]);
    const made = await runsOf(handle);
    assert.deepEqual(made.map((run) => run.payload), [{ at: "1970-01-01T00:00:00.000Z", big: "1" }, "text", undefined]);
    assert.deepEqual(made.map((run) => run.status), ["QUEUED", "QUEUED", "DELAYED"]);
    assert(made.every((run) => run.batchId === handle.batchId && run.triggerFunction === "batchTrigger"));
    const { data } = await runs.list({ batch: handle.batchId });
    assert.deepEqual(new Set(idsOf(data)), new Set(idsOf(made)));
    return [handle, found, made, data];
  },
);

check(
  "a batch may mix tasks, and come as a stream",
  async () => {
    async function* items() {
      for (let n = 0; n < 3; n++) yield { id: n % 2 ? "a/b c" : "echo", payload: n };
    }
    return [await batch.trigger([{ id: "echo", payload: 1 }, { id: "a/b c", payload: 2 }]), await batch.trigger(items())];
  },
  async (handles) => {
    const made = [...(await runsOf(handles[0])), ...(await runsOf(handles[1]))];
    assert.deepEqual(made.map((run) => run.taskIdentifier), ["echo", "a/b c", "echo", "a/b c", "echo"]);
    return [handles, made];
  },
);

check(
  "a batch with an idempotency key is made once",
  async () => {
    const key = await idempotencyKeys.create("batch", { scope: "global" });
    return { key, first: await tasks.batchTrigger("echo", [{ payload: 1 }, { payload: 2 }], { idempotencyKey: key }) };
  },
  async ({ key, first }) => {
    const again = await tasks.batchTrigger("echo", [{ payload: 1 }, { payload: 2 }], { idempotencyKey: key });
    assert.equal(again.batchId, first.batchId);
    return [again, await runsOf(first)];
  },
);

check(
  "an item with an idempotency key that is taken stands for the run that has it",
  () => tasks.batchTrigger("echo", [1, 2].map((n) => ({ payload: n, options: { idempotencyKey: `item ${n}` } }))),
  async (first) => {
    const items = [2, 3].map((n) => ({ payload: n, options: { idempotencyKey: `item ${n}` } }));
    const [before, after] = [await runsOf(first), await runsOf(await tasks.batchTrigger("echo", items))];
    assert.equal(after[0].id, before[1].id);
    return [before, after];
  },
);

checkAtOnce("a batch is whole and in order, however many items it has", async () => {
  const numbers = Array.from({ length: 40 }, (_, n) => n);
  const made = await runsOf(await tasks.batchTrigger("echo", numbers.map((payload) => ({ payload }))));
  assert.deepEqual(made.map((run) => run.payload), numbers);
});

checkAtOnce("a batch that does not exist is NotFoundError, and named", async () => {
  const error = await refused(batch.retrieve("batch_0"), NotFoundError);
  assert.match(error.message, /batch_0/);
  return error;
});
