-- Put a leased entry back: to its place in the queue, or to wait outside it until its not-before moment.
--
-- A held one that vanished meanwhile becomes a dead letter: nothing is left to put back.
-- @include index
-- @include clock
-- @include lease
-- @include usage
-- @include vanished
-- KEYS  1 entry     hash: the entry
--       2 queue     sorted set: the environment's queued runs by sequence
--       3 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       4 envs      sorted set: the organization's environments by due moment
--       5 orgs      sorted set: the partition's organizations by due moment
--       6 draining  sorted set: the partition's leased runs by the moment their lease ends
--       7 failed    sorted set: the partition's dead letters by the moment they died
--       8 held      sorted set: the environment's held runs by the moment they were triggered
--       9 owners    hash: whose each held entry is, and its bytes
--       10 usage    hash: how much is held, in all, by organization and by environment
--       11 children  sorted set: the environment's held runs that another triggered, by a digest of that one
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
--       4 lease
--       5 not_before_ms  0 for at once
--       6 attempts       how many this handling counts for: 1, or 0 when the entry is not to blame
-- Returns 'held' (requeued) | 'evicted' (a held one that vanished: a dead letter) | 'missing' | 'stale' (nothing changed)
local verdict = holds(KEYS[1], ARGV[4])
if verdict ~= 'stale' then redis.call('ZREM', KEYS[6], ARGV[1]) end
if verdict == 'missing' and bury(KEYS[9], KEYS[10], KEYS[8], KEYS[11], KEYS[7], ARGV[1], ARGV[2], ARGV[3], now_ms()) then return 'evicted' end
if verdict ~= 'held' then return verdict end

local ttl = ttl_of(KEYS[1])
local sequence = redis.call('HGET', KEYS[1], 'seq')
redis.call('HSET', KEYS[1], 'state', 'QUEUED')
redis.call('HDEL', KEYS[1], 'lease')
if ARGV[6] ~= '0' then redis.call('HINCRBY', KEYS[1], 'attempts', ARGV[6]) end
if ARGV[5] == '0' then
  add(KEYS[2], sequence, ARGV[1], ttl)
  mark_ready(KEYS[4], KEYS[5], ARGV[2], ARGV[3], now_ms(), ttl)
else
  redis.call('HSET', KEYS[1], 'not_before_ms', ARGV[5])
  add(KEYS[3], ARGV[5], sequence .. ':' .. ARGV[1], ttl)
  mark_ready(KEYS[4], KEYS[5], ARGV[2], ARGV[3], ARGV[5], ttl)
end
return verdict
