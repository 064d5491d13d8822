-- Claim a caller's key for one trigger, until it is bound to a run, released, or its claimant is taken for dead.
--
-- KEYS  1 binding  string: 'run:<run_id>' or 'claim:<token>'
-- ARGV  1 token        names the claimant
--       2 lifetime_ms  how long a claimant may take
-- Returns {'claimed', ''} | {'bound', run_id} | {'pending', ''} (somebody else's claim)
local holder = redis.call('GET', KEYS[1])
if not holder or holder == 'claim:' .. ARGV[1] then
  redis.call('SET', KEYS[1], 'claim:' .. ARGV[1], 'PX', ARGV[2])
  return {'claimed', ''}
end
local run_id = string.match(holder, '^run:(.*)')
if run_id then return {'bound', run_id} end
return {'pending', ''}
