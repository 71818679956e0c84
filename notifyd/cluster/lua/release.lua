-- Gives a lease up, if it is the asker's: never another's.
--
-- KEYS: lease, as lease.lua has it
-- ARGV: who asks
-- Answer: 1 if it was his

local known = redis.call('GET', KEYS[1])
if not known or string.match(known, '^%d+ (.*)$') ~= ARGV[1] then
    return 0
end
redis.call('SET', KEYS[1], '0 ' .. ARGV[1])
return 1
