// Lists of runs.

import assert from "node:assert/strict";
import { runs, tasks } from "@trigger.dev/sdk";
import { check, idsOf, trigger } from "./check.mjs";

const HOUR_MS = 3_600_000;

check(
  "a list shows every run once, page by page, the newest first",
  async () => {
    const handles = [];
    for (let n = 0; n < 5; n++) handles.push(await trigger(n, { tags: "paged" }));
    return handles;
  },
  async (handles) => {
    const newestFirst = idsOf(handles).reverse();
    const found = [];
    for await (const run of runs.list({ tag: "paged", limit: 2 })) found.push(run);
    assert.deepEqual(idsOf(found), newestFirst);
    const first = await runs.list({ tag: "paged", limit: 2 });
    const second = await first.getNextPage();
    const back = await second.getPreviousPage();
    assert.deepEqual(idsOf([...second.data, ...back.data]), [2, 3, 0, 1].map((n) => newestFirst[n]));
    assert.deepEqual([first.hasPreviousPage(), second.hasPreviousPage(), second.hasNextPage()], [false, true, true]);
    return found;
  },
);

check(
  "a list is filtered by status, task, tag and time",
  async () => ({
    queued: await trigger(1, { tags: "filtered" }),
    delayed: await trigger(2, { tags: ["filtered", "filtered too"], delay: "1h" }),
    cancelled: await trigger(3, { tags: "filtered" }),
    other: await tasks.trigger("a/b c", 4, { tags: "filtered" }),
  }),
  async ({ queued, delayed, cancelled, other }) => {
    await runs.cancel(cancelled.id);
    const cases = [
      [{ status: "QUEUED" }, [other, queued]],
      [{ status: ["DELAYED", "CANCELED"] }, [cancelled, delayed]],
      [{ taskIdentifier: "a/b c" }, [other]],
      [{ taskIdentifier: ["echo", "a/b c"] }, [other, cancelled, delayed, queued]],
      [{ tag: ["filtered too"] }, [delayed]],
      [{ isTest: true }, []],
      [{ isTest: false }, [other, cancelled, delayed, queued]],
      [{ period: "1h" }, [other, cancelled, delayed, queued]],
      [{ to: new Date(Date.now() - HOUR_MS) }, []],
      [{ from: new Date(Date.now() - HOUR_MS), to: Date.now() + HOUR_MS }, [other, cancelled, delayed, queued]],
    ];
    for (const [filter, expected] of cases) {
      const { data } = await runs.list({ tag: "filtered", ...filter });
      assert.deepEqual(idsOf(data), idsOf(expected), JSON.stringify(filter));
    }
    return (await runs.list({ tag: "filtered" })).data;
  },
);
