-- Push the end of a lease while its holder is still at work.
--
-- @include clock
-- @include lease
-- KEYS  1 entry     hash: the entry
--       2 draining  sorted set: the partition's leased runs by the moment their lease ends
-- ARGV  1 run_id
--       2 lease
--       3 lease_ms
-- Returns 'held' (extended) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict == 'held' then
  redis.call('ZADD', KEYS[2], 'XX', string.format('%.0f', now_ms() + ARGV[3]), ARGV[1])
end
return verdict
