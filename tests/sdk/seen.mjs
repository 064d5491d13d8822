// What was seen of the same check twice must be the same. Ids, keys of a run's own, moments and durations differ by nature: each is
// replaced by its name and the place where it appeared first, so that the same run in two places is still told apart from another.

const NAMED = [
  ["run", /\brun_[0-9a-z]{25}\b/g],
  ["batch", /\bbatch_[0-9a-z]+\b/g],
  ["environment", /\benv_[0-9a-z]+\b/g],
  ["key", /\b[0-9a-f]{64}\b/g],
  ["token", /\beyJ[\w-]+\.[\w-]+\.[\w-]+/g],
  ["moment", /\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)/g],
];

/** Return the value with everything replaced that differs by nature; `names` remembers what was met. */
export function seen(value, names = new Map()) {
  if (typeof value === "string") return NAMED.reduce((text, [kind, form]) => named(text, kind, form, names), value);
  if (value instanceof Date) return "a moment";
  if (value instanceof Error) return { error: value.constructor.name, status: value.status, says: seen(value.message, names) };
  if (Array.isArray(value)) return value.map((item) => seen(item, names));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [key, key === "durationMs" && item > 0 ? "some" : seen(item, names)]),
  );
}

function named(text, kind, form, names) {
  return text.replace(form, (found) => {
    if (kind === "moment" || kind === "token") return `a ${kind}`;
    if (!names.has(found)) names.set(found, `${kind} ${names.size + 1}`);
    return names.get(found);
  });
}
