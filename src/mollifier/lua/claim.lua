-- Claim keys, each until it is bound to a run, released, or its claimant is taken for dead: callers' keys, or the right to sweep.
--
-- They are claimed in their order up to the first that is somebody else's claim: whoever waits for that one holds none after it.
-- KEYS  1... binding  strings: 'run:<run_id>' or 'claim:<token>'
-- ARGV  1 token        names the claimant
--       2 lifetime_ms  how long a claimant may take before it claims again
--       3... void      the run whose binding of the key is worth nothing, or ''
-- Returns a list, one for each key looked at: {'claimed', ''} | {'bound', run_id} | {'pending', ''} (somebody else's claim)
local claim = 'claim:' .. ARGV[1]
local outcomes = {}
for i = 1, #KEYS do
  local holder = redis.call('GET', KEYS[i])
  local run_id = holder and string.match(holder, '^run:(.*)')
  if run_id and run_id ~= ARGV[i + 2] then
    outcomes[i] = {'bound', run_id}
  elseif holder and not run_id and holder ~= claim then
    outcomes[i] = {'pending', ''}
    break
  else
    redis.call('SET', KEYS[i], claim, 'PX', ARGV[2])
    outcomes[i] = {'claimed', ''}
  end
end
return outcomes
