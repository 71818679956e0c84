-- Put in front of every script on the ledger. All of it shares one hash tag: its bound, its figures
-- and who is the oldest are over all tenants.
--
--   stats    hash: size (notifications and their recipients), pending, acknowledged, expired, total
--            (of all ack times, microseconds)
--   order    sorted set: notifications by when they were sent first
--   due      sorted set: notifications by when the first of their recipients is late, or earlier
--   times    list: the latest ack times (microseconds)
-- A notification, "tenant|id":
--   record   hash: s when it was sent first, n how many acked one that expects nobody in particular,
--            u<user> what became of a recipient: q queued, p pending, x expired, a<when> acked,
--            t<when> confirmed by the transport; o the u<user> who was its only recipient when it
--            was expected first: his are q1, p<when he was sent it last> and x1
--   pending  sorted set: u<user> by when he was sent it last
-- Most notifications have one recipient, who so needs no second key.
-- Times are in microseconds. Kept true: pending has the recipients whose state is a bare p; size and
-- pending in stats are the sums over all notifications.

local function time(given)
    if given ~= '' then
        return tonumber(given)
    end
    local now = redis.call('TIME')
    return now[1] * 1000000 + now[2]
end

local function count(stats, name, by)
    if by ~= 0 then
        redis.call('HINCRBY', stats, name, by)
    end
end

-- When the recipient whom o names was sent it last; nil if he is not pending.
local function sent_to_only(record, user)
    local state = user and redis.call('HGET', record, user)
    if state and string.sub(state, 1, 1) == 'p' then
        return tonumber(string.sub(state, 2))
    end
end

-- Forgets a notification; how many had not confirmed. Its keys have the tag of those in KEYS and are
-- made up here, because only the order says which is the oldest.
local function let_go(stats, order, due, records, pendings, member)
    local record, pending = records .. member, pendings .. member
    local never = redis.call('ZCARD', pending)
    local fields = redis.call('HLEN', record)
    if fields > 0 then
        -- s counts for the notification itself; n and o are no recipients.
        local known = redis.call('HMGET', record, 'n', 'o')
        count(stats, 'size', (known[1] and 1 or 0) + (known[2] and 1 or 0) - fields)
        if sent_to_only(record, known[2]) then
            never = never + 1
        end
    end
    count(stats, 'pending', -never)
    count(stats, 'expired', never)
    redis.call('UNLINK', record, pending)
    redis.call('ZREM', order, member)
    redis.call('ZREM', due, member)
    return never
end
