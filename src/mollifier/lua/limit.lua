-- Count one request of an API key, unless as many as may come have come.
--
-- Time is cut into buckets of the server's clock; what counts are the current bucket and those before it, `buckets` in all. A request
-- that is refused does not count, so that one who keeps asking is let through again as the counted ones grow old.
-- KEYS  1 requests  hash: bucket number -> requests counted in it
-- ARGV  1 bucket_us  width of a bucket, microseconds
--       2 buckets    how many buckets are counted, the current one included
--       3 limit      how many requests may come
-- Returns {allowed 0|1, how many more may come now, milliseconds until the oldest counted one no longer counts}
local time = redis.call('TIME')
local bucket_us = tonumber(ARGV[1])
local buckets = tonumber(ARGV[2])
local limit = tonumber(ARGV[3])
local now_us = time[1] * 1000000 + time[2]
local current = math.floor(now_us / bucket_us)

local count, oldest = 0, current
local stale = {}
local counted = redis.call('HGETALL', KEYS[1])
for i = 1, #counted, 2 do
  local bucket = tonumber(counted[i])
  -- A bucket that lies ahead of a clock set back a little still counts; one further off belongs to no window.
  if math.abs(current - bucket) < buckets then
    count = count + tonumber(counted[i + 1])
    oldest = math.min(oldest, bucket)
  else
    stale[#stale + 1] = counted[i]
  end
end
if #stale > 0 then redis.call('HDEL', KEYS[1], unpack(stale)) end

local allowed = 0
if count < limit then
  allowed, count = 1, count + 1
  redis.call('HINCRBY', KEYS[1], string.format('%.0f', current), 1)
  redis.call('PEXPIRE', KEYS[1], math.ceil(bucket_us * buckets / 1000))
end
return {allowed, math.max(limit - count, 0), math.ceil(((oldest + buckets) * bucket_us - now_us) / 1000)}
