-- Stores notifications in the logs of users of one bucket, each at once with its offset, its expiry
-- and the count; a full log gives up its least, or refuses the newcomer if that is it.
--
-- KEYS: depth, due, then log and order of each recipient of each notification
-- ARGV: now or '', max_size_per_user, the queue's ttl, grace; then for each notification its own
--       expiry or '', id, rank, entry without its expiry, 1 if a refusal is to be told to the
--       recipient, how many recipients, and each one's name (times in ms)
-- Answer: entries given up, entries that had expired, then for each recipient 0 pending already,
--         1 stored, 2 full

local depth, due = KEYS[1], KEYS[2]
local now, max_size, ttl = time(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local grace = tonumber(ARGV[4])
local given_up, expired, stored, renew = 0, 0, 0, false
-- The notification that is being stored.
local id, rank, entry, owed, expires

local function note_overflow(log, offset)
    local told = redis.call('HMGET', log, 'c', 'f', 'l')
    local first, last = tonumber(told[2]) or offset, tonumber(told[3]) or offset
    redis.call('HSET', log, 'c', (tonumber(told[1]) or 0) + 1,
        'f', math.min(first, offset), 'l', math.max(last, offset), 'n', 1)
end

local function give_up(log, order, victim, offset)
    remove(log, order, {victim})
    note_overflow(log, offset)
    given_up = given_up + 1
end

-- Makes room in a full log: its size and when the first entry expires, then; nil where the newcomer
-- is the least itself.
local function make_room(log, order, size, first)
    if first <= now then
        -- What is dead already makes room before what is alive.
        local dropped
        dropped, first = drop_expired(log, order, now)
        expired = expired + dropped
        size = size - dropped
    end
    while size >= max_size do
        local least = redis.call('ZRANGE', order, 0, 0, 'WITHSCORES')
        local score = tonumber(least[2])
        if rank < math.floor(score / RANK) then
            return nil
        end
        give_up(log, order, least[1], score % RANK)
        size = size - 1
    end
    return size, first
end

-- Whether it is there already. One that is dead is no reason not to store it anew: it goes.
local function pending(log, order)
    local known = redis.call('HGET', log, id)
    if not known then
        return false
    end
    if expires_at(known) > now then
        return true
    end
    remove(log, order, {id})
    expired = expired + 1
    return false
end

local function store(log, order, member)
    local size = redis.call('ZCARD', order)
    local known = redis.call('HMGET', log, 'o', 'u', 'x', 'e')
    local first = tonumber(known[3]) or 0
    if size >= max_size then
        if pending(log, order) then
            return 0
        end
        size, first = make_room(log, order, redis.call('ZCARD', order), first)
        if not size then
            if owed then
                note_overflow(log, redis.call('HINCRBY', log, 'o', 1))
            end
            return 2
        end
    end
    if redis.call('HSETNX', log, id, entry) == 0 then
        if pending(log, order) then
            return 0
        end
        redis.call('HSET', log, id, entry)
        size = size - 1
    end
    stored = stored + 1
    local offset = (tonumber(known[1]) or 0) + 1
    redis.call('ZADD', order, rank * RANK + offset, id)
    if size > 0 and expires >= first and expires + grace <= (tonumber(known[2]) or 0) then
        redis.call('HSET', log, 'o', offset)
        return 1
    end
    -- The keys go by themselves where no server sweeps any more. An eighth longer than needed, so
    -- that not every entry has to say it again.
    local gone_at = math.max(expires + grace + math.floor(ttl / 8), size > 0 and known[2] or 0)
    redis.call('HSET', log, 'o', offset, 'e', known[4] or string.format('%x', now), 'u', gone_at,
        'x', size > 0 and math.min(first, expires) or expires)
    redis.call('ZADD', due, 'LT', expires, member)
    redis.call('PEXPIRE', log, math.max(1, gone_at - now))
    redis.call('PEXPIRE', order, math.max(1, gone_at - now))
    renew = true
    return 1
end

local answer = {0, 0}
local at, key = 5, 3
while at <= #ARGV do
    expires = now + ttl
    if ARGV[at] ~= '' then
        expires = math.min(expires, tonumber(ARGV[at]))
    end
    id, rank = ARGV[at + 1], tonumber(ARGV[at + 2])
    entry = string.format('%013.0f', expires) .. ARGV[at + 3]
    owed = ARGV[at + 4] == '1'
    local last = at + 5 + tonumber(ARGV[at + 5])
    for user = at + 6, last do
        answer[#answer + 1] = store(KEYS[key], KEYS[key + 1], ARGV[user])
        key = key + 2
    end
    at = last + 1
end
local change = stored - given_up - expired
if change ~= 0 and redis.call('INCRBY', depth, change) == change then
    -- It was not there: what is new has no expiry yet.
    renew = true
end
if renew then
    -- Longer than any user's.
    local longest = 2 * (ttl + grace)
    redis.call('PEXPIRE', depth, longest)
    redis.call('PEXPIRE', due, longest)
end
answer[1], answer[2] = given_up, expired
return answer
