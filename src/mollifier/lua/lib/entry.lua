-- Reading entries: an entry that does not read as one is listed for inspection, never handed out, requeued or written to.

local function is_number(text)
  return #text > 0 and #text <= 15 and not string.find(text, '%D')
end

-- Whether the hash is an entry of this environment and organization whose every field will parse.
local function reads_as_entry(entry, env, org)
  local found = redis.pcall('HMGET', entry, 'env', 'org', 'kind', 'seq', 'accepted_ms', 'attempts', 'reclaims', 'idempotency')
  return not found.err and found[1] == env and found[2] == org and (found[3] == 'audit' or found[3] == 'held')
    and is_number(found[4] or '') and is_number(found[5] or '')
    and is_number(found[6] or '0') and is_number(found[7] or '0')
    and not string.find(found[8] or '', '%X') and redis.call('HEXISTS', entry, 'payload') == 1
end
