-- Give an entry up: mark it FAILED with the error, list it as a dead letter, free those keys that a failure frees.
--
-- A held one that vanished meanwhile is a dead letter too, of which the payload is gone.
-- @include index
-- @include clock
-- @include lease
-- @include settle
-- @include usage
-- @include vanished
-- KEYS  1 entry     hash: the entry
--       2 draining  sorted set: the partition's leased runs by the moment their lease ends
--       3 failed    sorted set: the partition's dead letters by the moment they died
--       4 held      sorted set: the environment's held runs by the moment they were triggered
--       5 owners    hash: whose each held entry is, and its bytes
--       6 usage     hash: how much is held, in all, by organization and by environment
--       7 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       8... binding  strings: the keys of the caller's that may be bound to the run, and are free now
-- ARGV  1 run_id
--       2 lease
--       3 error
--       4 env_id
--       5 org_id
-- Returns 'held' (failed) | 'evicted' (a held one that vanished) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict ~= 'stale' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if verdict == 'held' then
  local now = string.format('%.0f', now_ms())
  redis.call('HSET', KEYS[1], 'state', 'FAILED', 'error', ARGV[3], 'failed_ms', now)
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HDEL', KEYS[1], 'lease')
  add(KEYS[3], now, ARGV[1], ttl_of(KEYS[1]))
  for i = 8, #KEYS do unbind(KEYS[i], ARGV[1]) end
elseif verdict == 'missing' and bury(KEYS[5], KEYS[6], KEYS[4], KEYS[7], KEYS[3], ARGV[1], ARGV[4], ARGV[5], now_ms()) then
  return 'evicted'
end
return verdict
