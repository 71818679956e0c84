-- Settles notifications in a user's log: each once, whoever asks, and counted off. What the log gave
-- up and told is forgotten, where it was told to who confirmed them.
--
-- KEYS: depth, due, log, order
-- ARGV: name, rest_ms, 1 if it was, then ids
-- Answer: for each id 1 if it was pending

local depth, due, log, order = unpack(KEYS)
local answer, found, seen = {}, {}, {}
local gone = 0
for from = 4, #ARGV, 1000 do
    gone = gone + redis.call('HDEL', log, unpack(ARGV, from, math.min(from + 999, #ARGV)))
end
-- As a rule all of them were pending. Which were, else, is asked of the order: to look one up there
-- takes as long as its log is.
for from = 4, #ARGV, 1000 do
    local ids = {unpack(ARGV, from, math.min(from + 999, #ARGV))}
    local scores = gone < #ARGV - 3 and redis.call('ZMSCORE', order, unpack(ids))
    for each, id in ipairs(ids) do
        local pending = not scores or scores[each]
        answer[#answer + 1] = pending and 1 or 0
        if pending and not seen[id] then
            seen[id] = true
            found[#found + 1] = id
        end
    end
end
if #found > 0 then
    local removed = 0
    for from = 1, #found, 1000 do
        local to = math.min(from + 999, #found)
        removed = removed + redis.call('ZREM', order, unpack(found, from, to))
    end
    if removed < #found then
        -- The order went by itself: what it had is counted off where that is found out (expire.lua).
        return answer
    end
    if ARGV[3] == '1' and redis.call('HEXISTS', log, 'c') == 1
        and redis.call('HEXISTS', log, 'n') == 0 then
        redis.call('HDEL', log, 'c', 'f', 'l')
    end
    account(depth, due, log, order, ARGV[1], #found, ARGV[2])
end
return answer
