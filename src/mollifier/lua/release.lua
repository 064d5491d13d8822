-- Give claims back. Only their owner can: a late release leaves the next owner's claim, and a binding, alone.
--
-- KEYS  1... binding  strings: 'run:<run_id>', 'claim:<token>' or 'doubt'
-- ARGV  1 token  names the claimant
-- Returns how many were released
local claim = 'claim:' .. ARGV[1]
local released = 0
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == claim then released = released + redis.call('DEL', KEYS[i]) end
end
return released
