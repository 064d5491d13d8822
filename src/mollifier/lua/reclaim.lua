-- Put an entry whose lease ran out back to its place in the queue.
--
-- @include index
-- @include clock
-- KEYS  1 entry     hash: the entry
--       2 queue     sorted set: the environment's queued runs by sequence
--       3 envs      sorted set: the organization's environments by due moment
--       4 orgs      sorted set: the partition's organizations by due moment
--       5 draining  sorted set: the partition's leased runs by the moment their lease ends
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
-- Returns 'held' (reclaimed) | 'missing' (no such entry; its reference is dropped) | 'stale' (its lease has not run out)
local now = now_ms()
local deadline = redis.call('ZSCORE', KEYS[5], ARGV[1])
if not deadline or tonumber(deadline) > now then return 'stale' end
redis.call('ZREM', KEYS[5], ARGV[1])
local found = redis.pcall('HMGET', KEYS[1], 'state', 'seq')
if found.err or found[1] ~= 'DRAINING' then return 'missing' end

local lifetime = redis.call('PTTL', KEYS[1])
local ttl = lifetime > 0 and lifetime or 0
redis.call('HSET', KEYS[1], 'state', 'QUEUED')
redis.call('HDEL', KEYS[1], 'lease')
redis.call('HINCRBY', KEYS[1], 'reclaims', 1)
add(KEYS[2], found[2], ARGV[1], ttl)
mark_ready(KEYS[3], KEYS[4], ARGV[2], ARGV[3], now, ttl)
return 'held'
