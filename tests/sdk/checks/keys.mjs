// Idempotency keys: their scopes, their lifetime, freeing them.

import assert from "node:assert/strict";
import { idempotencyKeys, NotFoundError, tasks } from "@trigger.dev/sdk";
import { check, checkAtOnce, idsOf, refused, retrieve, retrieveAll, trigger } from "./check.mjs";

for (const scope of ["global", "run", "attempt"]) {
  check(
    `an idempotency key of scope ${scope} answers with its run, until it is reset`,
    async () => {
      const key = await idempotencyKeys.create(["user", `scope ${scope}`], { scope });
      return { key, first: await trigger("taken", { idempotencyKey: key, idempotencyKeyTTL: "10m" }) };
    },
    async ({ key, first }) => {
      const again = await trigger("not taken", { idempotencyKey: key });
      assert.deepEqual([again.id, again.isCached, first.isCached], [first.id, true, false]);
      const reset = await idempotencyKeys.reset("echo", key);
      const fresh = await trigger("taken again", { idempotencyKey: key });
      assert.notEqual(fresh.id, first.id);
      assert.equal(fresh.isCached, false);
      return [again, reset, fresh, await retrieveAll([first, fresh])];
    },
  );
}

check(
  "an idempotency key may be plain text, and belongs to one task",
  () => trigger("taken", { idempotencyKey: "plain" }),
  async (first) => {
    const again = await trigger("not taken", { idempotencyKey: "plain" });
    const other = await tasks.trigger("a/b c", "taken", { idempotencyKey: "plain" });
    assert.deepEqual([again.id === first.id, other.id === first.id], [true, false]);
    return [again, other, await retrieve(first)];
  },
);

checkAtOnce("a key is free again when its lifetime is over", async () => {
  const short = (payload) => trigger(payload, { idempotencyKey: "short", idempotencyKeyTTL: "1s" });
  const first = await short("first");
  let last;
  do last = await short("last");
  while (last.isCached);
  assert.notEqual(last.id, first.id);
  return [first, last, await retrieveAll([first, last])];
});

checkAtOnce("many triggers with one key at once make one run", async () => {
  const key = await idempotencyKeys.create("race", { scope: "global" });
  const handles = await Promise.all(Array.from({ length: 8 }, (_, n) => trigger(n, { idempotencyKey: key })));
  assert.equal(new Set(idsOf(handles)).size, 1);
  assert.equal(handles.filter(({ isCached }) => !isCached).length, 1);
});

checkAtOnce("resetting a key that nobody holds is NotFoundError", async () => {
  const key = await idempotencyKeys.create("nobody's", { scope: "global" });
  return refused(idempotencyKeys.reset("echo", key), NotFoundError);
});
