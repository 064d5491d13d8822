// What the SDK does inside a run knows the run from what its own worker sets up; here this module stands in for that worker. The worker
// does so before it loads the SDK, which looks once: so this module has to be imported before the SDK, and imports only its core.

import { apiClientManager, runMetadata, taskContext } from "@trigger.dev/core/v3";
import { StandardMetadataManager } from "@trigger.dev/core/v3/workers";

const manager = new StandardMetadataManager();
runMetadata.setGlobalManager(manager);

/** Call `work` as if this process executed the given run; what it does with `metadata` is sent in the end. */
export async function inside(runId, work) {
  const ctx = {
    run: { id: runId, tags: [], isTest: false, isReplay: false },
    attempt: { number: 1 },
    task: { id: "echo", filePath: "" },
    queue: {},
    environment: {},
  };
  manager.reset();
  manager.apiClient = apiClientManager.clientOrThrow();
  manager.runId = runId;
  taskContext.setGlobalTaskContext({ ctx, worker: { id: "worker" } });
  try {
    const result = await work();
    await manager.flush();
    return result;
  } finally {
    taskContext.setGlobalTaskContext(undefined);
  }
}
