-- Put in front of the scripts that expect confirmations, behind ledger.lua: `expect` for each
-- notification, then once `account_for_expected`. They set these first.
local stats, order, due, now, timeout, keep, max_size, records, pendings, sent_now

local size, waiting, known_before = 0, 0, false
-- Scores and members for what all notifications share, each written once.
local ordered, late = {}, {}
local PART = 500

-- Notes that it is sent to its lone recipient, where he is known: as a rule it was queued for him, or
-- comes again. Then nothing else is to be looked at.
local function sent_to_only_known(record, user, state)
    if not state or #state == 1 then
        return false
    end
    local letter = string.sub(state, 1, 1)
    if letter ~= 'a' and letter ~= 't' then
        redis.call('HSET', record, user, sent_now)
        if letter ~= 'p' then
            waiting = waiting + 1
        end
    end
    return true
end

-- `kind`: sent | queued | anyone; from the first to the last of ARGV are its recipients, u<user>.
local function expect(kind, member, first, last)
    local record = records .. member
    local only_sent = kind == 'sent' and first == last
    -- One more of a page that is replayed: only what he is to it need be looked at.
    local noted = only_sent and known_before
        and sent_to_only_known(record, ARGV[first], redis.call('HGET', record, ARGV[first]))
    local known
    if not noted then
        known = redis.call('HMGET', record, 's', 'n',
            unpack(ARGV, first, math.min(first + PART - 1, last)))
        noted = only_sent and sent_to_only_known(record, ARGV[first], known[3])
        known_before = noted
    end
    if not noted then
        local pending = pendings .. member
        local before = 2
        local new, changes = not known[1], {}
        local only = new and first == last
        if new then
            changes = {'s', now}
            if only then
                changes = {'s', now, 'o', ARGV[first]}
                size = size - 1
            elseif kind == 'anyone' then
                changes = {'s', now, 'n', 0}
                size = size - 1
            end
            ordered[#ordered + 1] = now
            ordered[#ordered + 1] = member
        end
        -- What anybody may ack expects nobody in particular later either.
        if known[2] then
            last = first - 1
        end
        local from = first
        while from <= last or #changes > 0 do
            local to = math.min(from + PART - 1, last)
            local scores, returned = {}, {}
            for each = from, to do
                local user, state = ARGV[each], known[each - from + 1 + before] or ''
                local letter = string.sub(state, 1, 1)
                local alone = only or #state > 1
                if kind == 'queued' then
                    if letter == '' or letter == 'p' then
                        changes[#changes + 1] = user
                        changes[#changes + 1] = alone and 'q1' or 'q'
                        if letter == 'p' and alone then
                            waiting = waiting - 1
                        elseif letter == 'p' then
                            returned[#returned + 1] = user
                        end
                    end
                elseif letter ~= 'a' and letter ~= 't' then
                    changes[#changes + 1] = user
                    if alone then
                        changes[#changes + 1] = sent_now
                        waiting = waiting + (letter == 'p' and 0 or 1)
                    else
                        changes[#changes + 1] = 'p'
                        scores[#scores + 1] = now
                        scores[#scores + 1] = user
                    end
                end
            end
            if #changes > 0 then
                size = size + redis.call('HSET', record, unpack(changes))
                changes = {}
            end
            if #returned > 0 then
                waiting = waiting - redis.call('ZREM', pending, unpack(returned))
            end
            if #scores > 0 then
                local added = redis.call('ZADD', pending, unpack(scores))
                if added > 0 then
                    waiting = waiting + added
                    redis.call('PEXPIRE', pending, keep)
                end
            end
            from = to + 1
            if from <= last then
                known = redis.call('HMGET', record, unpack(ARGV, from, math.min(from + PART - 1, last)))
                before = 0
            end
        end
        if new then
            -- It is let go of so long after it was sent first; nothing prolongs that.
            redis.call('PEXPIRE', record, keep)
        end
    end
    if kind == 'sent' and last >= first then
        late[#late + 1] = now + timeout
        late[#late + 1] = member
    end
end

-- Writes what all of them share; beyond the bound the oldest notifications are let go of: how many
-- recipients had not confirmed.
local function account_for_expected()
    if #ordered > 0 then
        redis.call('ZADD', order, unpack(ordered))
    end
    if #late > 0 then
        redis.call('ZADD', due, 'LT', unpack(late))
    end
    count(stats, 'pending', waiting)
    for _, key in ipairs(KEYS) do
        redis.call('PEXPIRE', key, keep)
    end
    if size == 0 then
        return 0
    end
    local over = redis.call('HINCRBY', stats, 'size', size) - max_size
    local never = 0
    while over > 0 do
        local oldest = redis.call('ZRANGE', order, 0, 0)[1]
        if not oldest then
            -- Nothing is left to be counted: records went by themselves.
            redis.call('HSET', stats, 'size', 0, 'pending', 0)
            break
        end
        never = never + let_go(stats, order, due, records, pendings, oldest)
        over = tonumber(redis.call('HGET', stats, 'size')) - max_size
    end
    return never
end
