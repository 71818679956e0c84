-- Users of a bucket in whose logs something has expired, the longest ago first.
--
-- KEYS: due
-- ARGV: now or '', how many at most

return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time(ARGV[1]), 'LIMIT', 0, ARGV[2])
