-- The ready index: which environments of which organizations have something due, and when.
-- envs:<org> scores an environment, and orgs an organization, with a moment (ms) at or before which its earliest entry is due.

-- Make a key live at least as long as the entry it names: ttl 0 is for ever, and a key that lives for ever stays so.
-- `before` is the key's PTTL from before it was written to (-2: it did not exist).
local function outlive(key, before, ttl)
  if ttl == 0 then
    if before >= 0 then redis.call('PERSIST', key) end
  elseif before == -2 then
    redis.call('PEXPIRE', key, ttl)
  else
    redis.call('PEXPIRE', key, ttl, 'GT')
  end
end

-- What is left of an entry's life, as a ttl.
local function ttl_of(key)
  local left = redis.call('PTTL', key)
  return left < 0 and 0 or math.max(left, 1)
end

-- Add a member to a sorted set that must outlive it; with LT an earlier score stays.
local function add(key, score, member, ttl)
  local before = redis.call('PTTL', key)
  redis.call('ZADD', key, score, member)
  outlive(key, before, ttl)
end

local function add_earliest(key, score, member, ttl)
  local before = redis.call('PTTL', key)
  redis.call('ZADD', key, 'LT', score, member)
  outlive(key, before, ttl)
end

local function mark_ready(envs, orgs, env, org, due_ms, ttl)
  add_earliest(envs, due_ms, env, ttl)
  add_earliest(orgs, due_ms, org, ttl)
end

-- Score the environment anew after its queue lost entries; take it, and its organization, out when nothing is left.
local function refresh_ready(queue, waiting, envs, orgs, env, org)
  if redis.call('EXISTS', queue) == 1 then return end
  local next_waiting = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
  if next_waiting[2] then
    redis.call('ZADD', envs, 'XX', next_waiting[2], env)
  else
    redis.call('ZREM', envs, env)
  end
  local next_env = redis.call('ZRANGE', envs, 0, 0, 'WITHSCORES')
  if next_env[2] then
    redis.call('ZADD', orgs, 'XX', next_env[2], org)
  else
    redis.call('ZREM', orgs, org)
  end
end
