-- Held entries that vanished: evicted by a server that may, or deleted by a hand.

-- Keep what is known of one as a dead letter: whose it was, and when that was found. False when nothing of this name was held, or
-- when it was found before. Its hash stays gone: a part of an entry would read as a broken one.
local function bury(owners, usage, held, children, failed, run_id, env, org, now)
  local bytes, of_env, of_org = read_record(owners, run_id)
  local listed = redis.call('ZREM', held, run_id) == 1
  redis.call('ZREM', children, run_id)
  if not of_env and not listed then return false end
  if of_env and not bytes and redis.call('ZSCORE', failed, run_id) then return false end
  if bytes then
    local names, sums = read_sums(usage, of_env, of_org)
    add_to_sums(usage, names, sums, -1, -bytes)
  end
  write_record(owners, run_id, 'gone', of_env or env, of_org or org)
  add(failed, string.format('%.0f', now), run_id, 0)
  return true
end
