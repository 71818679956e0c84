-- Gives an idempotency key to one caller, until he answers or his lease runs out.
--
-- KEYS: key (hash: f fingerprint, u until when it holds (ms), w who works; or s status and b body of
--       his answer)
-- ARGV: now or '' (ms), fingerprint, who, lease (ms), 1 if whoever else has it is dead
-- Answer: 'fresh', 'wait', 'other' (another body), or status and body

local key = KEYS[1]
local now
if ARGV[1] ~= '' then
    now = tonumber(ARGV[1])
else
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local known = redis.call('HMGET', key, 'f', 'u', 's', 'b')
if known[1] and known[2] and tonumber(known[2]) > now then
    if known[1] ~= ARGV[2] then
        return {'other'}
    end
    if known[3] then
        return {known[3], known[4]}
    end
    if ARGV[5] ~= '1' then
        return {'wait'}
    end
end
redis.call('DEL', key)
redis.call('HSET', key, 'f', ARGV[2], 'u', now + ARGV[4], 'w', ARGV[3])
redis.call('PEXPIRE', key, ARGV[4])
return {'fresh'}
