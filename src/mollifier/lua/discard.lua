-- Drop a dead letter for good: its entry, its place in lists, its record and its part of the sums, and its keys.
--
-- Of one whose entry is on its way all the same, or has arrived, only the letter is dropped.
-- @include settle
-- @include usage
-- @include letter
-- KEYS  1 entry     hash: the entry
--       2 queue     sorted set: the environment's queued runs by sequence
--       3 waiting   sorted set: '<sequence>:<run_id>' by not-before moment
--       4 draining  sorted set: the partition's leased runs by the moment their lease ends
--       5 failed    sorted set: the partition's dead letters by the moment they died
--       6 held      sorted set: the environment's held runs by the moment they were triggered
--       7 owners    hash: whose each held entry is, and its bytes
--       8 usage     hash: how much is held, in all, by organization and by environment
--       9 children  sorted set: the environment's held runs that another triggered, by a digest of that one
--       10... binding  strings: the keys of the caller's that may be bound to the run
-- ARGV  1 run_id
-- Returns 'discarded' | 'missing' (no dead letter of this name; nothing changed)
if redis.call('ZREM', KEYS[5], ARGV[1]) == 0 then return 'missing' end
-- Of a key that is no hash there is no state.
local found = redis.pcall('HMGET', KEYS[1], 'state', 'seq')
if redis.call('EXISTS', KEYS[1]) == 1 and is_alive(found[1], found[2], ARGV[1], KEYS[2], KEYS[3], KEYS[4]) then return 'discarded' end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[6], ARGV[1])
redis.call('ZREM', KEYS[9], ARGV[1])
release(KEYS[7], KEYS[8], {ARGV[1]})
for i = 10, #KEYS do unbind(KEYS[i], ARGV[1]) end
return 'discarded'
