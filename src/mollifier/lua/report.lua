-- Store what a sweep found in place of what the last one did, provided that whoever reports it still has the claim to sweep.
--
-- KEYS  1 claim   string: 'claim:<token>' of the sweeper
--       2 report  hash: the last report
-- ARGV  1 token
--       2 lifetime_ms  how long it is kept
--       3... fields    name and value, one after the other
-- Returns 1 (stored) | 0 (another's claim, or nobody's; nothing changed)
if redis.call('GET', KEYS[1]) ~= 'claim:' .. ARGV[1] then return 0 end
-- Taken away first: a server whose memory is full lets a script go on only from there.
redis.call('DEL', KEYS[2])
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
