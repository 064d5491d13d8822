-- Free a key of the caller's that is bound to the run; another run's binding, and a claim, stay.
local function unbind(binding, run_id)
  if redis.call('GET', binding) == 'run:' .. run_id then redis.call('DEL', binding) end
end
