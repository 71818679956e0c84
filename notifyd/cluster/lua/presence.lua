-- Says which users of one bucket a node holds, and renews its lease there.
--
-- KEYS: the node's users of this bucket (hash: user -> connections), nodes with users in this bucket
--       (sorted set: node by when its lease ends, ms)
-- ARGV: node, lease (ms), then user and connections in turn; 0 connections: he is gone
-- Answer: 1 where others could find the node's users of this bucket until now
--
-- Kept true: a node's hash and its place among the nodes last as long as each other; both lapse by
-- themselves where the node does not come back. The nodes' key outlives the longest of their leases.

local on, nodes = KEYS[1], KEYS[2]
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local lease = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', nodes, '-inf', now)
local known = redis.call('EXISTS', on) == 1 and redis.call('ZSCORE', nodes, ARGV[1]) and 1 or 0
for each = 3, #ARGV, 2 do
    if ARGV[each + 1] == '0' then
        redis.call('HDEL', on, ARGV[each])
    else
        redis.call('HSET', on, ARGV[each], ARGV[each + 1])
    end
end
if redis.call('EXISTS', on) == 1 then
    redis.call('PEXPIRE', on, lease)
    redis.call('ZADD', nodes, now + lease, ARGV[1])
    if redis.call('PTTL', nodes) < 2 * lease then
        redis.call('PEXPIRE', nodes, 2 * lease)
    end
else
    redis.call('ZREM', nodes, ARGV[1])
end
return known
