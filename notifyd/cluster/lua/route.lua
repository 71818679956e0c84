-- Finds the nodes that hold a user and hands each of them the message, the asking one excepted.
-- One step, so that messages go out in the order in which they were routed.
--
-- KEYS: nodes with users in this bucket (sorted set)
-- ARGV: what keys of a node's users begin with, what channels of nodes begin with, the asking node,
--       the user, the message
-- Answer: connections that the asking node has by what is known here, then for each other node its
--         name, its connections, and how many took the message: 0 where it does not listen

local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local on, channel, own, user, message = unpack(ARGV)
local here, holders = 0, {}
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
    local connections = redis.call('HGET', on .. node, user)
    if connections then
        if node == own then
            here = connections
        else
            holders[#holders + 1] = {node, connections}
        end
    end
end
local several = #holders + (here == 0 and 0 or 1) > 1 and '\1' or '\0'
local answer = {here}
for _, holder in ipairs(holders) do
    answer[#answer + 1] = holder[1]
    answer[#answer + 1] = holder[2]
    answer[#answer + 1] = redis.call('PUBLISH', channel .. holder[1], several .. message)
end
return answer
