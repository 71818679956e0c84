-- Renews a node's lease among the nodes, and tells who else there is.
--
-- KEYS: nodes (sorted set: node by when its lease ends, ms), what they say of themselves (hash),
--       revoked (see revoke.lua)
-- ARGV: node, lease (ms; 0: it ends), what it says of itself
-- Answer: 1 where its lease still held and something is revoked, then for each node its name, what is
--         left of its lease (ms), what it says of itself

local nodes, said, revoked = KEYS[1], KEYS[2], KEYS[3]
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local node, lease = ARGV[1], tonumber(ARGV[2])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', nodes, '-inf', now)) do
    redis.call('ZREM', nodes, gone)
    redis.call('HDEL', said, gone)
end
local kept = redis.call('ZSCORE', nodes, node) and redis.call('EXISTS', revoked) or 0
if lease > 0 then
    redis.call('ZADD', nodes, now + lease, node)
    redis.call('HSET', said, node, ARGV[3])
    for _, key in ipairs({nodes, said}) do
        -- As long as the longest of their leases, which may be another node's.
        if redis.call('PTTL', key) < 2 * lease then
            redis.call('PEXPIRE', key, 2 * lease)
        end
    end
else
    redis.call('ZREM', nodes, node)
    redis.call('HDEL', said, node)
end
local answer = {kept}
local all = redis.call('ZRANGE', nodes, 0, -1, 'WITHSCORES')
for each = 1, #all, 2 do
    answer[#answer + 1] = all[each]
    answer[#answer + 1] = all[each + 1] - now
    answer[#answer + 1] = redis.call('HGET', said, all[each]) or ''
end
return answer
