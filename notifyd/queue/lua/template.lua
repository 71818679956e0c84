-- Changes one of a tenant's templates, and with it how many there are and when it was made.
--
-- KEYS: templates (hash: t<id> the template, c<id> when it was created)
-- ARGV: create | replace | delete, id, the template, when it was created, how many there may be
-- Answer: 'ok', or for replace when it was created; else 'missing', 'taken' or 'full'

local templates = KEYS[1]
local what, body, created = ARGV[1], 't' .. ARGV[2], 'c' .. ARGV[2]
local known = redis.call('HEXISTS', templates, body) == 1
if what == 'create' then
    if known then
        return 'taken'
    end
    if redis.call('HLEN', templates) >= 2 * ARGV[5] then
        return 'full'
    end
    redis.call('HSET', templates, body, ARGV[3], created, ARGV[4])
    return 'ok'
end
if not known then
    return 'missing'
end
if what == 'replace' then
    redis.call('HSET', templates, body, ARGV[3])
    return redis.call('HGET', templates, created) or ARGV[4]
end
redis.call('HDEL', templates, body, created)
return 'ok'
