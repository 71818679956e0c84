-- Expects confirmations of notifications; beyond the bound the oldest notifications are let go of.
--
-- KEYS: stats, order, due
-- ARGV: now or '', timeout, keep (ms), max_pending, what the keys of records and of pendings begin
--       with; then for each notification sent | queued | anyone, member, how many recipients, and
--       u<user> for each of them
-- Answer: how many were let go of without having confirmed
-- The keys of notifications have the tag of those in KEYS.

local stats, order, due = unpack(KEYS)
local now, timeout, keep, max_size = time(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local records, pendings = ARGV[5], ARGV[6]
local size, waiting = 0, 0

local at = 7
while at <= #ARGV do
    local kind, member, first = ARGV[at], ARGV[at + 1], at + 3
    local last = at + 2 + tonumber(ARGV[at + 2])
    local record, pending = records .. member, pendings .. member
    at = last + 1
    if redis.call('HSETNX', record, 's', now) == 1 then
        size = size + 1
        redis.call('ZADD', order, now, member)
        if kind == 'anyone' then
            redis.call('HSET', record, 'n', 0)
        end
    end
    -- What anybody may ack expects nobody in particular later either.
    if redis.call('HEXISTS', record, 'n') == 1 then
        last = first - 1
    end
    for from = first, last, 500 do
        local users = {unpack(ARGV, from, math.min(from + 499, last))}
        local states = redis.call('HMGET', record, unpack(users))
        local changes, scores, returned = {}, {}, {}
        for each, user in ipairs(users) do
            local state = states[each]
            if kind == 'queued' then
                if not state or state == 'p' then
                    changes[#changes + 1] = user
                    changes[#changes + 1] = 'q'
                    if state then
                        returned[#returned + 1] = user
                    end
                end
            elseif not state or state == 'p' or state == 'q' or state == 'x' then
                changes[#changes + 1] = user
                changes[#changes + 1] = 'p'
                scores[#scores + 1] = now
                scores[#scores + 1] = user
            end
        end
        if #changes > 0 then
            size = size + redis.call('HSET', record, unpack(changes))
        end
        if #returned > 0 then
            waiting = waiting - redis.call('ZREM', pending, unpack(returned))
        end
        if #scores > 0 then
            waiting = waiting + redis.call('ZADD', pending, unpack(scores))
        end
    end
    if kind == 'sent' and last >= first then
        redis.call('ZADD', due, 'LT', now + timeout, member)
    end
    redis.call('PEXPIRE', record, keep)
    redis.call('PEXPIRE', pending, keep)
end
count(stats, 'pending', waiting)
for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, keep)
end
if size == 0 then
    return 0
end
local over = redis.call('HINCRBY', stats, 'size', size) - max_size
local never = 0
while over > 0 do
    local oldest = redis.call('ZRANGE', order, 0, 0)[1]
    if not oldest then
        -- Nothing is left to be counted: records went by themselves.
        redis.call('HSET', stats, 'size', 0, 'pending', 0)
        break
    end
    never = never + let_go(stats, order, due, records, pendings, oldest)
    over = tonumber(redis.call('HGET', stats, 'size')) - max_size
end
return never
