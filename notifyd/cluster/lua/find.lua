-- Finds the nodes that hold any of these users of one bucket.
--
-- KEYS: nodes with users in this bucket (sorted set)
-- ARGV: what keys of a node's users begin with, then the users
-- Answer: for each node its name, and the connections of each user, false where it has none

local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local on = ARGV[1]
local answer = {}
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
    local users = redis.call('HMGET', on .. node, unpack(ARGV, 2))
    answer[#answer + 1] = node
    answer[#answer + 1] = users
end
return answer
