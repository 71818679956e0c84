-- Users of a bucket in whose logs something has expired, the longest ago first.
--
-- KEYS: depth, due
-- ARGV: now or '', how many at most
-- Answer: 1 if the bucket has users and their count is lost; their names

local lost = redis.call('EXISTS', KEYS[1]) == 0 and redis.call('EXISTS', KEYS[2]) == 1
return {
    lost and 1 or 0,
    redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', time(ARGV[1]), 'LIMIT', 0, ARGV[2]),
}
