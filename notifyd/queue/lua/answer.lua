-- Ends a claim: keeps its answer, or frees the key. Nothing where the lease ran out and another works.
--
-- KEYS: key, as claim.lua has it
-- ARGV: now or '' (ms), who, fingerprint, window (ms), then status and body of an answer to keep
-- Answer: 1 if it was his

local key = KEYS[1]
local holder = redis.call('HGET', key, 'w')
if holder ~= ARGV[2] and redis.call('EXISTS', key) == 1 then
    return 0
end
redis.call('DEL', key)
if ARGV[5] then
    local now
    if ARGV[1] ~= '' then
        now = tonumber(ARGV[1])
    else
        local time = redis.call('TIME')
        now = time[1] * 1000 + math.floor(time[2] / 1000)
    end
    redis.call('HSET', key, 'f', ARGV[3], 'u', now + ARGV[4], 's', ARGV[5], 'b', ARGV[6])
    redis.call('PEXPIRE', key, ARGV[4])
end
return 1
