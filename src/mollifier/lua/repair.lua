-- Have the ready index say of an environment, and of its organization, when the earliest of what is queued or waiting is due.
--
-- It goes by what is queued and waiting now, not by what its caller has seen. An environment without an id has nothing: then only the
-- organization's place is put right.
-- @include index
-- @include clock
-- KEYS  1 queue    sorted set: the environment's queued runs by sequence
--       2 waiting  sorted set: '<sequence>:<run_id>' by not-before moment
--       3 envs     sorted set: the organization's environments by due moment
--       4 orgs     sorted set: the partition's organizations by due moment
-- ARGV  1 env_id
--       2 org_id
-- Returns {environment, organization}: of each '' (it was right) | 'missing' | 'late' (its moment was after the due one) | 'empty' (nothing is due)

-- Let the member stand at its due moment or before it, in an index that lives for `ttl`; without such a moment it has to go.
local function put_right(index, member, due, ttl)
  local score = redis.call('ZSCORE', index, member)
  if due and score and tonumber(score) <= tonumber(due) or not due and not score then return '' end
  -- Taken away first: a server whose memory is full lets a script go on only from there.
  redis.call('ZREM', index, member)
  if not due then return 'empty' end
  add(index, due, member, ttl)
  return score and 'late' or 'missing'
end

local due = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if redis.call('EXISTS', KEYS[1]) == 1 then due = string.format('%.0f', now_ms()) end
local queue_ms, waiting_ms = redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2])
local forever = queue_ms == -1 or waiting_ms == -1
local environment = put_right(KEYS[3], ARGV[1], due, forever and 0 or math.max(queue_ms, waiting_ms, 1))
local next_env = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
return {environment, put_right(KEYS[4], ARGV[2], next_env[2], ttl_of(KEYS[3]))}
