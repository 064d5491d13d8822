-- Count triggers that an environment makes at this moment, and tell what they have to be judged by.
--
-- Time is cut into buckets of the server's clock; the count is the sum of the current bucket and those before it, `buckets` in all.
-- KEYS  1 rate     hash: bucket number -> triggers counted in it
--       2 tripped  string: exists while the environment is held
-- ARGV  1 bucket_us  width of a bucket, microseconds
--       2 buckets    how many buckets are counted, the current one included
--       3 threshold  the highest count that does not trip
--       4 hold_ms    how long a trip holds; each further overage starts it anew
--       5 number     how many triggers there are
-- Returns {held before them 0|1, count before them}: the i-th trips if the environment was held or count + i is over the threshold
local time = redis.call('TIME')
local bucket_us = tonumber(ARGV[1])
local buckets = tonumber(ARGV[2])
local current = math.floor((time[1] * 1000000 + time[2]) / bucket_us)
local field = string.format('%.0f', current)

local count = 0
local stale = {}
local counted = redis.call('HGETALL', KEYS[1])
for i = 1, #counted, 2 do
  -- A bucket that lies ahead of a clock set back a little still counts; one further off belongs to no window.
  if math.abs(current - tonumber(counted[i])) < buckets then
    count = count + tonumber(counted[i + 1])
  else
    stale[#stale + 1] = counted[i]
  end
end
if #stale > 0 then redis.call('HDEL', KEYS[1], unpack(stale)) end
redis.call('HINCRBY', KEYS[1], field, ARGV[5])
redis.call('PEXPIRE', KEYS[1], math.ceil(bucket_us * buckets / 1000))

local held = redis.call('EXISTS', KEYS[2])
if count + tonumber(ARGV[5]) > tonumber(ARGV[3]) then redis.call('SET', KEYS[2], '1', 'PX', ARGV[4]) end
return {held, count}
