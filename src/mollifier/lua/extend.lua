-- Push the end of a lease while its holder is still at work.
--
-- The lease is taken away first: a server whose memory is full lets a script go on only from there.
-- @include clock
-- @include index
-- @include lease
-- KEYS  1 entry     hash: the entry
--       2 draining  sorted set: the partition's leased runs by the moment their lease ends
-- ARGV  1 run_id
--       2 lease
--       3 lease_ms
-- Returns 'held' (extended) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict == 'held' and redis.call('ZREM', KEYS[2], ARGV[1]) == 1 then
  add(KEYS[2], string.format('%.0f', now_ms() + ARGV[3]), ARGV[1], ttl_of(KEYS[1]))
end
return verdict
