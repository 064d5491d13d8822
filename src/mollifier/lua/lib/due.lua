-- Entries whose not-before time has come.

-- Bring them back to their places in the queue. All that are due come back at once, for the last one to fall due may be the oldest; a
-- thousand bound the script's time. Taken away first: a server whose memory is full lets a script go on only from there.
local function bring_back(queue, waiting, now)
  local due = redis.call('ZRANGE', waiting, '-inf', string.format('%.0f', now), 'BYSCORE', 'LIMIT', 0, 1000)
  if #due == 0 then return end
  local ttl = ttl_of(waiting)
  redis.call('ZREM', waiting, unpack(due))
  for _, member in ipairs(due) do
    local colon = string.find(member, ':', 1, true)
    add(queue, string.sub(member, 1, colon - 1), string.sub(member, colon + 1), ttl)
  end
end
