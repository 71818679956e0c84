-- Adds to what tenants have sent in a day and in its month, all of it or nothing.
--
-- KEYS: the day's counts, the month's (hashes: <tenant>|n notifications, <tenant>|d deliveries)
-- ARGV: seconds to keep the day's, the month's, then for each tenant its name, n, d
-- Answer: 'ok'

for place, counts in ipairs(KEYS) do
    for i = 3, #ARGV, 3 do
        redis.call('HINCRBY', counts, ARGV[i] .. '|n', ARGV[i + 1])
        redis.call('HINCRBY', counts, ARGV[i] .. '|d', ARGV[i + 2])
    end
    redis.call('EXPIRE', counts, ARGV[place])
end
return 'ok'
