-- Records that a user confirmed notifications, each once; an ack of his says more than the transport.
--
-- KEYS: stats, times
-- ARGV: now or '', a (acked) | t (transport), u<user>, how many ack times are kept, keep (ms), what the
--       keys of records and of pendings begin with (made up here like in let_go), then the
--       notifications
-- Answer: for each notification -2 if he was not expected to, -1 if that was known, else how long it
--         took him

local stats, times = KEYS[1], KEYS[2]
local now, how, user = time(ARGV[1]), ARGV[2], ARGV[3]
local records, pendings = ARGV[6], ARGV[7]
local confirmed_now = how .. string.format('%.0f', now)
local answer, confirmed, acknowledged, total = {}, 0, 0, 0

local function acked(since)
    local took = math.max(0, now - tonumber(since))
    acknowledged = acknowledged + 1
    total = total + took
    redis.call('LPUSH', times, took)
    return took
end

-- One that expects nobody in particular, or not him.
local function confirm_unexpected(record)
    local known = redis.call('HMGET', record, 's', 'n')
    if known[2] and how == 'a' then
        redis.call('HINCRBY', record, 'n', 1)
        return acked(known[1])
    end
    return -2
end

local function confirm(member)
    local record = records .. member
    local state = redis.call('HGET', record, user)
    if not state then
        return confirm_unexpected(record)
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
        local pending = pendings .. member
        since = how == 'a' and redis.call('ZSCORE', pending, user)
        confirmed = confirmed + redis.call('ZREM', pending, user)
    end
    redis.call('HSET', record, user, confirmed_now)
    if how == 'a' then
        return acked(since or redis.call('HGET', record, 's') or now)
    end
    return -1
end

for each = 8, #ARGV do
    answer[#answer + 1] = confirm(ARGV[each])
end
count(stats, 'pending', -confirmed)
if acknowledged > 0 then
    count(stats, 'acknowledged', acknowledged)
    count(stats, 'total', total)
    redis.call('LTRIM', times, 0, ARGV[4] - 1)
    redis.call('PEXPIRE', times, ARGV[5])
end
return answer
