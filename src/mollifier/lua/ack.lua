-- Settle an entry whose run exists: mark it MATERIALISED, keep it for a short grace, free its keys.
--
-- A change that arrived after the pop is not in the run yet: the entry then stays as it is, for its holder to carry the change over.
-- @include lease
-- @include settle
-- KEYS  1 entry     hash: the entry
--       2 draining  sorted set: the partition's leased runs by the moment their lease ends
--       3 held      sorted set: the environment's held runs by the moment they were triggered
--       4... binding  strings: the keys of the caller's that may be bound to the run
-- ARGV  1 run_id
--       2 lease
--       3 grace_ms  how long the entry stays readable
--       4 patches   how many changes the run has in it
-- Returns 'held' (settled) | 'changed' | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[2])
if verdict == 'held' and (redis.call('HGET', KEYS[1], 'patches') or '0') ~= ARGV[4] then return 'changed' end
if verdict ~= 'stale' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if verdict == 'held' then
  redis.call('HSET', KEYS[1], 'state', 'MATERIALISED')
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('ZREM', KEYS[3], ARGV[1])
  for i = 4, #KEYS do unbind(KEYS[i], ARGV[1]) end
end
return verdict
