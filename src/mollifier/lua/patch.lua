-- Append one change to a held entry, provided nobody else has changed it, or taken it for the first time, since it was read.
--
-- @include settle
-- @include usage
-- KEYS  1 entry  hash: the entry
--       2 owners  hash: whose each held entry is, and its bytes
--       3 usage   hash: how much is held, in all, by organization and by environment
--       4... binding  strings: keys of the caller's to free with this change
-- ARGV  1 run_id
--       2 patches  how many changes the entry had when it was read
--       3 patch    opaque bytes
--       4 taken    whether it had been popped when it was read: 1 or 0
-- Returns 'held' (appended) | 'changed' (read it again) | 'missing' | 'stale' (the run exists: change it there)
local found = redis.call('HMGET', KEYS[1], 'state', 'patches', 'taken')
if not found[1] then return 'missing' end
if found[1] == 'MATERIALISED' then return 'stale' end
if (found[2] or '0') ~= ARGV[2] or (found[3] or '0') ~= ARGV[4] then return 'changed' end
redis.call('HSET', KEYS[1], 'patch:' .. ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[1], 'patches', 1)
local bytes, env, org = read_record(KEYS[2], ARGV[1])
if bytes then
  local names, sums = read_sums(KEYS[3], env, org)
  write_record(KEYS[2], ARGV[1], string.format('%.0f', bytes + #ARGV[3]), env, org)
  add_to_sums(KEYS[3], names, sums, 0, #ARGV[3])
end
for i = 4, #KEYS do unbind(KEYS[i], ARGV[1]) end
return 'held'
