-- What is held, and whose it is: every held entry has a record, and the sums of the records are kept beside them.
-- A record is '<bytes>:<length of the environment's id>:<environment><organization>'; that of an entry that vanished has 'gone' for
-- its bytes and is in no sum. Sums are entries and bytes, in all, of each organization and of each environment.
-- Whatever changes a record changes its sums in the same script, so the two cannot part.

local function read_record(owners, run_id)
  local bytes, length, ids = string.match(redis.call('HGET', owners, run_id) or '', '^(%w+):(%d+):(.*)$')
  if not bytes then return nil end
  return tonumber(bytes), string.sub(ids, 1, tonumber(length)), string.sub(ids, length + 1)
end

-- Put together without string.format, which ends a text at its first NUL.
local function write_record(owners, run_id, bytes, env, org)
  redis.call('HSET', owners, run_id, bytes .. ':' .. #env .. ':' .. env .. org)
end

-- The sums that an entry of this environment is in: their names, and what they are, the narrowest first.
local function read_sums(usage, env, org)
  local names = {'entries:env:' .. env, 'bytes:env:' .. env, 'entries:org:' .. org, 'bytes:org:' .. org, 'entries', 'bytes'}
  local sums = redis.call('HMGET', usage, unpack(names))
  for i = 1, #names do sums[i] = tonumber(sums[i] or 0) end
  return names, sums
end

-- What falls to nothing is taken away, and first: a server whose memory is full lets a script go on only from there.
local function add_to_sums(usage, names, sums, entries, bytes)
  local gone, left = {}, {}
  for i, name in ipairs(names) do
    local sum = sums[i] + (i % 2 == 1 and entries or bytes)
    if sum > 0 then
      left[#left + 1] = name
      left[#left + 1] = string.format('%.0f', sum)
    else
      gone[#gone + 1] = name
    end
  end
  if #gone > 0 then redis.call('HDEL', usage, unpack(gone)) end
  if #left > 0 then redis.call('HSET', usage, unpack(left)) end
end

-- Take the records of runs, and their parts of the sums, away.
local function release(owners, usage, run_ids)
  local parts = {}
  for _, run_id in ipairs(run_ids) do
    local bytes, env, org = read_record(owners, run_id)
    if bytes then
      local name = #env .. ':' .. env .. org
      local part = parts[name] or {env = env, org = org, entries = 0, bytes = 0}
      parts[name] = part
      part.entries, part.bytes = part.entries + 1, part.bytes + bytes
    end
  end
  if #run_ids > 0 then redis.call('HDEL', owners, unpack(run_ids)) end
  for _, part in pairs(parts) do
    local names, sums = read_sums(usage, part.env, part.org)
    add_to_sums(usage, names, sums, -part.entries, -part.bytes)
  end
end
