-- Store one entry as QUEUED under the next sequence number. Accepting the same run twice changes nothing.
--
-- Except that a held entry takes the place of an audit copy of its run, whatever state that is in and whoever has it: the copy's run is
-- created by whoever made the copy, or was to be, while a held entry is all there is.
-- A held entry that would exceed one of the caps is refused, and the reply names the cap. Audit copies are in no sum and under no cap.
-- Each key of the caller's is taken for the run: it must be claimed by the token that comes with this call, or, where none
-- comes, free: a claim that has run out may have been another's meanwhile.
-- @include index
-- @include clock
-- @include usage
-- KEYS  1 entry   hash: the entry
--       2 queue   sorted set: the environment's queued runs by sequence
--       3 envs    sorted set: the organization's environments by due moment
--       4 orgs    sorted set: the partition's organizations by due moment
--       5 seq     string: the partition's counter
--       6 held    sorted set: the environment's held runs by the moment they were triggered
--       7 failed  sorted set: the partition's dead letters by the moment they died
--       8 owners  hash: whose each held entry is, and its bytes
--       9 usage   hash: how much is held, in all, by organization and by environment
--       10 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       11 draining  sorted set: the partition's leased runs by the moment their lease ends
--       12 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       13... binding  strings: 'run:<run_id>', 'claim:<token>' or 'doubt', one per key of the caller's
-- ARGV  1 run_id
--       2 env_id
--       3 org_id
--       4 kind        audit | held
--       5 payload     opaque bytes
--       6 ttl_ms      lifetime of the entry, 0 for ever
--       7 created_us  the moment of the trigger, microseconds since the epoch
--       8 token       what claimed the bindings, or ''
--       9 digests     the names of the bindings, as settling needs them
--       10 wake       the channel on which drainers listen for work
--       11 parent     a digest of the run that triggered this one, or ''
--       12 taken      1 if somebody has set out to create the run already, 0 if not
--       13 env_max_entries  the most that may be held of the environment, with this entry
--       14 env_max_bytes
--       15 org_max_entries  of the organization
--       16 org_max_bytes
--       17 max_entries      in this partition, by what the others leave
--       18 max_bytes
--       19... expires_ms  when each binding ends
-- Returns {'accepted', run_id, sequence} | {'duplicate_run', run_id, 0} | {'duplicate_key', winner's run_id or '', which of the keys} | {'over_cap', cap, 0}
local CAPS = {'held_env_max_entries', 'held_env_max_bytes', 'held_org_max_entries', 'held_org_max_bytes',
  'held_max_entries', 'held_max_bytes'}

local held = ARGV[4] == 'held'
local is_copied = held and redis.call('HGET', KEYS[1], 'kind') == 'audit'
if not is_copied and redis.call('EXISTS', KEYS[1]) == 1 then return {'duplicate_run', ARGV[1], 0} end
local claim = 'claim:' .. ARGV[8]
for i = 13, #KEYS do
  local holder = redis.call('GET', KEYS[i])
  if holder and holder ~= claim or not holder and ARGV[8] ~= '' then
    return {'duplicate_key', holder and string.match(holder, '^run:(.*)') or '', i - 13}
  end
end

local known, names, sums
if held then
  known = redis.call('HGET', KEYS[8], ARGV[1])
  names, sums = read_sums(KEYS[9], ARGV[2], ARGV[3])
  -- An entry of this run that vanished, and was not missed yet, is in the sums; this one takes its place.
  local vanished = known and read_record(KEYS[8], ARGV[1])
  local most = {ARGV[13], ARGV[14], ARGV[15], ARGV[16], ARGV[17], ARGV[18]}
  for i, cap in ipairs(CAPS) do
    local more = i % 2 == 1 and (vanished and 0 or 1) or #ARGV[5] - (vanished or 0)
    if sums[i] + more > tonumber(most[i]) then return {'over_cap', cap, 0} end
  end
end

local ttl = tonumber(ARGV[6])
local accepted_ms = now_ms()
local sequence = redis.call('INCR', KEYS[5])
if is_copied then
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('ZREM', KEYS[10], (redis.call('HGET', KEYS[1], 'seq') or '') .. ':' .. ARGV[1])
  redis.call('ZREM', KEYS[11], ARGV[1])
  redis.call('ZREM', KEYS[7], ARGV[1])
  redis.call('DEL', KEYS[1])
end
redis.call('HSET', KEYS[1], 'state', 'QUEUED', 'kind', ARGV[4], 'env', ARGV[2], 'org', ARGV[3],
  'seq', sequence, 'accepted_ms', string.format('%.0f', accepted_ms), 'payload', ARGV[5])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
if ARGV[9] ~= '' then redis.call('HSET', KEYS[1], 'bindings', ARGV[9]) end
if ARGV[12] == '1' then redis.call('HSET', KEYS[1], 'taken', '1') end
for i = 13, #KEYS do
  redis.call('SET', KEYS[i], 'run:' .. ARGV[1], 'PXAT', ARGV[i + 6])
end
if held then
  -- An entry of this run that vanished is a dead letter no more.
  if known then
    release(KEYS[8], KEYS[9], {ARGV[1]})
    redis.call('ZREM', KEYS[7], ARGV[1])
    names, sums = read_sums(KEYS[9], ARGV[2], ARGV[3])
  end
  write_record(KEYS[8], ARGV[1], #ARGV[5], ARGV[2], ARGV[3])
  add_to_sums(KEYS[9], names, sums, 1, #ARGV[5])
  add(KEYS[6], ARGV[7], ARGV[1], ttl)
  if ARGV[11] ~= '' then add(KEYS[12], ARGV[11], ARGV[1], ttl) end
end
-- Only an environment that had nothing queued needs a drainer's attention: a queue that is being drained is looked at anyway.
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('PUBLISH', ARGV[10], '') end
add(KEYS[2], sequence, ARGV[1], ttl)
mark_ready(KEYS[3], KEYS[4], ARGV[2], ARGV[3], accepted_ms, ttl)
return {'accepted', ARGV[1], sequence}
