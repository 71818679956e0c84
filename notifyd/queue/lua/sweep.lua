-- Counts what was not confirmed in time as expired, and lets go of notifications that are old: a part
-- of them, so that nobody else waits long.
--
-- KEYS: stats, order, due
-- ARGV: now or '', timeout, retention, how many at a time, what the keys of records and of pendings
--       begin with (made up here like in let_go)
-- Answer: how many expired, 1 if there may be more

local stats, order, due = unpack(KEYS)
local now, timeout, retention, left =
    time(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local records, pendings = ARGV[5], ARGV[6]
local expired, more = 0, 0

local waiting = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, left)
for _, member in ipairs(waiting) do
    if left <= 0 then
        more = 1
        break
    end
    local record, pending = records .. member, pendings .. member
    local late = redis.call('ZRANGEBYSCORE', pending, '-inf', now - timeout, 'LIMIT', 0, left)
    if #late > 0 then
        local changes = {}
        for _, user in ipairs(late) do
            changes[#changes + 1] = user
            changes[#changes + 1] = 'x'
        end
        redis.call('HSET', record, unpack(changes))
        redis.call('ZREM', pending, unpack(late))
        expired = expired + #late
    end
    local only = redis.call('HGET', record, 'o')
    local next = sent_to_only(record, only)
    if next and next <= now - timeout then
        redis.call('HSET', record, only, 'x1')
        expired = expired + 1
        next = nil
    end
    local others = redis.call('ZRANGE', pending, 0, 0, 'WITHSCORES')[2]
    if others then
        next = math.min(next or math.huge, tonumber(others))
    end
    if next then
        redis.call('ZADD', due, next + timeout, member)
    else
        redis.call('ZREM', due, member)
    end
    left = left - 1 - #late
end
count(stats, 'pending', -expired)
count(stats, 'expired', expired)

local old = redis.call('ZRANGEBYSCORE', order, '-inf', now - retention, 'LIMIT', 0, ARGV[4])
for _, member in ipairs(old) do
    expired = expired + let_go(stats, order, due, records, pendings, member)
end
if #waiting == tonumber(ARGV[4]) or #old == tonumber(ARGV[4]) then
    more = 1
end
return {expired, more}
