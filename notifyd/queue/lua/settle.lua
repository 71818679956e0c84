-- Settles notifications in a user's log: each once, whoever asks, and counted off. What the log gave
-- up and told is forgotten, where it was told to who confirmed them.
--
-- KEYS: depth, due, log, order
-- ARGV: name, rest_ms, 1 if it was, then ids
-- Answer: for each id 1 if it was pending

local depth, due, log, order = unpack(KEYS)
local answer, found, seen = {}, {}, {}
for from = 4, #ARGV, 1000 do
    local ids = {unpack(ARGV, from, math.min(from + 999, #ARGV))}
    for each, score in ipairs(redis.call('ZMSCORE', order, unpack(ids))) do
        local id = ids[each]
        answer[#answer + 1] = score and 1 or 0
        if score and not seen[id] then
            seen[id] = true
            found[#found + 1] = id
        end
    end
end
if #found > 0 then
    remove(log, order, found)
    if ARGV[3] == '1' and redis.call('HEXISTS', log, 'c') == 1
        and redis.call('HEXISTS', log, 'n') == 0 then
        redis.call('HDEL', log, 'c', 'f', 'l')
    end
    account(depth, due, log, order, ARGV[1], #found, ARGV[2])
end
return answer
