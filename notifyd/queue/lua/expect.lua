-- Expects confirmations of one notification; beyond the bound the oldest notifications are let go of.
--
-- KEYS: stats, order, due, record, pending
-- ARGV: now or '', timeout, keep (ms), max_pending, sent | queued | anyone, member,
--       what the keys of records and of pendings begin with, then u<user> for each recipient
-- Answer: how many were let go of without having confirmed

local stats, order, due, record, pending = unpack(KEYS)
local now, timeout, keep, max_size = time(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local kind, member = ARGV[5], ARGV[6]
local size, waiting = 0, 0

if redis.call('HSETNX', record, 's', now) == 1 then
    size = 1
    redis.call('ZADD', order, now, member)
    if kind == 'anyone' then
        redis.call('HSET', record, 'n', 0)
    end
end
-- What anybody may ack expects nobody in particular later either.
local last = redis.call('HEXISTS', record, 'n') == 1 and 8 or #ARGV
for from = 9, last, 500 do
    local users = {unpack(ARGV, from, math.min(from + 499, #ARGV))}
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
if kind == 'sent' and last > 8 then
    redis.call('ZADD', due, 'LT', now + timeout, member)
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
    never = never + let_go(stats, order, due, ARGV[7], ARGV[8], oldest)
    over = tonumber(redis.call('HGET', stats, 'size')) - max_size
end
return never
