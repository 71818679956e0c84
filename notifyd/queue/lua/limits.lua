-- Keeps a tenant's limits, and with them the version of all limits, which tells nodes to read them.
--
-- KEYS: limits (hash: a tenant's, and under the empty name, which is no tenant's, the version)
-- ARGV: tenant, its limits, how many tenants there may be
-- Answer: 'ok' or 'full'

local limits = KEYS[1]
-- First, so that the version's own field is always among those that are counted.
redis.call('HINCRBY', limits, '', 1)
if redis.call('HEXISTS', limits, ARGV[1]) == 0 and redis.call('HLEN', limits) > tonumber(ARGV[3]) then
    return 'full'
end
redis.call('HSET', limits, ARGV[1], ARGV[2])
return 'ok'
