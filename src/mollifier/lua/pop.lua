-- Take the oldest entries of an environment, mark them DRAINING under a new lease, and return them.
--
-- Takes from the head only while the head is one of the declared entries, so first-in-first-out holds among many drainers.
-- A reference whose entry is gone is dropped; one whose entry does not read as an entry goes to the failed list, untouched.
-- With no entry declared it takes none, and takes an environment that has nothing left out of the ready index.
-- @include index
-- @include clock
-- @include entry
-- KEYS  1 queue     sorted set: the environment's queued runs by sequence
--       2 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       3 envs      sorted set: the organization's environments by due moment
--       4 orgs      sorted set: the partition's organizations by due moment
--       5 draining  sorted set: the partition's leased runs by the moment their lease ends
--       6 failed    sorted set: the partition's failed runs by the moment they failed
--       7 seq       string: the partition's counter, here for leases
--       8... entry  hashes: the entries of the named runs, in the order of ARGV
-- ARGV  1 env_id
--       2 org_id
--       3 lease_ms
--       4 take      the most to take
--       5... run_id
-- Returns {now_ms, {{run_id, field, value, ...} ...}, {malformed run_id ...}, references dropped}
local entry_of = {}
for i = 8, #KEYS do entry_of[ARGV[i - 3]] = KEYS[i] end

local now = now_ms()
local deadline = string.format('%.0f', now + ARGV[3])
local taken, malformed, dropped = {}, {}, 0
local head = #KEYS > 7 and redis.call('ZRANGE', KEYS[1], 0, #KEYS - 8) or {}
for _, run_id in ipairs(head) do
  local entry = entry_of[run_id]
  if not entry or #taken == tonumber(ARGV[4]) then break end
  redis.call('ZREM', KEYS[1], run_id)
  if redis.call('EXISTS', entry) == 0 then
    dropped = dropped + 1
  elseif not reads_as_entry(entry, ARGV[1], ARGV[2]) then
    add(KEYS[6], string.format('%.0f', now), run_id, ttl_of(entry))
    malformed[#malformed + 1] = run_id
  else
    redis.call('HSET', entry, 'state', 'DRAINING', 'lease', redis.call('INCR', KEYS[7]))
    redis.call('HDEL', entry, 'not_before_ms')
    add(KEYS[5], deadline, run_id, ttl_of(entry))
    local fields = redis.call('HGETALL', entry)
    table.insert(fields, 1, run_id)
    taken[#taken + 1] = fields
  end
end
refresh_ready(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
return {now, taken, malformed, dropped}
