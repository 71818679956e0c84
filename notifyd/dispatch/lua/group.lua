-- Makes the consumer group, from the stream's beginning, and the stream too, where they are missing.
--
-- KEYS: stream
-- ARGV: group

local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then
    return redis.error_reply(made.err)
end
return 1
