-- Name the oldest queued runs of an environment, after bringing back those whose not-before time has come.
--
-- A pop must declare the entries it touches, so it is told their names by this.
-- @include index
-- @include clock
-- KEYS  1 queue    sorted set: the environment's queued runs by sequence
--       2 waiting  sorted set: '<sequence>:<run_id>' by not-before moment
-- ARGV  1 limit  how many to name
-- Returns {run_id ...}, oldest first
-- All that are due come back before any is named, for the last one to fall due may be the oldest; a thousand bound the script's time.
local due = redis.call('ZRANGE', KEYS[2], '-inf', string.format('%.0f', now_ms()), 'BYSCORE', 'LIMIT', 0, 1000)
if #due > 0 then
  local ttl = ttl_of(KEYS[2])
  -- Taken away first: a server whose memory is full lets a script go on only from there.
  redis.call('ZREM', KEYS[2], unpack(due))
  for _, member in ipairs(due) do
    local colon = string.find(member, ':', 1, true)
    add(KEYS[1], string.sub(member, 1, colon - 1), string.sub(member, colon + 1), ttl)
  end
end
return redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)
