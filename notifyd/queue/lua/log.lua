-- Put in front of every script on users' logs. Each script touches the keys of one bucket, which
-- share a hash tag, and none but those in KEYS.
--
-- A user's log:
--   log     hash: notification id -> entry, its size as a page counts it in the first 8 bytes.
--           Beside the entries: o last offset, e epoch, u when its keys go at last (ms),
--           c f l what it gave up and was not told yet: count, first and last offset.
--   order   sorted set: pending ids by rank * RANK + offset, so what is given up first comes first
--   expiry  sorted set: pending ids by when they expire (ms)
-- Its bucket:
--   depth   pending entries of all its users
--   due     sorted set: users by when their first entry expires, or earlier
-- Kept true: order and expiry have the same ids, depth is the sum of their sizes, and every user
-- with something pending is in due.

local RANK = 2 ^ 50

-- Redis's own time, so that all nodes agree, unless one is given (ms).
local function time(given)
    if given ~= '' then
        return tonumber(given)
    end
    local now = redis.call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Takes pending entries out of a log; not counted off depth yet.
local function remove(log, order, expiry, ids)
    redis.call('HDEL', log, unpack(ids))
    redis.call('ZREM', order, unpack(ids))
    redis.call('ZREM', expiry, unpack(ids))
end

-- Drops what has expired; how many. Not counted off depth yet.
local function drop_expired(log, order, expiry, now)
    local dropped = 0
    repeat
        local ids = redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 500)
        if #ids > 0 then
            remove(log, order, expiry, ids)
            dropped = dropped + #ids
        end
    until #ids < 500
    return dropped
end

-- To be called after `removed` entries of a log went: counts them off, and lets go of a log that is
-- empty. What is left of it keeps the next offset above all that there were, so that no cursor
-- stands beyond it.
local function account(depth, due, log, order, member, removed, rest_ms)
    if removed > 0 then
        redis.call('DECRBY', depth, removed)
    end
    if redis.call('EXISTS', order) == 0 then
        redis.call('ZREM', due, member)
        if redis.call('HEXISTS', log, 'c') == 0 then
            redis.call('PEXPIRE', log, rest_ms)
        end
    end
end
