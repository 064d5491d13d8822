-- Writing many members at once: one command, up to as many as the stack of a script holds.

-- Even, for what comes in pairs.
local AT_ONCE = 1000

-- Call `write` with the elements of the list as arguments, so many at a time.
local function in_parts(list, write)
  for first = 1, #list, AT_ONCE do write(unpack(list, first, math.min(first + AT_ONCE - 1, #list))) end
end

-- Take the members out of a sorted set.
local function remove_many(key, members)
  in_parts(members, function(...) redis.call('ZREM', key, ...) end)
end

-- Add members, each after its score, to a sorted set that must outlive what they name.
local function add_many(key, scored, ttl)
  local before = redis.call('PTTL', key)
  in_parts(scored, function(...) redis.call('ZADD', key, ...) end)
  outlive(key, before, ttl)
end
