-- Settle an entry whose run exists: mark it MATERIALISED, keep it for a short grace, free its idempotency key.
--
-- @include lease
-- KEYS  1 entry        hash: the entry
--       2 draining     sorted set: the partition's leased runs by the moment their lease ends
--       3 idempotency  string, optional: the run that this key is bound to
-- ARGV  1 run_id
--       2 lease
--       3 grace_ms  how long the entry stays readable
-- Returns 'held' (settled) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict ~= 'stale' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if verdict == 'held' then
  redis.call('HSET', KEYS[1], 'state', 'MATERIALISED')
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  if KEYS[3] and redis.call('GET', KEYS[3]) == ARGV[1] then redis.call('DEL', KEYS[3]) end
end
return verdict
