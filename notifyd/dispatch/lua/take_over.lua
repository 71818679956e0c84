-- Takes over what was read and not acknowledged, oldest first, and counts one more delivery: what
-- XAUTOCLAIM does, which does not say how often an entry was delivered. What was delivered often
-- comes alone, so that nobody who comes with it is blamed for it. What was trimmed meanwhile is
-- acknowledged.
--
-- KEYS: stream
-- ARGV: group, consumer, idle for at least (ms), at most so many, deliveries that are often
-- Answer: for each its id, deliveries with this one, its fields (false where it was trimmed)

local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local often = tonumber(ARGV[5])
local answer = {}
local found = redis.call('XPENDING', stream, group, 'IDLE', ARGV[3], '-', '+', ARGV[4])
for _, pending in ipairs(found) do
    local id, deliveries = pending[1], pending[4]
    local alone = deliveries >= often
    if alone and #answer > 0 then
        break
    end
    local claimed = redis.call('XCLAIM', stream, group, consumer, 0, id)
    if claimed[1] then
        answer[#answer + 1] = {id, deliveries + 1, claimed[1][2]}
    else
        redis.call('XACK', stream, group, id)
        answer[#answer + 1] = {id, deliveries + 1, false}
    end
    if alone then
        break
    end
end
return answer
