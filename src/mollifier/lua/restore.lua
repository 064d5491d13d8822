-- Look whether runs of one environment stand where the state of their entries says, and put back those that stand nowhere.
--
-- Queued entries belong into queue or waiting, those with a lease into draining, dead letters into failed, and so do, in whatever state,
-- those that do not read as entries. What names an entry that is gone is dropped, and of a held one what is known becomes a dead letter;
-- one under a lease that runs is left to its holder.
-- Each is judged by what is there now, not by what the caller has seen, and one that is right is left alone: doing it again, late, or
-- beside another harms nothing.
-- The first thing written takes something away: a server whose memory is full lets a script go on only from there.
-- @include index
-- @include clock
-- @include entry
-- @include usage
-- @include vanished
-- KEYS  1 queue     sorted set: the environment's queued runs by sequence
--       2 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       3 envs      sorted set: the organization's environments by due moment
--       4 orgs      sorted set: the partition's organizations by due moment
--       5 draining  sorted set: the partition's leased runs by the moment their lease ends
--       6 failed    sorted set: the partition's dead letters by the moment they died
--       7 held      sorted set: the environment's held runs by the moment they were triggered
--       8 owners    hash: whose each held entry is, and its bytes
--       9 usage     hash: how much is held, in all, by organization and by environment
--       10 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       11 seq      string: the partition's counter
--       12... entry  hashes: the entries of the runs
-- ARGV  1 env_id
--       2 org_id
--       3 lease_ms    what is given to one that has no lease and should
--       4 stalled_ms  queued entries that have been due for longer are stale
--       5... runs     for each: run_id, the member of waiting that named it or ''
-- Returns {stale, when the oldest that is due was accepted (ms) or -1, bytes of those in held by their records,
-- {seq, how many held names, entries, bytes by the environment's sums}, {{run_id, verdict, where it was named ...} ...}}, of which the
-- verdict is 'evicted' (held, its entry gone: a dead letter) | 'dropped' (its entry gone) | 'returned' (to queue or waiting) | 'leased' |
-- 'listed' (in failed) | 'malformed' (it does not read as an entry and stands nowhere; untouched)
local now = now_ms()
local now_text = string.format('%.0f', now)

local function is_queued(run_id, member) return redis.call('ZSCORE', KEYS[1], run_id) or redis.call('ZSCORE', KEYS[2], member) end
local function is_leased(run_id) return redis.call('ZSCORE', KEYS[5], run_id) end
local function is_listed(run_id) return redis.call('ZSCORE', KEYS[6], run_id) end

-- Take away what names a run whose entry is gone. Nil when nothing does, or nothing may be done yet.
local function let_go(run_id, member)
  local lease_end = is_leased(run_id)
  if lease_end and tonumber(lease_end) > now then return nil end
  local verdict = {run_id, 'dropped'}
  local function note(index, is_there)
    if is_there then verdict[#verdict + 1] = index end
  end
  note('queue', redis.call('ZREM', KEYS[1], run_id) == 1)
  note('waiting', member ~= '' and redis.call('ZREM', KEYS[2], member) == 1)
  if #verdict > 2 then refresh_ready(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2]) end
  note('draining', redis.call('ZREM', KEYS[5], run_id) == 1)
  note('held', redis.call('ZSCORE', KEYS[7], run_id))
  local bytes, of_env = read_record(KEYS[8], run_id)
  note('owners', bytes)
  if bury(KEYS[8], KEYS[9], KEYS[7], KEYS[10], KEYS[6], run_id, ARGV[1], ARGV[2], now) then
    verdict[2] = 'evicted'
    return verdict
  end
  note('failed', not of_env and redis.call('ZREM', KEYS[6], run_id) == 1)
  return #verdict > 2 and verdict or nil
end

-- Where an entry of each state has to stand: nil when it does, or else what was done about it.
local place = {}
function place.QUEUED(run_id, entry, sequence, not_before)
  if is_queued(run_id, sequence .. ':' .. run_id) or is_listed(run_id) then return nil end
  redis.call('ZREM', KEYS[5], run_id)
  local ttl = ttl_of(entry)
  if not_before > now then
    local due = string.format('%.0f', not_before)
    add(KEYS[2], due, sequence .. ':' .. run_id, ttl)
    mark_ready(KEYS[3], KEYS[4], ARGV[1], ARGV[2], due, ttl)
  else
    add(KEYS[1], sequence, run_id, ttl)
    mark_ready(KEYS[3], KEYS[4], ARGV[1], ARGV[2], now_text, ttl)
  end
  return 'returned'
end
function place.DRAINING(run_id, entry)
  if is_leased(run_id) or is_listed(run_id) then return nil end
  redis.call('ZREM', KEYS[1], run_id)
  -- A holder that is alive settles it, or extends this one; otherwise it is reclaimed as ever.
  add(KEYS[5], string.format('%.0f', now + ARGV[3]), run_id, ttl_of(entry))
  return 'leased'
end
function place.FAILED(run_id, entry, _, _, died)
  if is_listed(run_id) then return nil end
  redis.call('ZREM', KEYS[1], run_id)
  add(KEYS[6], is_number(died) and died or now_text, run_id, ttl_of(entry))
  return 'listed'
end
function place.MATERIALISED() return nil end

local stale, oldest, held_bytes, verdicts = 0, nil, 0, {}
for i = 5, #ARGV, 2 do
  local run_id, entry, verdict = ARGV[i], KEYS[(i - 5) / 2 + 12], nil
  local found = redis.pcall('HMGET', entry, 'state', 'env', 'org', 'seq', 'accepted_ms', 'not_before_ms', 'failed_ms')
  if not found.err and redis.call('EXISTS', entry) == 0 then
    verdict = let_go(run_id, ARGV[i + 1])
  elseif not found.err and place[found[1]] and found[2] == ARGV[1] and found[3] == ARGV[2] and is_number(found[4] or '') then
    local accepted, not_before = tonumber(found[5] or '') or now, tonumber(found[6] or '') or 0
    local done = place[found[1]](run_id, entry, found[4], not_before, found[7] or '')
    if done then verdict = {run_id, done} end
    local due = math.max(accepted, not_before)
    if found[1] == 'QUEUED' and due <= now then
      oldest = math.min(oldest or accepted, accepted)
      if now - due > tonumber(ARGV[4]) then stale = stale + 1 end
    end
  elseif not is_leased(run_id) and not is_listed(run_id)
    and not is_queued(run_id, ARGV[i + 1] ~= '' and ARGV[i + 1] or (found[4] or '') .. ':' .. run_id) then
    verdict = {run_id, 'malformed'}
  end
  if redis.call('ZSCORE', KEYS[7], run_id) then held_bytes = held_bytes + (read_record(KEYS[8], run_id) or 0) end
  if verdict then verdicts[#verdicts + 1] = verdict end
end
local sums = redis.call('HMGET', KEYS[9], 'entries:env:' .. ARGV[1], 'bytes:env:' .. ARGV[1])
local books = {redis.call('GET', KEYS[11]) or '0', redis.call('ZCARD', KEYS[7]), sums[1] or '0', sums[2] or '0'}
return {stale, oldest or -1, string.format('%.0f', held_bytes), books, verdicts}
