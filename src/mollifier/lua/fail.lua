-- Give an entry up: mark it FAILED with the error, list it as failed, free its keys.
--
-- @include index
-- @include clock
-- @include lease
-- @include settle
-- KEYS  1 entry     hash: the entry
--       2 draining  sorted set: the partition's leased runs by the moment their lease ends
--       3 failed    sorted set: the partition's failed runs by the moment they failed
--       4 held      sorted set: the environment's held runs by the moment they were triggered
--       5... binding  strings: the keys of the caller's that may be bound to the run
-- ARGV  1 run_id
--       2 lease
--       3 error
-- Returns 'held' (failed) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict ~= 'stale' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if verdict == 'held' then
  redis.call('HSET', KEYS[1], 'state', 'FAILED', 'error', ARGV[3])
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HDEL', KEYS[1], 'lease')
  add(KEYS[3], string.format('%.0f', now_ms()), ARGV[1], ttl_of(KEYS[1]))
  redis.call('ZREM', KEYS[4], ARGV[1])
  for i = 5, #KEYS do unbind(KEYS[i], ARGV[1]) end
end
return verdict
