-- Put in front of every script on users' logs. Each script touches the keys of one bucket, which
-- share a hash tag, and none but those in KEYS.
--
-- A user's log:
--   log     hash: notification id -> entry: when it expires (ms, 13 digits), what it counts against
--           a page (8 digits), the notification.
--           Beside the entries: o last offset, e epoch, u when its keys go at last (ms), x when the
--           first entry expires, or earlier (ms), c f l what it gave up: count, first and last
--           offset, and n while nobody was told.
--   order   sorted set: pending ids by rank * RANK + offset, so what is given up first comes first
-- Its bucket:
--   depth   pending entries of all its users
--   due     sorted set: users by when their first entry expires, or earlier
-- Kept true: log and order have the same ids, depth is the sum of their numbers, and every user with
-- something pending is in due.

local RANK = 2 ^ 50

-- Redis's own time, so that all nodes agree, unless one is given (ms).
local function time(given)
    if given ~= '' then
        return tonumber(given)
    end
    local now = redis.call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end

local function expires_at(entry)
    return tonumber(string.sub(entry, 1, 13)) or math.huge
end

-- Takes pending entries out of a log; not counted off depth yet.
local function remove(log, order, ids)
    for from = 1, #ids, 1000 do
        local to = math.min(from + 999, #ids)
        redis.call('HDEL', log, unpack(ids, from, to))
        redis.call('ZREM', order, unpack(ids, from, to))
    end
end

-- Drops what has expired, looking at every entry; how many, and when the next one will. Not counted
-- off depth yet.
local function drop_expired(log, order, now)
    local dead, first = {}, math.huge
    for _, id in ipairs(redis.call('ZRANGE', order, 0, -1)) do
        local entry = redis.call('HGET', log, id)
        local expires = entry and expires_at(entry) or 0
        if expires <= now then
            dead[#dead + 1] = id
        elseif expires < first then
            first = expires
        end
    end
    remove(log, order, dead)
    if first < math.huge then
        redis.call('HSET', log, 'x', first)
    end
    return #dead, first
end

-- To be called after `removed` entries of a log went: counts them off, and lets go of a log that is
-- empty. What is left of it keeps the next offset above all that there were, so that no cursor
-- stands beyond it.
local function account(depth, due, log, order, member, removed, rest_ms)
    if removed > 0 and redis.call('DECRBY', depth, removed) <= 0 then
        -- It would begin to count from here, and for ever, where it was lost.
        redis.call('DEL', depth)
    end
    if redis.call('EXISTS', order) == 0 then
        redis.call('ZREM', due, member)
        if redis.call('HEXISTS', log, 'c') == 0 then
            redis.call('PEXPIRE', log, rest_ms)
        end
    end
end
