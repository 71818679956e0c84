-- Takes a lease that nobody holds, or renews it: one holder at a time, and none for longer than its
-- time to live after he was last heard of.
--
-- KEYS: lease
-- ARGV: who asks, time to live (ms)
-- Answer: 1 he holds it, 0 another does

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
    return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
