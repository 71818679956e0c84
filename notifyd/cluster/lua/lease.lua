-- Takes a lease that nobody holds, or renews it. What is written of it stays when it has lapsed or
-- was given up; where nothing is, Redis has forgotten it, and nobody gets it for as long as somebody
-- may still believe that he has it, but for him.
--
-- KEYS: lease (text: when it lapses (ms), who has it; nobody's name is empty)
-- ARGV: who asks, time to live (ms), 1 if by his own clock he has it, or nobody else ever may
-- Answer: 0 he holds it, else in how many ms it lapses

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lapses, holder = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (.*)$')
if not lapses then
    lapses, holder = now + ARGV[2], ''
    redis.call('SET', KEYS[1], string.format('%.0f ', lapses))
end
lapses = tonumber(lapses)
if lapses > now + ARGV[2] then
    -- Only where this clock was set back, as a replica's may be behind.
    lapses = now + ARGV[2]
    redis.call('SET', KEYS[1], string.format('%.0f %s', lapses, holder))
end
local his = holder == ARGV[1] or (holder == '' and ARGV[3] == '1')
if not his and lapses > now then
    return lapses - now
end
redis.call('SET', KEYS[1], string.format('%.0f %s', now + ARGV[2], ARGV[1]))
return 0
