-- Dead letters that are none any more: their run was accepted anew meanwhile, or somebody put the entry back by hand.

-- Whether an entry that is listed as a dead letter is on its way all the same, or has arrived.
local function is_alive(state, sequence, run_id, queue, waiting, draining)
  if state == 'FAILED' then return false end
  return state == 'MATERIALISED' or redis.call('ZSCORE', queue, run_id) or redis.call('ZSCORE', draining, run_id)
    or redis.call('ZSCORE', waiting, (sequence or '') .. ':' .. run_id)
end
