-- Store one entry as QUEUED under the next sequence number. Accepting the same run twice changes nothing.
--
-- @include index
-- @include clock
-- KEYS  1 entry   hash: the entry
--       2 queue   sorted set: the environment's queued runs by sequence
--       3 envs    sorted set: the organization's environments by due moment
--       4 orgs    sorted set: the partition's organizations by due moment
--       5 seq     string: the partition's counter
--       6 idempotency  string, optional: the run that this key is bound to
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
--       4 kind      audit | held
--       5 payload   opaque bytes
--       6 ttl_ms    lifetime of the entry, 0 for ever
--       7 digest    the digest in the idempotency key's name, empty without one
-- Returns {'accepted', run_id, sequence} | {'duplicate_run', run_id, 0} | {'duplicate_key', winner's run_id, 0}
if redis.call('EXISTS', KEYS[1]) == 1 then return {'duplicate_run', ARGV[1], 0} end
if KEYS[6] then
  local winner = redis.call('GET', KEYS[6])
  if winner then return {'duplicate_key', winner, 0} end
end

local ttl = tonumber(ARGV[6])
local accepted_ms = now_ms()
local sequence = redis.call('INCR', KEYS[5])
redis.call('HSET', KEYS[1], 'state', 'QUEUED', 'kind', ARGV[4], 'env', ARGV[2], 'org', ARGV[3],
  'seq', sequence, 'accepted_ms', string.format('%.0f', accepted_ms), 'payload', ARGV[5])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
if KEYS[6] then
  redis.call('HSET', KEYS[1], 'idempotency', ARGV[7])
  redis.call('SET', KEYS[6], ARGV[1])
  if ttl > 0 then redis.call('PEXPIRE', KEYS[6], ttl) end
end
add(KEYS[2], sequence, ARGV[1], ttl)
mark_ready(KEYS[3], KEYS[4], ARGV[2], ARGV[3], accepted_ms, ttl)
return {'accepted', ARGV[1], sequence}
