// Every check, in the order in which they are made. What stands in for a worker comes before the SDK is loaded.

import "../worker.mjs";
import "./triggers.mjs";
import "./keys.mjs";
import "./changes.mjs";
import "./lists.mjs";
import "./inside.mjs";
import "./errors.mjs";
import "./batches.mjs";

export { checks } from "./check.mjs";
