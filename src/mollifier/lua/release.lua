-- Give a claim back. Only its owner can: a late release leaves the next owner's claim, and a binding, alone.
--
-- KEYS  1 binding  string: 'run:<run_id>' or 'claim:<token>'
-- ARGV  1 token  names the claimant
-- Returns 'held' (released) | 'stale' (nothing changed)
if redis.call('GET', KEYS[1]) ~= 'claim:' .. ARGV[1] then return 'stale' end
redis.call('DEL', KEYS[1])
return 'held'
