-- Records that a user confirmed notifications, each once; an ack of his says more than the transport.
-- What was sent to him again is expected first, as by expect.lua.
--
-- KEYS: stats, order, due, times
-- ARGV: now or '', timeout, keep (ms), max_pending, what the keys of records and of pendings begin
--       with (made up here like in let_go), a (acked) | t (transport), u<user>, how many ack times
--       are kept; then each notification, and how long ago it was sent again (microseconds), or ''
-- Answer: how many were let go of without having confirmed; then for each notification -2 if he was
--         not expected to, -1 if that was known, else how long it took him

stats, order, due = unpack(KEYS)
now, timeout, keep, max_size = time(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
records, pendings = ARGV[5], ARGV[6]
sent_now = string.format('p%.0f', now)
local times, how, USER = KEYS[4], ARGV[7], 8
local user = ARGV[USER]
local confirmed_now = how .. string.format('%.0f', now)
local answer, confirmed, acknowledged, total = {0}, 0, 0, 0
local expected = false

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

local function confirm(member, ago)
    local record = records .. member
    local state = redis.call('HGET', record, user)
    if not state and ago then
        expected = true
        expect('sent', member, USER, USER)
        state = redis.call('HGET', record, user)
    end
    if not state then
        return confirm_unexpected(record)
    end
    local before = string.sub(state, 1, 1)
    if before == 'a' or (before == 't' and how == 't') then
        return -1
    end
    local since
    if ago and before ~= 't' then
        since = now - ago
    end
    if before == 'p' and #state > 1 then
        since = since or string.sub(state, 2)
        confirmed = confirmed + 1
    elseif before == 'p' then
        local pending = pendings .. member
        since = since or how == 'a' and redis.call('ZSCORE', pending, user)
        confirmed = confirmed + redis.call('ZREM', pending, user)
    end
    redis.call('HSET', record, user, confirmed_now)
    if how == 'a' then
        return acked(since or redis.call('HGET', record, 's') or now)
    end
    return -1
end

for each = 10, #ARGV, 2 do
    answer[#answer + 1] = confirm(ARGV[each], tonumber(ARGV[each + 1]))
end
count(stats, 'pending', -confirmed)
if expected then
    answer[1] = account_for_expected()
end
if acknowledged > 0 then
    count(stats, 'acknowledged', acknowledged)
    count(stats, 'total', total)
    redis.call('LTRIM', times, 0, ARGV[9] - 1)
    redis.call('PEXPIRE', times, keep)
end
return answer
