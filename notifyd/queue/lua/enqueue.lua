-- Stores one notification in the logs of several users of one bucket, each at once with its offset,
-- its expiry and the count; a full log gives up its least, or refuses the newcomer if that is it.
--
-- KEYS: depth, due, then log, order, expiry of each user
-- ARGV: now or '', max_size_per_user, the queue's ttl, its own expiry or '', grace, id, rank, entry,
--       then each user's name (times in ms)
-- Answer: entries given up, entries that had expired, then for each user 0 pending already,
--         1 stored, 2 full

local depth, due = KEYS[1], KEYS[2]
local now, max_size, ttl = time(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local grace, id, rank, entry = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7]), ARGV[8]
local expires = now + ttl
if ARGV[4] ~= '' then
    expires = math.min(expires, tonumber(ARGV[4]))
end
local given_up, expired, stored = 0, 0, 0

local function give_up(log, order, expiry, victim, offset)
    remove(log, order, expiry, {victim})
    local told = redis.call('HMGET', log, 'c', 'f', 'l')
    local first, last = tonumber(told[2]) or offset, tonumber(told[3]) or offset
    redis.call('HSET', log, 'c', (tonumber(told[1]) or 0) + 1,
        'f', math.min(first, offset), 'l', math.max(last, offset))
    given_up = given_up + 1
end

local function store(log, order, expiry, member)
    local size = redis.call('ZCARD', order)
    if size > 0 and redis.call('ZSCORE', order, id) then
        return 0
    end
    if size >= max_size then
        -- What is dead already makes room before what is alive.
        local dropped = drop_expired(log, order, expiry, now)
        expired = expired + dropped
        size = size - dropped
        while size >= max_size do
            local least = redis.call('ZRANGE', order, 0, 0, 'WITHSCORES')
            local score = tonumber(least[2])
            if rank < math.floor(score / RANK) then
                return 2
            end
            give_up(log, order, expiry, least[1], score % RANK)
            size = size - 1
        end
    end
    local known = redis.call('HMGET', log, 'o', 'u')
    local offset = (tonumber(known[1]) or 0) + 1
    redis.call('HSET', log, 'o', offset, id, entry)
    if offset == 1 then
        redis.call('HSET', log, 'e', string.format('%x', now))
    end
    redis.call('ZADD', order, rank * RANK + offset, id)
    redis.call('ZADD', expiry, expires, id)
    redis.call('ZADD', due, 'LT', expires, member)
    local gone_at = expires + grace
    if size == 0 or gone_at > (tonumber(known[2]) or 0) then
        -- The keys go by themselves where no server sweeps any more. An eighth longer than needed,
        -- so that not every entry has to say it again.
        gone_at = gone_at + math.floor(ttl / 8)
        redis.call('HSET', log, 'u', gone_at)
        for _, key in ipairs({log, order, expiry}) do
            redis.call('PEXPIRE', key, math.max(1, gone_at - now))
        end
    end
    stored = stored + 1
    return 1
end

local answer = {0, 0}
for user = 1, #ARGV - 8 do
    local key = 3 * user
    answer[user + 2] = store(KEYS[key], KEYS[key + 1], KEYS[key + 2], ARGV[user + 8])
end
local change = stored - given_up - expired
if change ~= 0 then
    redis.call('INCRBY', depth, change)
end
if stored > 0 then
    local longest = 2 * (ttl + grace)
    redis.call('PEXPIRE', depth, longest)
    redis.call('PEXPIRE', due, longest)
end
answer[1], answer[2] = given_up, expired
return answer
