-- Takes a token out of a bucket, if there is one: reading, filling up and taking are one step, so that
-- nodes that share the bucket share its budget. The formula is that of bucket.py.
--
-- KEYS: the bucket, a hash of units and at (milliseconds); none is a full one.
-- ARGV: count, period, burst, and the time in milliseconds where it is not Redis's own.
-- Gives: 1 where a token was taken, the units that are left, the time.

local count, period, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = tonumber(ARGV[4])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local full = burst * period
local units, back = full, false
local kept = redis.call('HMGET', KEYS[1], 'units', 'at')
if kept[1] then
  units = tonumber(kept[1])
  local passed = now - tonumber(kept[2])
  if passed * count >= full - units then
    units = full
  elseif passed > 0 then
    units = units + passed * count
  end
  back = passed < 0
end

local allowed = 0
if units >= period then
  allowed = 1
  units = units - period
end
if allowed == 1 or back then
  -- Where nothing was taken, what is kept tells the same.
  redis.call('HSET', KEYS[1], 'units', string.format('%.0f', units), 'at', string.format('%.0f', now))
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((full - units) / count) + 1000))
end
return {allowed, units, now}
