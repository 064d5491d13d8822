-- Begin the life of claims anew. Only their owner can: what is free, bound, in doubt or another's by now stays as it is.
--
-- KEYS  1... binding  strings: 'run:<run_id>', 'claim:<token>' or 'doubt'
-- ARGV  1 token        names the claimant
--       2 lifetime_ms  how long a claimant may take in all
-- Returns how many were prolonged
local claim = 'claim:' .. ARGV[1]
local prolonged = 0
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == claim then prolonged = prolonged + redis.call('PEXPIRE', KEYS[i], ARGV[2]) end
end
return prolonged
