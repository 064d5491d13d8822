-- Put an entry whose lease ran out back to its place in the queue; make a dead letter of it when that has happened too often.
--
-- An entry that whoever handles it dies of would otherwise come back for ever. Reclaims are counted apart from attempts: a crash says
-- little of the entry, so many of them do. Whoever pops one that has come back often gives it up, as a run that failed; this is for one
-- that kills those, too.
-- @include index
-- @include clock
-- @include entry
-- @include settle
-- @include usage
-- @include vanished
-- KEYS  1 entry     hash: the entry
--       2 queue     sorted set: the environment's queued runs by sequence
--       3 envs      sorted set: the organization's environments by due moment
--       4 orgs      sorted set: the partition's organizations by due moment
--       5 draining  sorted set: the partition's leased runs by the moment their lease ends
--       6 failed    sorted set: the partition's dead letters by the moment they died
--       7 held      sorted set: the environment's held runs by the moment they were triggered
--       8 owners    hash: whose each held entry is, and its bytes
--       9 usage     hash: how much is held, in all, by organization and by environment
--       10 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       11... binding  strings: the keys of the caller's that may be bound to the run, and are free once it is given up
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
--       4 max_reclaims  how often an entry may come back
-- Returns 'held' (reclaimed) | 'failed' (given up) | 'evicted' (a held one that vanished: a dead letter) | 'malformed' (it does not read
-- as an entry: a dead letter, untouched) | 'stale' (its lease has not run out) | 'missing' (the lease alone is dropped)
local now = now_ms()
local deadline = redis.call('ZSCORE', KEYS[5], ARGV[1])
if not deadline or tonumber(deadline) > now then return 'stale' end
redis.call('ZREM', KEYS[5], ARGV[1])
if redis.call('EXISTS', KEYS[1]) == 0 then
  return bury(KEYS[8], KEYS[9], KEYS[7], KEYS[10], KEYS[6], ARGV[1], ARGV[2], ARGV[3], now) and 'evicted' or 'missing'
end
local ttl = ttl_of(KEYS[1])
if not reads_as_entry(KEYS[1], ARGV[2], ARGV[3]) then
  add(KEYS[6], string.format('%.0f', now), ARGV[1], ttl)
  return 'malformed'
end
local found = redis.call('HMGET', KEYS[1], 'state', 'seq')
if found[1] ~= 'DRAINING' then return 'missing' end

redis.call('HDEL', KEYS[1], 'lease')
local reclaims = redis.call('HINCRBY', KEYS[1], 'reclaims', 1)
if reclaims > tonumber(ARGV[4]) then
  local error = 'ReclaimLimit: its lease ran out ' .. reclaims .. ' times; whoever handled it died or hung each time'
  local at = string.format('%.0f', now)
  redis.call('HSET', KEYS[1], 'state', 'FAILED', 'error', error, 'failed_ms', at)
  add(KEYS[6], at, ARGV[1], ttl)
  for i = 11, #KEYS do unbind(KEYS[i], ARGV[1]) end
  return 'failed'
end
redis.call('HSET', KEYS[1], 'state', 'QUEUED')
add(KEYS[2], found[2], ARGV[1], ttl)
mark_ready(KEYS[3], KEYS[4], ARGV[2], ARGV[3], now, ttl)
return 'held'
