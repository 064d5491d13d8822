-- Claim keys, each until it is bound to a run, released, or its claimant is taken for dead: callers' keys, or the right to sweep.
--
-- They are claimed in their order up to the first that is somebody else's claim: whoever waits for that one holds none after it.
-- A claimant that has not claimed or prolonged for a lease is taken for dead, and its key is in doubt until the end of the claim's life,
-- up to which it may yet come back and create its run. A key in doubt is nobody's, so that no run is held under it.
-- KEYS  1... binding  strings: 'run:<run_id>', 'claim:<token>' or 'doubt'
-- ARGV  1 token        names the claimant
--       2 lifetime_ms  how long a claimant may take in all, counted from when it claimed or prolonged last
--       3 lease_ms     how long after that it is waited for
--       4... void      the run whose binding of the key is worth nothing, or ''
-- Returns a list, one for each key looked at: {'claimed', ''} | {'bound', run_id} | {'doubted', ''} | {'pending', ''} (somebody else's claim)
local claim = 'claim:' .. ARGV[1]
local waited_for = ARGV[2] - ARGV[3]
local outcomes = {}
for i = 1, #KEYS do
  local holder = redis.call('GET', KEYS[i])
  local run_id = holder and string.match(holder, '^run:(.*)')
  if run_id and run_id ~= ARGV[i + 3] then
    outcomes[i] = {'bound', run_id}
  elseif not holder or run_id or holder == claim then
    redis.call('SET', KEYS[i], claim, 'PX', ARGV[2])
    outcomes[i] = {'claimed', ''}
  elseif holder ~= 'doubt' and redis.call('PTTL', KEYS[i]) >= waited_for then
    outcomes[i] = {'pending', ''}
    break
  else
    redis.call('SET', KEYS[i], 'doubt', 'KEEPTTL')
    outcomes[i] = {'doubted', ''}
  end
end
return outcomes
