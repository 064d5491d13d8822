-- Free a key of the caller's that is bound to the run; another run's binding, a claim, and what is no string at all, stay.
local function unbind(binding, run_id)
  if redis.pcall('GET', binding) == 'run:' .. run_id then redis.call('DEL', binding) end
end
