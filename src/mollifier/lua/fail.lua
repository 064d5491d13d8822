-- Give an entry up: mark it FAILED with the error, list it as failed, free its idempotency key.
--
-- @include index
-- @include clock
-- @include lease
-- KEYS  1 entry        hash: the entry
--       2 draining     sorted set: the partition's leased runs by the moment their lease ends
--       3 failed       sorted set: the partition's failed runs by the moment they failed
--       4 idempotency  string, optional: the run that this key is bound to
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
  if KEYS[4] and redis.call('GET', KEYS[4]) == ARGV[1] then redis.call('DEL', KEYS[4]) end
end
return verdict
