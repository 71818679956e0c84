-- Forgets a user's log, all but its epoch and how far its offsets were.
--
-- KEYS: depth, due, log, order
-- ARGV: name, rest_ms
-- Answer: how many entries were pending

local depth, due, log, order = unpack(KEYS)
local pending = redis.call('ZCARD', order)
local known = redis.call('HMGET', log, 'o', 'e')
redis.call('UNLINK', log, order)
if known[1] and known[2] then
    redis.call('HSET', log, 'o', known[1], 'e', known[2])
end
account(depth, due, log, order, ARGV[1], pending, ARGV[2])
return pending
