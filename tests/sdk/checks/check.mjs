// Checks of what the SDK sees. One arranges runs, then acts on them and returns all that it saw. It is made twice, its runs being held
// in the buffer when it acts, and created by then, and has to see the same both times.

import assert from "node:assert/strict";
import { runs, tasks } from "@trigger.dev/sdk";
import { apiClientManager } from "@trigger.dev/core/v3";

export const checks = [];

/** Add a check; what `arrange` returns is what `act` is called with. */
export function check(name, arrange, act) {
  checks.push({ name, arrange, act });
}

/** Add a check that has nothing to arrange. */
export function checkAtOnce(name, act) {
  check(name, async () => {}, act);
}

/** The client below the SDK's functions, for what these offer only inside a run. */
export const client = () => apiClientManager.clientOrThrow();

export const trigger = (payload, options, requestOptions) => tasks.trigger("echo", payload, options, requestOptions);
export const retrieve = ({ id }) => runs.retrieve(id);
export const retrieveAll = (handles) => Promise.all(handles.map(retrieve));
export const idsOf = (found) => found.map(({ id }) => id);

/** Return the error of this class that the call ends in. */
export async function refused(call, kind) {
  const outcome = await call.then((value) => ({ value }), (error) => ({ error }));
  assert(outcome.error instanceof kind, outcome.error ?? `expected ${kind.name}, got ${JSON.stringify(outcome.value)}`);
  return outcome.error;
}
