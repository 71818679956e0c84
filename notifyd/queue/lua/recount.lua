-- Counts a bucket's pending entries anew, after a log went by itself (evicted, or no server swept for
-- longer than its keys are kept). In the number of the bucket's users, which is why nobody else does.
--
-- KEYS: depth, due
-- ARGV: what the order's key begins with, before the user's name: of the same bucket as KEYS, but not
--       known beforehand; how long the count is kept where it was lost (ms)

local pending = 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    pending = pending + redis.call('ZCARD', ARGV[1] .. member)
end
local keep = math.max(redis.call('PTTL', KEYS[1]), ARGV[2])
redis.call('SET', KEYS[1], pending, 'PX', keep)
return pending
