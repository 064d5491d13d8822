-- Settle entries of one environment whose runs exist: mark each MATERIALISED, keep it for a short grace, free its keys.
--
-- Each is settled by itself: one whose key holds something else is refused, and harms no other.
-- A change that arrived after the pop is not in the run yet: the entry then stays as it is, for its holder to carry the change over.
-- The first thing written takes something away: a server whose memory is full lets a script go on only from there.
-- @include index
-- @include lease
-- @include settle
-- @include many
-- @include usage
-- KEYS  1 draining  sorted set: the partition's leased runs by the moment their lease ends
--       2 held      sorted set: the environment's held runs by the moment they were triggered
--       3 owners    hash: whose each held entry is, and its bytes
--       4 usage     hash: how much is held, in all, by organization and by environment
--       5 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       6... entries  for each run its entry, a hash, then the keys of the caller's that may be bound to it, strings
-- ARGV  1 grace_ms  how long the entries stay readable
--       2... runs   for each: run_id, lease, how many changes the run has in it, how many keys of the caller's follow its entry
-- Returns one text for each run: 'held' (settled) | 'changed' | 'missing' (its run exists: nothing was lost) | 'stale' (nothing changed) |
-- the server's error
local verdicts, leaving, settled, seen = {}, {}, {}, {}
local first = 6
for i = 2, #ARGV, 4 do
  local known, verdict, patches = pcall(holds, KEYS[first], ARGV[i + 1])
  if not known then
    verdict = type(verdict) == 'table' and verdict.err or tostring(verdict)
  elseif seen[ARGV[i]] then
    verdict = 'stale'
  elseif verdict == 'held' and patches ~= ARGV[i + 2] then
    verdict = 'changed'
  elseif verdict ~= 'stale' then
    seen[ARGV[i]] = true
    leaving[#leaving + 1] = ARGV[i]
    if verdict == 'held' then settled[#settled + 1] = {ARGV[i], first, tonumber(ARGV[i + 3])} end
  end
  verdicts[#verdicts + 1] = verdict
  first = first + 1 + ARGV[i + 3]
end

remove_many(KEYS[1], leaving)
remove_many(KEYS[2], leaving)
remove_many(KEYS[5], leaving)
release(KEYS[3], KEYS[4], leaving)
for _, of in ipairs(settled) do
  local run_id, entry, bindings = unpack(of)
  redis.call('HSET', KEYS[entry], 'state', 'MATERIALISED')
  redis.call('PEXPIRE', KEYS[entry], ARGV[1])
  for i = entry + 1, entry + bindings do unbind(KEYS[i], run_id) end
end
return verdicts
