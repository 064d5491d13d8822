-- Take the oldest entries of an environment, mark them DRAINING under a new lease, and return them.
--
-- Takes from the head only while the head is one of the declared entries, so first-in-first-out holds among many drainers.
-- A reference whose entry is gone is dropped: an audit copy expired. Of a held entry, which never does, what is known becomes a dead
-- letter. An entry that does not read as one is a dead letter too, untouched.
-- With no entry declared it takes none, and takes an environment that has nothing left out of the ready index.
-- It takes no more once they have so many bytes: one reply, which everybody else waits for, stays small whatever tenants put into their payloads.
-- It names those that are the oldest then, so that the next pop needs no look before it: what has waited long enough comes back first.
-- The first thing written takes something away: a server whose memory is full lets a script go on only from there.
-- @include index
-- @include clock
-- @include due
-- @include entry
-- @include many
-- @include usage
-- @include vanished
-- KEYS  1 queue     sorted set: the environment's queued runs by sequence
--       2 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       3 envs      sorted set: the organization's environments by due moment
--       4 orgs      sorted set: the partition's organizations by due moment
--       5 draining  sorted set: the partition's leased runs by the moment their lease ends
--       6 failed    sorted set: the partition's dead letters by the moment they died
--       7 seq       string: the partition's counter, here for the lease
--       8 held      sorted set: the environment's held runs by the moment they were triggered
--       9 owners    hash: whose each held entry is, and its bytes
--       10 usage    hash: how much is held, in all, by organization and by environment
--       11 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       12... entry  hashes: the entries of the named runs, in the order of ARGV
-- ARGV  1 env_id
--       2 org_id
--       3 lease_ms
--       4 take      the most to take, and to name
--       5 enough    so many bytes of fields are
--       6... run_id
-- Returns {now_ms, {{run_id, field, value, ...} ...}, {malformed run_id ...}, references dropped, {evicted run_id ...}, {next run_id ...}}
local entry_of = {}
for i = 12, #KEYS do entry_of[ARGV[i - 6]] = KEYS[i] end

local now = now_ms()
bring_back(KEYS[1], KEYS[2], now)
local leaving, taking, malformed, gone = {}, {}, {}, {}
local take, enough, size = tonumber(ARGV[4]), tonumber(ARGV[5]), 0
local head = #KEYS > 11 and redis.call('ZRANGE', KEYS[1], 0, #KEYS - 12) or {}
for _, run_id in ipairs(head) do
  local entry = entry_of[run_id]
  if not entry or #taking == take or size >= enough then break end
  leaving[#leaving + 1] = run_id
  local fields = fields_of(entry)
  if not fields then
    gone[#gone + 1] = run_id
  elseif not read_as_entry(fields, ARGV[1], ARGV[2]) then
    malformed[#malformed + 1] = run_id
  else
    taking[#taking + 1] = {run_id, fields}
    for _, value in pairs(fields) do size = size + #value end
  end
end

remove_many(KEYS[1], leaving)
for _, run_id in ipairs(malformed) do
  add(KEYS[6], string.format('%.0f', now), run_id, ttl_of(entry_of[run_id]))
end
local evicted, dropped = {}, 0
for _, run_id in ipairs(gone) do
  if bury(KEYS[9], KEYS[10], KEYS[8], KEYS[11], KEYS[6], run_id, ARGV[1], ARGV[2], now) then
    evicted[#evicted + 1] = run_id
  else
    dropped = dropped + 1
  end
end
local taken = {}
if #taking > 0 then
  local deadline, lease = string.format('%.0f', now + ARGV[3]), string.format('%.0f', redis.call('INCR', KEYS[7]))
  local leased, lifetime, forever = {}, 0, false
  for i, of in ipairs(taking) do
    local run_id, fields = unpack(of)
    local entry = entry_of[run_id]
    redis.call('HSET', entry, 'state', 'DRAINING', 'lease', lease, 'taken', '1')
    if fields.not_before_ms then redis.call('HDEL', entry, 'not_before_ms') end
    fields.state, fields.lease, fields.taken, fields.not_before_ms = 'DRAINING', lease, '1', nil
    if fields.kind == 'held' then forever = true else lifetime = math.max(lifetime, ttl_of(entry)) end
    leased[#leased + 1] = deadline
    leased[#leased + 1] = run_id
    taken[i] = {run_id}
    for name, value in pairs(fields) do
      table.insert(taken[i], name)
      table.insert(taken[i], value)
    end
  end
  add_many(KEYS[5], leased, forever and 0 or lifetime)
end
refresh_ready(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
return {now, taken, malformed, dropped, evicted, redis.call('ZRANGE', KEYS[1], 0, ARGV[4] - 1)}
