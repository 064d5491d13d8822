-- Count one trigger of an environment and tell whether the environment is bursting.
--
-- Time is cut into buckets of the server's clock; the count is the sum of the current bucket and those before it, `buckets` in all.
-- KEYS  1 rate     hash: bucket number -> triggers counted in it
--       2 tripped  string: exists while the environment is held
-- ARGV  1 bucket_us  width of a bucket, microseconds
--       2 buckets    how many buckets are counted, the current one included
--       3 threshold  the highest count that does not trip
--       4 hold_ms    how long a trip holds; each further overage starts it anew
-- Returns {tripped 0|1, count}
local time = redis.call('TIME')
local bucket_us = tonumber(ARGV[1])
local buckets = tonumber(ARGV[2])
local current = math.floor((time[1] * 1000000 + time[2]) / bucket_us)
local field = string.format('%.0f', current)

local count = 1
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
redis.call('HINCRBY', KEYS[1], field, 1)
redis.call('PEXPIRE', KEYS[1], math.ceil(bucket_us * buckets / 1000))

if count > tonumber(ARGV[3]) then
  redis.call('SET', KEYS[2], '1', 'PX', ARGV[4])
  return {1, count}
end
return {redis.call('EXISTS', KEYS[2]), count}
