-- A page of a user's pending entries in the order of their offsets, without those that have expired;
-- the first page also tells what the log gave up, and telling it forgets it.
--
-- KEYS: depth, due, log, order, expiry
-- ARGV: now or '', after (offset), max_bytes, the least that an entry counts, name, rest_ms
-- Answer: entries that had expired, overflow's count, first and last (0: none), 1 if more follow,
--         then offset, id and entry of each

local depth, due, log, order, expiry = unpack(KEYS)
local now, after, max_bytes = time(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local answer = {0, 0, 0, 0, 0}
local removed, changed = 0, false

if redis.call('EXISTS', order) == 1 then
    answer[1] = drop_expired(log, order, expiry, now)
    removed = answer[1]
end
if after == 0 then
    local told = redis.call('HMGET', log, 'c', 'f', 'l')
    if told[1] then
        answer[2], answer[3], answer[4] = tonumber(told[1]), tonumber(told[2]), tonumber(told[3])
        redis.call('HDEL', log, 'c', 'f', 'l')
        changed = true
    end
end

-- Each rank's part of the order goes by offset; merged they are the log.
local most = math.floor(max_bytes / tonumber(ARGV[4])) + 2
local heads = {}
for rank = 0, 3 do
    local from = string.format('(%.0f', rank * RANK + after)
    local to = string.format('(%.0f', (rank + 1) * RANK)
    local part = redis.call('ZRANGEBYSCORE', order, from, to, 'WITHSCORES', 'LIMIT', 0, most)
    if #part > 0 then
        heads[#heads + 1] = {part = part, at = 1, offset = part[2] % RANK}
    end
end
local bytes = 0
while #heads > 0 do
    local first = 1
    for each = 2, #heads do
        if heads[each].offset < heads[first].offset then
            first = each
        end
    end
    local head = heads[first]
    local id = head.part[head.at]
    local entry = redis.call('HGET', log, id)
    if entry then
        local size = tonumber(string.sub(entry, 1, 8)) or #entry
        if bytes > 0 and bytes + size > max_bytes then
            answer[5] = 1
            break
        end
        bytes = bytes + size
        local last = #answer
        answer[last + 1], answer[last + 2], answer[last + 3] = head.offset, id, entry
    else
        -- Somebody else took it out of the hash.
        remove(log, order, expiry, {id})
        removed = removed + 1
    end
    head.at = head.at + 2
    if head.part[head.at] then
        head.offset = head.part[head.at + 1] % RANK
    else
        table.remove(heads, first)
    end
end
if removed > 0 or changed then
    account(depth, due, log, order, ARGV[5], removed, ARGV[6])
end
return answer
