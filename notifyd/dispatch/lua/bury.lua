-- Makes a dead letter of an entry and acknowledges it, both or neither, and once.
--
-- KEYS: stream, dead letters
-- ARGV: group, entry, how many dead letters are kept, reason, attempts, then the entry's fields
-- Answer: 1 if it is one now, 0 if it was acknowledged before

local stream, group, entry = KEYS[1], ARGV[1], ARGV[2]
if #redis.call('XPENDING', stream, group, entry, entry, 1) == 0 then
    return 0
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'reason', ARGV[4], 'entry', entry,
    'attempts', ARGV[5], unpack(ARGV, 6))
redis.call('XACK', stream, group, entry)
return 1
