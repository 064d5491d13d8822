-- Mark a held entry as taken, without taking it: no change is appended to it from here on, for its run is about to be created.
--
-- KEYS  1 entry  hash: the entry
-- Returns 'held' (marked) | 'missing' | 'stale' (the run exists, or will not: nothing changed)
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if state ~= 'QUEUED' and state ~= 'DRAINING' then return 'stale' end
redis.call('HSET', KEYS[1], 'taken', '1')
return 'held'
