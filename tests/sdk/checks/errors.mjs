// What is refused, by the class of error that the SDK has for it.

import assert from "node:assert/strict";
import { auth, AuthenticationError, NotFoundError, runs, tasks, UnprocessableEntityError } from "@trigger.dev/sdk";
import { checkAtOnce, client, refused, trigger } from "./check.mjs";

checkAtOnce("a run that does not exist is NotFoundError for whatever is done with it", () => {
  const id = "run_0000000000000000000000000";
  const calls = [
    runs.retrieve(id),
    runs.cancel(id),
    runs.replay(id),
    runs.reschedule(id, { delay: "1h" }),
    client().addTags(id, { tags: "a" }),
    client().updateRunMetadata(id, { metadata: {} }),
  ];
  return Promise.all(calls.map((call) => refused(call, NotFoundError)));
});

checkAtOnce("a task that does not exist is NotFoundError, and named", async () => {
  const error = await refused(tasks.trigger("nobody's task", {}), NotFoundError);
  assert.match(error.message, /nobody's task/);
  return error;
});

checkAtOnce("a key that nobody has is AuthenticationError", () =>
  auth.withAuth({ accessToken: "nobody's key" }, () => refused(trigger("refused"), AuthenticationError)),
);

checkAtOnce("options that cannot be are UnprocessableEntityError, and named", async () => {
  const cases = {
    tags: { tags: ["x".repeat(129)] },
    delay: { delay: "soon" },
    ttl: { ttl: "never" },
    maxAttempts: { maxAttempts: 0 },
    debounce: { debounce: { key: "k", delay: "sometimes" } },
  };
  const errors = [];
  for (const [name, options] of Object.entries(cases)) {
    const error = await refused(trigger("refused", options), UnprocessableEntityError);
    assert.match(error.message, new RegExp(`options\\.${name}`));
    errors.push(error);
  }
  return errors;
});
