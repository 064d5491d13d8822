-- Free the keys that are bound to a run; another run's binding, and a claim, stay.
local function unbind(first, run_id)
  for i = first, #KEYS do
    if redis.call('GET', KEYS[i]) == 'run:' .. run_id then redis.call('DEL', KEYS[i]) end
  end
end
