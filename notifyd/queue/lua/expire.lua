-- Drops what has expired from a user's log, and notes when the next of his entries will.
--
-- KEYS: depth, due, log, order
-- ARGV: now or '', name, rest_ms
-- Answer: how many entries; 1 if the log went by itself, so that depth is to be counted anew

local depth, due, log, order = unpack(KEYS)
local now, member = time(ARGV[1]), ARGV[2]
local vanished = redis.call('EXISTS', order) == 0 and redis.call('ZSCORE', due, member)
local dropped, first = drop_expired(log, order, now)
-- Where nothing that is left says when it expires, he must not stay the first who is due.
redis.call('ZADD', due, first < math.huge and first or now + ARGV[3], member)
account(depth, due, log, order, member, dropped, ARGV[3])
return {dropped, vanished and 1 or 0}
