-- Store one entry as QUEUED under the next sequence number. Accepting the same run twice changes nothing.
--
-- Each key of the caller's is taken for the run: it must be free, or claimed by the token that comes with this call.
-- @include index
-- @include clock
-- KEYS  1 entry   hash: the entry
--       2 queue   sorted set: the environment's queued runs by sequence
--       3 envs    sorted set: the organization's environments by due moment
--       4 orgs    sorted set: the partition's organizations by due moment
--       5 seq     string: the partition's counter
--       6 held    sorted set: the environment's held runs by the moment they were triggered
--       7... binding  strings: 'run:<run_id>' or 'claim:<token>', one per key of the caller's
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
--       4 kind        audit | held
--       5 payload     opaque bytes
--       6 ttl_ms      lifetime of the entry, 0 for ever
--       7 created_us  the moment of the trigger, microseconds since the epoch
--       8 token       what claimed the bindings
--       9 digests     the names of the bindings, as settling needs them
--       10 wake       the channel on which drainers listen for work
--       11... expires_ms  when each binding ends
-- Returns {'accepted', run_id, sequence} | {'duplicate_run', run_id, 0} | {'duplicate_key', winner's run_id or '', 0}
if redis.call('EXISTS', KEYS[1]) == 1 then return {'duplicate_run', ARGV[1], 0} end
local claim = 'claim:' .. ARGV[8]
for i = 7, #KEYS do
  local holder = redis.call('GET', KEYS[i])
  if holder and holder ~= claim then
    return {'duplicate_key', string.match(holder, '^run:(.*)') or '', 0}
  end
end

local ttl = tonumber(ARGV[6])
local accepted_ms = now_ms()
local sequence = redis.call('INCR', KEYS[5])
redis.call('HSET', KEYS[1], 'state', 'QUEUED', 'kind', ARGV[4], 'env', ARGV[2], 'org', ARGV[3],
  'seq', sequence, 'accepted_ms', string.format('%.0f', accepted_ms), 'payload', ARGV[5])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
if ARGV[9] ~= '' then redis.call('HSET', KEYS[1], 'bindings', ARGV[9]) end
for i = 7, #KEYS do
  redis.call('SET', KEYS[i], 'run:' .. ARGV[1], 'PXAT', ARGV[i + 4])
end
if ARGV[4] == 'held' then add(KEYS[6], ARGV[7], ARGV[1], ttl) end
-- Only an environment that had nothing queued needs a drainer's attention: a queue that is being drained is looked at anyway.
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('PUBLISH', ARGV[10], '') end
add(KEYS[2], sequence, ARGV[1], ttl)
mark_ready(KEYS[3], KEYS[4], ARGV[2], ARGV[3], accepted_ms, ttl)
return {'accepted', ARGV[1], sequence}
