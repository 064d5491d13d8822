-- Take the oldest entries of an environment, mark them DRAINING under a new lease, and return them.
--
-- Takes from the head only while the head is one of the declared entries, so first-in-first-out holds among many drainers.
-- A reference whose entry is gone is dropped; one whose entry does not read as an entry goes to the failed list, untouched.
-- @include index
-- @include clock
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
for _, run_id in ipairs(redis.call('ZRANGE', KEYS[1], 0, #KEYS - 8)) do
  local entry = entry_of[run_id]
  if not entry or #taken == tonumber(ARGV[4]) then break end
  redis.call('ZREM', KEYS[1], run_id)
  local found = redis.pcall('HMGET', entry, 'env', 'org', 'seq', 'payload')
  if found.err or ((found[1] or found[2] or found[3] or found[4]) and
      (found[1] ~= ARGV[1] or found[2] ~= ARGV[2] or not found[3] or not found[4])) then
    redis.call('ZADD', KEYS[6], string.format('%.0f', now), run_id)
    malformed[#malformed + 1] = run_id
  elseif not found[1] then
    dropped = dropped + 1
  else
    redis.call('HSET', entry, 'state', 'DRAINING', 'lease', redis.call('INCR', KEYS[7]))
    redis.call('HDEL', entry, 'not_before_ms')
    local lifetime = redis.call('PTTL', entry)
    add(KEYS[5], deadline, run_id, lifetime > 0 and lifetime or 0)
    local fields = redis.call('HGETALL', entry)
    table.insert(fields, 1, run_id)
    taken[#taken + 1] = fields
  end
end
refresh_ready(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
return {now, taken, malformed, dropped}
