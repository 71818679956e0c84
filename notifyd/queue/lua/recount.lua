-- Counts a bucket's pending entries anew, after a log went by itself (evicted, or no server swept for
-- longer than its keys are kept). In the number of the bucket's users, which is why nobody else does.
--
-- KEYS: depth, due
-- ARGV: what the order's key begins with, before the user's name: of the same bucket as KEYS, but not
--       known beforehand

local pending = 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    pending = pending + redis.call('ZCARD', ARGV[1] .. member)
end
redis.call('SET', KEYS[1], pending, 'KEEPTTL')
return pending
