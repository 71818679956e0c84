-- Keeps when a user's tokens were revoked. Where these are too many, the oldest tenth of the tenant
-- with the most becomes one time for all of that tenant: no revoked token gets in by it, and no
-- tenant makes others lose theirs.
--
-- KEYS: revoked (sorted set: tenant, NUL and user, or no user for all of the tenant; by Unix seconds)
-- ARGV: tenant, user, time, at most so many
-- Answer: how many there are

local revoked = KEYS[1]
redis.call('ZADD', revoked, 'GT', ARGV[3], ARGV[1] .. '\0' .. ARGV[2])
local count = redis.call('ZCARD', revoked)
if count <= tonumber(ARGV[4]) then
    return count
end
local all = redis.call('ZRANGE', revoked, 0, -1, 'WITHSCORES')
local counts, most = {}, nil
for each = 1, #all, 2 do
    local tenant, user = string.match(all[each], '^(%Z*)%z(.*)$')
    if user ~= '' then
        counts[tenant] = (counts[tenant] or 0) + 1
        if not most or counts[tenant] > counts[most] then
            most = tenant
        end
    end
end
local left = most and math.max(1, math.floor(counts[most] / 10)) or 0
local time
for each = 1, #all, 2 do
    if left == 0 then
        break
    end
    local tenant, user = string.match(all[each], '^(%Z*)%z(.*)$')
    if tenant == most and user ~= '' then
        redis.call('ZREM', revoked, all[each])
        time = all[each + 1]
        left = left - 1
    end
end
if time then
    redis.call('ZADD', revoked, 'GT', time, most .. '\0')
end
return redis.call('ZCARD', revoked)
