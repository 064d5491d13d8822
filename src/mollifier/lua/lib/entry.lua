-- Reading entries: an entry that does not read as one is listed for inspection, never handed out, requeued or written to.

local function is_number(text)
  return #text > 0 and #text <= 15 and not string.find(text, '%D')
end

-- The fields of a hash by name, nil when there is no such key; of a key that is no hash there are none.
local function fields_of(entry)
  local flat = redis.pcall('HGETALL', entry)
  local fields = {}
  if flat.err then return fields end
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return next(fields) and fields
end

-- Whether every change that the entry counts is there.
local function has_patches(fields)
  if not is_number(fields.patches or '0') then return false end
  for i = 0, (fields.patches or 0) - 1 do
    if not fields['patch:' .. i] then return false end
  end
  return true
end

-- Whether these are the fields of an entry of this environment and organization, every one of which will parse.
local function read_as_entry(fields, env, org)
  return fields.env == env and fields.org == org and (fields.kind == 'audit' or fields.kind == 'held')
    and is_number(fields.seq or '') and is_number(fields.accepted_ms or '')
    and is_number(fields.attempts or '0') and is_number(fields.reclaims or '0')
    and not string.find(fields.bindings or '', '[^%x,]') and fields.payload ~= nil and has_patches(fields)
end

-- Whether the hash is such an entry.
local function reads_as_entry(entry, env, org)
  return read_as_entry(fields_of(entry) or {}, env, org)
end
