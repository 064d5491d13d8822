-- Put a dead letter back to its place in the queue, as if nobody had tried it yet.
--
-- Its changes stay, and so does the mark that it has been taken: a creation of its run that was given up may still arrive. Keys of the
-- caller's that were freed when it died stay free. A held one whose record was lost, as when the entry vanished and was restored from a copy, gets
-- its record and its place in lists again.
-- The first thing written takes something away: a server whose memory is full lets a script go on only from there.
-- @include index
-- @include clock
-- @include entry
-- @include usage
-- @include letter
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
--       4 created_us  the moment of the trigger, microseconds since the epoch, for an entry that has lost its place in lists
--       5 parent      a digest of the run that triggered this one, or '', for one that is not found by it any more
--       6 wake        the channel on which drainers listen for work
-- Returns 'revived' | 'missing' (no dead letter of this name) | 'gone' (its entry, and so its payload) | 'malformed' (it does not read as an
-- entry) | 'alive' (its entry is on its way, or has arrived); nothing changed but where revived
if not redis.call('ZSCORE', KEYS[7], ARGV[1]) then return 'missing' end
local fields = fields_of(KEYS[1])
if not fields then return 'gone' end
if not read_as_entry(fields, ARGV[2], ARGV[3]) then return 'malformed' end
if is_alive(fields.state, fields.seq, ARGV[1], KEYS[2], KEYS[3], KEYS[6]) then return 'alive' end

local ttl = ttl_of(KEYS[1])
redis.call('ZREM', KEYS[7], ARGV[1])
redis.call('HDEL', KEYS[1], 'error', 'failed_ms', 'lease', 'attempts', 'reclaims', 'not_before_ms')
redis.call('HSET', KEYS[1], 'state', 'QUEUED')
if fields.kind == 'held' and not read_record(KEYS[9], ARGV[1]) then
  local bytes = #fields.payload
  for i = 0, (fields.patches or 0) - 1 do bytes = bytes + #fields['patch:' .. i] end
  local names, sums = read_sums(KEYS[10], ARGV[2], ARGV[3])
  write_record(KEYS[9], ARGV[1], string.format('%.0f', bytes), ARGV[2], ARGV[3])
  add_to_sums(KEYS[10], names, sums, 1, bytes)
  if not redis.call('ZSCORE', KEYS[8], ARGV[1]) then add(KEYS[8], ARGV[4], ARGV[1], ttl) end
  if ARGV[5] ~= '' then add(KEYS[11], ARGV[5], ARGV[1], ttl) end
end
-- As when it is accepted: a queue that is being drained is looked at anyway.
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('PUBLISH', ARGV[6], '') end
add(KEYS[2], fields.seq, ARGV[1], ttl)
mark_ready(KEYS[4], KEYS[5], ARGV[2], ARGV[3], now_ms(), ttl)
return 'revived'
