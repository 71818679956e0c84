-- Moves entries that cannot be read out of a user's log, where they would come up at every replay.
--
-- KEYS: depth, due, log, order, corrupt (a list, the latest first)
-- ARGV: name, rest_ms, how long they are kept (ms), how many of a bucket, then ids

local depth, due, log, order, corrupt = unpack(KEYS)
local removed = 0
for each = 5, #ARGV do
    local id = ARGV[each]
    local entry = redis.call('HGET', log, id)
    if redis.call('ZREM', order, id) == 1 then
        redis.call('HDEL', log, id)
        removed = removed + 1
        redis.call('LPUSH', corrupt, ARGV[1] .. ' ' .. id .. ' ' .. (entry or ''))
    end
end
if removed > 0 then
    redis.call('LTRIM', corrupt, 0, ARGV[4] - 1)
    redis.call('PEXPIRE', corrupt, ARGV[3])
    account(depth, due, log, order, ARGV[1], removed, ARGV[2])
end
return removed
