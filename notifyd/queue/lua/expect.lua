-- Expects confirmations of notifications; beyond the bound the oldest notifications are let go of.
--
-- KEYS: stats, order, due
-- ARGV: now or '', timeout, keep (ms), max_pending, what the keys of records and of pendings begin
--       with; then for each notification sent | queued | anyone, member, how many recipients, and
--       u<user> for each of them
-- Answer: how many were let go of without having confirmed
-- The keys of notifications have the tag of those in KEYS.

stats, order, due = unpack(KEYS)
now, timeout, keep, max_size = time(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
records, pendings = ARGV[5], ARGV[6]
sent_now = string.format('p%.0f', now)

local at = 7
while at <= #ARGV do
    local last = at + 2 + tonumber(ARGV[at + 2])
    expect(ARGV[at], ARGV[at + 1], at + 3, last)
    at = last + 1
end
return account_for_expected()
