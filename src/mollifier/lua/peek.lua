-- Name the oldest queued runs of an environment, after bringing back those whose not-before time has come.
--
-- A pop must declare the entries it touches, so it is told their names by this.
-- @include index
-- @include clock
-- @include due
-- KEYS  1 queue    sorted set: the environment's queued runs by sequence
--       2 waiting  sorted set: '<sequence>:<run_id>' by not-before moment
-- ARGV  1 limit  how many to name
-- Returns {run_id ...}, oldest first
bring_back(KEYS[1], KEYS[2], now_ms())
return redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)
