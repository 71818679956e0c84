-- Settles notifications in a user's log: each once, whoever asks, and counted off.
--
-- KEYS: depth, due, log, order, expiry
-- ARGV: name, rest_ms, then ids
-- Answer: for each id 1 if it was pending

local depth, due, log, order, expiry = unpack(KEYS)
local answer, removed = {}, 0
for each = 3, #ARGV do
    local id = ARGV[each]
    local found = redis.call('ZREM', order, id)
    if found == 1 then
        redis.call('HDEL', log, id)
        redis.call('ZREM', expiry, id)
        removed = removed + 1
    end
    answer[each - 2] = found
end
if removed > 0 then
    account(depth, due, log, order, ARGV[1], removed, ARGV[2])
end
return answer
