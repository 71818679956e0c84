-- A page of a user's pending entries in the order of their offsets, without those that have expired;
-- the first page also tells what the log gave up. It is forgotten when something is settled after
-- that (settle.lua), or at once where there is nothing to settle.
--
-- KEYS: depth, due, log, order
-- ARGV: now or '', after (offset), max_bytes, name, rest_ms
-- Answer: entries that had expired, overflow's count, first and last (0: none), 1 if more follow,
--         then offset, id and entry of each

local depth, due, log, order = unpack(KEYS)
local now, after, max_bytes = time(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local answer = {0, 0, 0, 0, 0}
local forgot = false

if after == 0 then
    local overflow = redis.call('HMGET', log, 'c', 'f', 'l')
    if overflow[1] then
        for each = 1, 3 do
            answer[each + 1] = tonumber(overflow[each])
        end
        -- Only what deletes: a Redis that is full refuses all else.
        redis.call('HDEL', log, 'n')
    end
end

-- Each rank's part of the order goes by offset; merged they are the log. Entries are fetched some at a
-- time: few at first, for large ones soon fill a page.
local PART = 100
local FEW, MANY = 4, 32
local heads = {}

local function part_of(rank, behind)
    local from = string.format('(%.0f', rank * RANK + behind)
    local to = string.format('(%.0f', (rank + 1) * RANK)
    return redis.call('ZRANGEBYSCORE', order, from, to, 'WITHSCORES', 'LIMIT', 0, PART)
end

local function look_at(head, part)
    head.part, head.at, head.offset = part, 1, part[2] % RANK
    head.entries, head.fetched = {}, 0
end

local function entry_at(head)
    local number = (head.at + 1) / 2
    if number > head.fetched then
        local ids = {}
        for each = head.at, math.min(head.at + 2 * head.fetch, #head.part) - 1, 2 do
            ids[#ids + 1] = head.part[each]
        end
        for each, entry in ipairs(redis.call('HMGET', log, unpack(ids))) do
            head.entries[head.fetched + each] = entry
        end
        head.fetched = head.fetched + #ids
        head.fetch = math.min(2 * head.fetch, MANY)
    end
    return head.entries[number]
end

for rank = 0, 3 do
    local part = part_of(rank, after)
    if #part > 0 then
        local head = {rank = rank, fetch = FEW}
        look_at(head, part)
        heads[#heads + 1] = head
    end
end

local function step(which)
    local head = heads[which]
    head.at = head.at + 2
    if head.part[head.at] then
        head.offset = head.part[head.at + 1] % RANK
        return
    end
    local part = #head.part == 2 * PART and part_of(head.rank, head.offset) or {}
    if #part > 0 then
        look_at(head, part)
    else
        table.remove(heads, which)
    end
end

local bytes, dead, vanished = 0, {}, 0
while #heads > 0 do
    local which = 1
    for each = 2, #heads do
        if heads[each].offset < heads[which].offset then
            which = each
        end
    end
    local head = heads[which]
    local id = head.part[head.at]
    local entry = entry_at(head)
    if not entry or expires_at(entry) <= now then
        dead[#dead + 1] = id
        if not entry then
            vanished = vanished + 1
        end
    else
        local size = tonumber(string.sub(entry, 14, 21)) or #entry
        if #answer > 5 and bytes + size > max_bytes then
            answer[5] = 1
            break
        end
        bytes = bytes + size
        local last = #answer
        answer[last + 1], answer[last + 2], answer[last + 3] = head.offset, id, entry
    end
    step(which)
end
remove(log, order, dead)
if #answer == 5 and answer[2] > 0 then
    redis.call('HDEL', log, 'c', 'f', 'l')
    forgot = true
end
answer[1] = #dead - vanished
if #dead > 0 or forgot then
    account(depth, due, log, order, ARGV[4], #dead, ARGV[5])
end
return answer
