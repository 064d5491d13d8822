// The official SDK against a running Mollifier in divert mode. The environment says where it is, the API keys of two environments whose
// every trigger but the first is held, and where the stage hand is: on request it tells which runs are held, has the drainer create them
// while nothing executes any, and has a worker execute them.

import assert from "node:assert/strict";
import { before, describe, it } from "node:test";
import { checks } from "./checks/index.mjs";
import { client, retrieve, retrieveAll, trigger } from "./checks/check.mjs";
import { seen } from "./seen.mjs";
import { configure, runs, tasks } from "@trigger.dev/sdk";

const { MOLLIFIER_URL, MOLLIFIER_STAGE_URL, MOLLIFIER_KEY_HELD, MOLLIFIER_KEY_CREATED } = process.env;
const FIRST = "the first of a burst";

async function stage(request) {
  const response = await fetch(`${MOLLIFIER_STAGE_URL}/${request}`, { method: "POST" });
  assert.equal(response.status, 200, await response.clone().text());
  return response.json();
}

function use(accessToken) {
  configure({ baseURL: MOLLIFIER_URL, accessToken });
}

async function everyRun() {
  const found = [];
  for await (const run of runs.list({ limit: 100 })) found.push(run);
  return found;
}

const sawHeld = new Map();
let held;

describe("while runs are held", () => {
  before(async () => {
    use(MOLLIFIER_KEY_HELD);
    await trigger(FIRST);
  });

  for (const { name, arrange, act } of checks) {
    it(name, async () => {
      sawHeld.set(name, seen(await act(await arrange())));
    });
  }

  it("every one of them is in the buffer, but for the first and the debounced", async () => {
    held = await retrieveAll(await everyRun());
    const inBuffer = new Set(await stage("held"));
    const passed = held.filter((run) => !inBuffer.has(run.id)).map((run) => run.payload);
    assert.deepEqual(passed.sort(), ["first leading", "last trailing", FIRST].sort());
  });
});

describe("once the drainer has created them", () => {
  const arranged = new Map();

  before(async () => {
    use(MOLLIFIER_KEY_CREATED);
    await trigger(FIRST);
    for (const { name, arrange } of checks) arranged.set(name, await Promise.allSettled([arrange()]));
    assert.deepEqual(await stage("create"), { failed: 0, left: 0 });
  });

  for (const { name, act } of checks) {
    it(name, async () => {
      const [{ value, reason }] = arranged.get(name);
      if (reason) throw reason;
      assert.deepEqual(seen(await act(value)), sawHeld.get(name));
    });
  }

  it("those that were held before read as they did then", async () => {
    use(MOLLIFIER_KEY_HELD);
    const created = await retrieveAll(await everyRun());
    assert.deepEqual(seen(created), seen(held));
  });
});

describe("while a worker executes them", () => {
  let queued;

  before(async () => {
    queued = (await everyRun()).filter((run) => run.status === "QUEUED");
    await stage("execute");
  });

  it("every run that was queued ends with its output", async () => {
    const ended = [];
    for (const { id } of queued) ended.push(await runs.poll(id, { pollIntervalMs: 50 }));
    assert.notEqual(ended.length, 0);
    assert.deepEqual(ended.filter((run) => !run.isSuccess), []);
    assert.deepEqual(ended.map((run) => run.output ?? null), ended.map((run) => run.payload ?? null));
  });

  it("a result is the task's answer", async () => {
    const { id } = await trigger({ n: [1, { a: null }] });
    await runs.poll(id, { pollIntervalMs: 50 });
    const { output, ...result } = await client().getRunResult(id);
    assert.deepEqual(result, { ok: true, id, taskIdentifier: "echo", outputType: "application/json" });
    assert.deepEqual(JSON.parse(output), { n: [1, { a: null }] });
  });

  it("a task that fails says why, and frees its key", async () => {
    const fail = () => tasks.trigger("fail", "because", { maxAttempts: 1, idempotencyKey: "failing" });
    const handle = await fail();
    const run = await runs.poll(handle, { pollIntervalMs: 50 });
    assert.deepEqual([run.status, run.error.message, run.error.name], ["FAILED", "because", "ValueError"]);
    const result = await client().getRunResult(handle.id);
    assert.deepEqual([result.ok, result.error.type, result.error.message], [false, "BUILT_IN_ERROR", "because"]);
    assert.notEqual((await fail()).id, handle.id);
  });

  it("a run that has ended is not cancelled any more", async () => {
    const run = await runs.poll(await trigger("ended"), { pollIntervalMs: 50 });
    await runs.cancel(run.id);
    assert.equal((await retrieve(run)).status, "COMPLETED");
  });
});
