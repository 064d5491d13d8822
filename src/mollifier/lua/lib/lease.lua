-- Fencing: only the pop that holds an entry may settle it.

-- 'held' when this lease holds the entry, and how many changes that has; 'missing' when there is no entry; 'stale' when another
-- holds it, or nobody.
local function holds(entry, lease)
  local found = redis.call('HMGET', entry, 'state', 'lease', 'patches')
  if not found[1] then return 'missing' end
  if found[1] == 'DRAINING' and found[2] == lease then return 'held', found[3] or '0' end
  return 'stale'
end
