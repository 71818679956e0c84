-- Keeps a tenant's limits, and with them the version of all limits, which tells nodes to read them.
--
-- KEYS: limits (hash: a tenant's, and under the empty name, which is no tenant's, the version)
-- ARGV: tenant, its limits, how many tenants there may be, the version from now on
-- Answer: 'ok' or 'full'
--
-- A version is drawn, not counted: where Redis lost some (a flush, a failover), a count would come to
-- those again that nodes know, with other limits.

local limits = KEYS[1]
-- First, so that the version's own field is always among those that are counted.
redis.call('HSET', limits, '', ARGV[4])
if redis.call('HEXISTS', limits, ARGV[1]) == 0 and redis.call('HLEN', limits) > tonumber(ARGV[3]) then
    return 'full'
end
redis.call('HSET', limits, ARGV[1], ARGV[2])
return 'ok'
