-- Records that a user confirmed notifications, each once; an ack of his says more than the transport.
--
-- KEYS: stats, times, then record and pending of each notification
-- ARGV: now or '', a (acked) | t (transport), u<user>, how many ack times are kept, keep (ms)
-- Answer: for each notification -2 if he was not expected to, -1 if that was known, else how long it
--         took him

local stats, times = KEYS[1], KEYS[2]
local now, how, user = time(ARGV[1]), ARGV[2], ARGV[3]
local confirmed_now = how .. string.format('%.0f', now)
local answer, confirmed, acknowledged, total = {}, 0, 0, 0

local function acked(since)
    local took = math.max(0, now - tonumber(since))
    acknowledged = acknowledged + 1
    total = total + took
    redis.call('LPUSH', times, took)
    return took
end

local function confirm(record, pending)
    local known = redis.call('HMGET', record, 's', 'n', user)
    local sent, anyone, state = known[1], known[2], known[3]
    if not sent then
        return -2
    end
    if anyone and how == 'a' then
        redis.call('HINCRBY', record, 'n', 1)
        return acked(sent)
    end
    if not state then
        return -2
    end
    local before = string.sub(state, 1, 1)
    if before == 'a' or (before == 't' and how == 't') then
        return -1
    end
    local since
    if before == 'p' and #state > 1 then
        since = string.sub(state, 2)
        confirmed = confirmed + 1
    elseif before == 'p' then
        since = how == 'a' and redis.call('ZSCORE', pending, user)
        confirmed = confirmed + redis.call('ZREM', pending, user)
    end
    redis.call('HSET', record, user, confirmed_now)
    if how == 'a' then
        return acked(since or sent)
    end
    return -1
end

for key = 3, #KEYS, 2 do
    answer[#answer + 1] = confirm(KEYS[key], KEYS[key + 1])
end
count(stats, 'pending', -confirmed)
if acknowledged > 0 then
    count(stats, 'acknowledged', acknowledged)
    count(stats, 'total', total)
    redis.call('LTRIM', times, 0, ARGV[4] - 1)
    redis.call('PEXPIRE', times, ARGV[5])
end
return answer
