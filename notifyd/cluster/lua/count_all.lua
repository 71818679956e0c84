-- Counts the users of all tenants in one bucket, each once, on whatever nodes they are.
--
-- KEYS: nodes with users in this bucket (sorted set)
-- ARGV: what keys of a node's users begin with
-- Answer: tenants and how many users, in turn

local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local seen, counts = {}, {}
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
    for _, user in ipairs(redis.call('HKEYS', ARGV[1] .. node)) do
        if not seen[user] then
            seen[user] = true
            local tenant = string.sub(user, 1, string.find(user, '|', 1, true) - 1)
            counts[tenant] = (counts[tenant] or 0) + 1
        end
    end
end
local answer = {}
for tenant, count in pairs(counts) do
    answer[#answer + 1] = tenant
    answer[#answer + 1] = count
end
return answer
