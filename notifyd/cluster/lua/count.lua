-- Counts the users of a tenant in one bucket, each once, on whatever nodes they are.
--
-- KEYS: nodes with users in this bucket (sorted set)
-- ARGV: what keys of a node's users begin with, what the tenant's users begin with
-- Answer: how many

local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local on, tenant = ARGV[1], ARGV[2]
local seen, count = {}, 0
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
    for _, user in ipairs(redis.call('HKEYS', on .. node)) do
        if not seen[user] and string.sub(user, 1, #tenant) == tenant then
            seen[user] = true
            count = count + 1
        end
    end
end
return count
