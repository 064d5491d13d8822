-- Fencing: only the pop that holds an entry may settle it.

-- 'held' when this lease holds the entry; 'missing' when there is no entry; 'stale' when another holds it, or nobody.
local function holds(entry, lease)
  local found = redis.call('HMGET', entry, 'state', 'lease')
  if not found[1] then return 'missing' end
  if found[1] == 'DRAINING' and found[2] == lease then return 'held' end
  return 'stale'
end
