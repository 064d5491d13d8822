// What the SDK does inside a run, for that run.

import assert from "node:assert/strict";
import { metadata, tags } from "@trigger.dev/sdk";
import { check, retrieve, retrieveAll, trigger } from "./check.mjs";
import { inside } from "../worker.mjs";

check(
  "a run's children name it, and keys of scope run are its own",
  async () => {
    const parent = await trigger("parent");
    const withKey = (payload) => trigger(payload, { idempotencyKey: "step 1" });
    const child = await inside(parent.id, () => withKey("child"));
    const again = await inside(parent.id, () => withKey("again"));
    const stranger = await inside((await trigger("another parent")).id, () => withKey("stranger"));
    return { parent, child, again, stranger };
  },
  async ({ parent, child, again, stranger }) => {
    assert.equal(again.id, child.id);
    assert.notEqual(stranger.id, child.id);
    const run = await retrieve(child);
    assert.deepEqual([run.relatedRuns.parent.id, run.relatedRuns.root.id, run.depth], [parent.id, parent.id, 1]);
    return run;
  },
);

check(
  "a run adds tags and metadata to itself, and metadata to its parent and its root",
  async () => {
    const root = await trigger("root");
    const parent = await inside(root.id, () => trigger("parent"));
    return { root, parent, child: await inside(parent.id, () => trigger("child")) };
  },
  async ({ root, parent, child }) => {
    await inside(child.id, async () => {
      await tags.add("from inside");
      metadata.set("step", 1).append("log", "started").increment("count", 5).decrement("count", 2);
      metadata.parent.set("child", "started");
      metadata.root.increment("descendants", 1);
    });
    const found = await retrieveAll([root, parent, child]);
    assert.deepEqual(found[2].tags, ["from inside"]);
    assert.deepEqual(
      found.map((run) => run.metadata),
      [{ descendants: 1 }, { child: "started" }, { step: 1, log: ["started"], count: 3 }],
    );
    return found[2];
  },
);
