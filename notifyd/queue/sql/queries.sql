-- What notifyd/queue/postgres/ says to PostgreSQL, by name. Below each name stands what it keeps
-- true. Every query runs in a transaction; locks are taken on logs in the order of their names, on
-- records of the ledger in that of theirs, on rows of totals last and one only, so that no two
-- transactions can wait for each other.

-- name: lock_logs
-- Takes offsets for new entries of many users and counts them as pending; whoever holds a log's row
-- is alone with the log until he commits, so that offsets become visible in their order. A log that
-- begins (again) begins above all it ever had: at the clock's milliseconds.
INSERT INTO notifyd_logs AS log
    (tenant, user_id, epoch, next_offset, pending, expires_first, touched_at)
SELECT tenant, user_id, $5, $6::bigint + added, added, expires_first, $7
FROM unnest($1::text[], $2::text[], $3::integer[], $4::float8[])
    AS wanted (tenant, user_id, added, expires_first)
ORDER BY tenant COLLATE "C", user_id COLLATE "C"
ON CONFLICT (tenant, user_id) DO UPDATE SET
    next_offset = log.next_offset + EXCLUDED.pending,
    pending = log.pending + EXCLUDED.pending,
    expires_first = least(log.expires_first, EXCLUDED.expires_first),
    touched_at = EXCLUDED.touched_at
RETURNING id, tenant, user_id, next_offset, pending, expires_first,
    (SELECT sum(pending)::bigint FROM notifyd_log_totals) AS depth

-- name: insert_entries
-- Stores entries of many users and notifications, each notification's bytes sent once, and brings
-- the total up to date; what is pending already is left out and not counted.
WITH stored AS (
    INSERT INTO notifyd_entries
        (log_id, entry_offset, notification_id, priority, page_bytes, expires_at, body)
    SELECT log_id, entry_offset, id, priority, page_bytes, expires_at, body
    FROM unnest($1::bigint[], $2::bigint[], $3::bigint[])
        AS entry (log_id, entry_offset, number)
    JOIN unnest($4::uuid[], $5::smallint[], $6::integer[], $7::float8[], $8::bytea[])
        WITH ORDINALITY AS notification (id, priority, page_bytes, expires_at, body, number)
        USING (number)
    ON CONFLICT (log_id, notification_id) WHERE corrupt IS NULL DO NOTHING
    RETURNING 1
), counted AS (
    UPDATE notifyd_log_totals
    SET pending = pending + (SELECT count(*) FROM stored) - $9::bigint
    WHERE shard = $10
)
SELECT count(*) FROM stored

-- name: recount_logs
-- Where something was left out, the logs' own counts are made true again. Their rows are locked.
UPDATE notifyd_logs AS log
SET pending = (
    SELECT count(*) FROM notifyd_entries AS entry
    WHERE entry.log_id = log.id AND entry.corrupt IS NULL
)
WHERE id = ANY ($1::bigint[])

-- name: find_pending
-- Which of these notifications are pending in these logs already.
SELECT log_id, notification_id
FROM unnest($1::bigint[], $2::uuid[]) AS wanted (log_id, notification_id)
JOIN notifyd_entries USING (log_id, notification_id)
WHERE corrupt IS NULL

-- name: drop_dead
-- In full logs, what has expired makes room before what is alive; returns how many of each log.
WITH gone AS (
    DELETE FROM notifyd_entries
    WHERE log_id = ANY ($1::bigint[]) AND expires_at <= $2 AND corrupt IS NULL
    RETURNING log_id
)
SELECT log_id, count(*) AS count FROM gone GROUP BY log_id

-- name: drop_stale
-- What is to be stored and is there already, but dead, is no reason not to store it; returns how
-- many of each log went.
WITH gone AS (
    DELETE FROM notifyd_entries AS entry
    USING unnest($1::bigint[], $2::uuid[]) AS wanted (log_id, notification_id)
    WHERE entry.log_id = wanted.log_id AND entry.notification_id = wanted.notification_id
        AND entry.corrupt IS NULL AND entry.expires_at <= $3
    RETURNING entry.log_id
), counted AS (
    SELECT log_id, count(*) AS count FROM gone GROUP BY log_id
), told AS (
    UPDATE notifyd_logs AS log
    SET pending = log.pending - counted.count
    FROM counted
    WHERE log.id = counted.log_id
)
SELECT log_id, count FROM counted

-- name: find_least
-- What full logs would give up first: lowest priority, of that the oldest; as many as are new.
SELECT wanted.log_id, least_of.priority, least_of.entry_offset
FROM unnest($1::bigint[], $2::integer[]) AS wanted (log_id, added)
CROSS JOIN LATERAL (
    SELECT priority, entry_offset
    FROM notifyd_entries AS entry
    WHERE entry.log_id = wanted.log_id AND corrupt IS NULL
    ORDER BY entry.log_id, priority, entry_offset
    LIMIT wanted.added
) AS least_of

-- name: give_up
-- Deletes what full logs gave up.
DELETE FROM notifyd_entries AS entry
USING unnest($1::bigint[], $2::bigint[]) AS wanted (log_id, entry_offset)
WHERE entry.log_id = wanted.log_id AND entry.entry_offset = wanted.entry_offset

-- name: update_full_logs
-- Notes what full logs hold now, and what they gave up, which nobody was told yet.
UPDATE notifyd_logs AS log SET
    pending = wanted.pending,
    overflow_count = log.overflow_count + wanted.given_up,
    overflow_first = CASE
        WHEN wanted.given_up = 0 THEN log.overflow_first
        WHEN log.overflow_count = 0 THEN wanted.first
        ELSE least(log.overflow_first, wanted.first)
    END,
    overflow_last = CASE
        WHEN wanted.given_up = 0 THEN log.overflow_last
        WHEN log.overflow_count = 0 THEN wanted.last
        ELSE greatest(log.overflow_last, wanted.last)
    END,
    overflow_told = log.overflow_told AND wanted.given_up = 0,
    expires_first = CASE
        WHEN NOT wanted.looked_through THEN log.expires_first
        ELSE least(wanted.expires_first, (
            SELECT min(expires_at) FROM notifyd_entries AS entry
            WHERE entry.log_id = log.id AND entry.corrupt IS NULL
        ))
    END
FROM unnest(
    $1::bigint[], $2::integer[], $3::integer[], $4::bigint[], $5::bigint[], $6::boolean[],
    $7::float8[]
) AS wanted (log_id, pending, given_up, first, last, looked_through, expires_first)
WHERE log.id = wanted.log_id

-- name: lock_known_logs
-- Locks the logs of these users that there are, to take something out of them.
SELECT log.id, log.tenant, log.user_id
FROM notifyd_logs AS log
JOIN unnest($1::text[], $2::text[]) AS wanted (tenant, user_id) USING (tenant, user_id)
ORDER BY log.tenant, log.user_id
FOR UPDATE OF log

-- name: settle
-- Takes what was confirmed out of locked logs, once, and off their counts; returns what was there.
-- What a log gave up and told is forgotten, where it was told to who confirmed it.
WITH gone AS (
    DELETE FROM notifyd_entries AS entry
    USING unnest($1::bigint[], $2::uuid[]) AS wanted (log_id, notification_id)
    WHERE entry.log_id = wanted.log_id
        AND entry.notification_id = wanted.notification_id
        AND entry.corrupt IS NULL
    RETURNING entry.log_id, entry.notification_id
), logs AS (
    UPDATE notifyd_logs AS log SET
        pending = log.pending - counted.count,
        overflow_count = CASE
            WHEN log.overflow_told AND log.id = ANY ($4::bigint[]) THEN 0
            ELSE log.overflow_count
        END
    FROM (SELECT log_id, count(*) AS count FROM gone GROUP BY log_id) AS counted
    WHERE log.id = counted.log_id
), total AS (
    UPDATE notifyd_log_totals
    SET pending = pending - (SELECT count(*) FROM gone)
    WHERE shard = $3 AND EXISTS (SELECT FROM gone)
)
SELECT log_id, notification_id FROM gone

-- name: erase
-- Deletes locked logs with all their entries; returns how many were pending, of each.
WITH gone AS (
    DELETE FROM notifyd_entries WHERE log_id = ANY ($1::bigint[])
    RETURNING log_id, corrupt
), counted AS (
    SELECT log_id, count(*) FILTER (WHERE corrupt IS NULL) AS count FROM gone GROUP BY log_id
), logs AS (
    DELETE FROM notifyd_logs WHERE id = ANY ($1::bigint[])
), total AS (
    UPDATE notifyd_log_totals
    SET pending = pending - (SELECT coalesce(sum(count), 0) FROM counted)
    WHERE shard = $2
)
SELECT log_id, count FROM counted

-- name: read_pages
-- Pages of many users' pending entries, in order from behind a cursor: the first, and those that
-- follow as long as they fit; the last of a page says whether more follow. As every entry counts
-- 256 bytes at least, no more rows are looked at than can fit, and one. A log without entries that
-- fit has one row without an entry.
SELECT wanted.number, log.id, log.overflow_count, page.entry_offset, page.body, page.follows
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
    WITH ORDINALITY AS wanted (tenant, user_id, after, max_bytes, number)
JOIN notifyd_logs AS log ON log.tenant = wanted.tenant AND log.user_id = wanted.user_id
LEFT JOIN LATERAL (
    SELECT entry_offset, body,
        sum(page_bytes) OVER in_order AS bytes,
        row_number() OVER in_order AS number,
        lead(entry_offset) OVER in_order IS NOT NULL AS follows
    FROM (
        SELECT entry_offset, body, page_bytes
        FROM notifyd_entries AS entry
        WHERE entry.log_id = log.id AND entry_offset > wanted.after
            AND expires_at > $5 AND corrupt IS NULL
        ORDER BY entry.log_id, entry_offset
        LIMIT wanted.max_bytes / 256 + 2
    ) AS candidate
    WINDOW in_order AS (ORDER BY entry_offset)
) AS page ON page.bytes <= wanted.max_bytes OR page.number = 1
ORDER BY wanted.number, page.entry_offset

-- name: tell_overflow
-- Notes that these locked logs tell what they gave up, and returns it; those without an entry, which
-- nobody can settle, forget it.
UPDATE notifyd_logs AS log
SET overflow_told = true, overflow_count = CASE WHEN told.empty THEN 0 ELSE told.count END
FROM (
    SELECT id, empty, overflow_count AS count, overflow_first AS first, overflow_last AS last
    FROM unnest($1::bigint[], $2::boolean[]) AS wanted (id, empty)
    JOIN notifyd_logs USING (id)
    WHERE overflow_count > 0
) AS told
WHERE log.id = told.id
RETURNING told.id, told.count, told.first, told.last

-- name: set_aside
-- Entries of locked logs that cannot be read are pending no more, and kept with the reason.
WITH aside AS (
    UPDATE notifyd_entries AS entry
    SET corrupt = wanted.reason
    FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS wanted (log_id, entry_offset, reason)
    WHERE entry.log_id = wanted.log_id AND entry.entry_offset = wanted.entry_offset
        AND entry.corrupt IS NULL
    RETURNING entry.log_id
), logs AS (
    UPDATE notifyd_logs AS log
    SET pending = log.pending - counted.count
    FROM (SELECT log_id, count(*) AS count FROM aside GROUP BY log_id) AS counted
    WHERE log.id = counted.log_id
)
UPDATE notifyd_log_totals
SET pending = pending - (SELECT count(*) FROM aside)
WHERE shard = $4

-- name: find_expired
-- Some entries whose time is up, the earliest first, and their logs.
SELECT log_id, entry_offset FROM notifyd_entries
WHERE expires_at <= $1
ORDER BY expires_at
LIMIT $2

-- name: lock_free_logs
-- Locks those of these logs that nobody is at work on; the others come another time.
SELECT id FROM notifyd_logs
WHERE id = ANY ($1::bigint[])
ORDER BY tenant, user_id
FOR UPDATE SKIP LOCKED

-- name: delete_expired
-- Deletes expired entries of locked logs, and takes them off the counts; returns how many of them
-- were pending, and how many there were. IS TRUE: found by their key, and not among all that have
-- expired, who may be a thousand times as many.
WITH gone AS (
    DELETE FROM notifyd_entries AS entry
    USING unnest($1::bigint[], $2::bigint[]) AS wanted (log_id, entry_offset)
    WHERE entry.log_id = wanted.log_id AND entry.entry_offset = wanted.entry_offset
        AND (entry.expires_at <= $3) IS TRUE
    RETURNING entry.log_id, entry.corrupt
), counted AS (
    SELECT log_id, count(*) FILTER (WHERE corrupt IS NULL) AS count FROM gone GROUP BY log_id
), logs AS (
    UPDATE notifyd_logs AS log
    SET pending = log.pending - counted.count
    FROM counted
    WHERE log.id = counted.log_id
), total AS (
    UPDATE notifyd_log_totals
    SET pending = pending - (SELECT coalesce(sum(count), 0) FROM counted)
    WHERE shard = $4
)
SELECT count(*) FILTER (WHERE corrupt IS NULL) AS pending, count(*) AS rows FROM gone

-- name: forget_logs
-- Looks through some logs from behind an id, and forgets those that have been empty for long, with
-- nothing left to tell, nor an entry that was set aside, which the sweep finds by its log; returns
-- where to go on, null at the end.
WITH part AS (
    SELECT id, pending, overflow_count, touched_at FROM notifyd_logs
    WHERE id > $1
    ORDER BY id
    LIMIT $2
), empty AS (
    SELECT id FROM notifyd_logs
    WHERE id IN (
        SELECT id FROM part WHERE pending = 0 AND overflow_count = 0 AND touched_at <= $3
    )
    ORDER BY tenant, user_id
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM notifyd_logs AS log
    WHERE id IN (SELECT id FROM empty) AND pending = 0 AND overflow_count = 0
        AND NOT EXISTS (SELECT FROM notifyd_entries AS entry WHERE entry.log_id = log.id)
)
SELECT CASE WHEN count(*) = $2 THEN max(id) END FROM part

-- name: depth
-- Pending entries of all users.
SELECT sum(pending)::bigint FROM notifyd_log_totals

-- name: lock_records
-- Makes records of the ledger, or finds them, and locks them; new ones are `fresh`. `recipients`
-- counts all that are expected, and is corrected where some were before.
INSERT INTO notifyd_ack_records AS record (tenant, notification_id, sent_at, anyone, recipients)
SELECT tenant, notification_id, sent_at, anyone, recipients
FROM unnest($1::text[], $2::uuid[], $3::float8[], $4::boolean[], $5::integer[])
    AS wanted (tenant, notification_id, sent_at, anyone, recipients)
ORDER BY tenant COLLATE "C", notification_id
ON CONFLICT (tenant, notification_id) DO UPDATE SET
    recipients = record.recipients + CASE WHEN record.anyone THEN 0 ELSE EXCLUDED.recipients END
RETURNING id, tenant, notification_id, anyone, xmax = 0 AS fresh

-- name: find_acks
-- What the ledger knows of these recipients.
SELECT record_id, user_id, state, sent_at, by_ack
FROM unnest($1::bigint[], $2::text[]) AS wanted (record_id, user_id)
JOIN notifyd_acks USING (record_id, user_id)

-- name: put_acks
-- Expects these recipients of locked records: pending since `sent_at`, or queued.
INSERT INTO notifyd_acks (record_id, user_id, state, sent_at)
SELECT record_id, user_id, state, sent_at
FROM unnest($1::bigint[], $2::text[], $3::smallint[], $4::float8[])
    AS wanted (record_id, user_id, state, sent_at)
ON CONFLICT (record_id, user_id) DO UPDATE SET
    state = EXCLUDED.state,
    sent_at = EXCLUDED.sent_at

-- name: correct_recipients
-- Takes those that were expected before off the count of a record.
UPDATE notifyd_ack_records AS record
SET recipients = record.recipients - wanted.known
FROM unnest($1::bigint[], $2::integer[]) AS wanted (record_id, known)
WHERE record.id = wanted.record_id

-- name: lock_known_records
-- Locks those of these records that there are, to note confirmations.
SELECT record.id, record.tenant, record.notification_id, record.sent_at, record.anyone
FROM notifyd_ack_records AS record
JOIN unnest($1::text[], $2::uuid[]) AS wanted (tenant, notification_id)
    USING (tenant, notification_id)
ORDER BY record.tenant, record.notification_id
FOR UPDATE OF record

-- name: confirm_acks
-- Notes who of the recipients of locked records confirmed.
UPDATE notifyd_acks AS ack
SET state = 2, confirmed_at = wanted.confirmed_at, by_ack = wanted.by_ack
FROM unnest($1::bigint[], $2::text[], $3::float8[], $4::boolean[])
    AS wanted (record_id, user_id, confirmed_at, by_ack)
WHERE ack.record_id = wanted.record_id AND ack.user_id = wanted.user_id

-- name: count_anyones_acks
-- Counts acks of notifications that expect nobody in particular.
UPDATE notifyd_ack_records AS record
SET acks = record.acks + wanted.acks
FROM unnest($1::bigint[], $2::integer[]) AS wanted (record_id, acks)
WHERE record.id = wanted.record_id

-- name: add_to_ledger
-- Brings the ledger's figures up to date, and keeps the last 64 ack times of this row; returns the
-- size of the whole ledger as it was before.
UPDATE notifyd_ack_totals SET
    size = size + $2,
    pending = pending + $3,
    acknowledged = acknowledged + $4,
    expired = expired + $5,
    seconds = seconds + $6,
    recent = CASE
        WHEN cardinality($7::float8[]) = 0 THEN recent ELSE ($7::float8[] || recent)[1:64]
    END
WHERE shard = $1
RETURNING (SELECT sum(size)::bigint FROM notifyd_ack_totals)

-- name: lock_oldest_records
-- The oldest records that nobody is at work on, up to a time of sending.
SELECT id, recipients FROM notifyd_ack_records
WHERE id IN (SELECT id FROM notifyd_ack_records ORDER BY id LIMIT $1) AND sent_at <= $2
ORDER BY id
FOR UPDATE SKIP LOCKED

-- name: let_go
-- Lets go of locked records and their recipients; returns how many rows that were, and how many
-- recipients never confirmed.
WITH records AS (
    DELETE FROM notifyd_ack_records WHERE id = ANY ($1::bigint[]) RETURNING 1
), acks AS (
    DELETE FROM notifyd_acks WHERE record_id = ANY ($1::bigint[]) RETURNING state
)
SELECT (SELECT count(*) FROM records) + count(*) AS size,
    count(*) FILTER (WHERE state = 1) AS pending
FROM acks

-- name: find_late
-- Some recipients who did not confirm in time, the latest first, by their records.
SELECT record_id, user_id FROM notifyd_acks
WHERE state = 1 AND sent_at <= $1
ORDER BY sent_at
LIMIT $2

-- name: lock_free_records
-- Locks those of these records that nobody is at work on.
SELECT id FROM notifyd_ack_records
WHERE id = ANY ($1::bigint[])
ORDER BY tenant, notification_id
FOR UPDATE SKIP LOCKED

-- name: expire_acks
-- Recipients of locked records who are still late have expired; returns how many. IS TRUE: as in
-- delete_expired.
WITH late AS (
    UPDATE notifyd_acks AS ack
    SET state = 3
    FROM unnest($1::bigint[], $2::text[]) AS wanted (record_id, user_id)
    WHERE ack.record_id = wanted.record_id AND ack.user_id = wanted.user_id
        AND (ack.state = 1 AND ack.sent_at <= $3) IS TRUE
    RETURNING 1
)
SELECT count(*) FROM late

-- name: report
-- All that the ledger knows of one notification; one row without a user where it expects nobody.
SELECT record.sent_at, record.acks, ack.user_id, ack.state, ack.confirmed_at, ack.by_ack
FROM notifyd_ack_records AS record
LEFT JOIN notifyd_acks AS ack ON ack.record_id = record.id
WHERE record.tenant = $1 AND record.notification_id = $2
ORDER BY ack.user_id

-- name: ledger_figures
-- The ledger's figures over all rows of totals.
SELECT sum(pending)::bigint AS pending, sum(acknowledged)::bigint AS acknowledged,
    sum(expired)::bigint AS expired, sum(seconds) AS seconds,
    ARRAY(SELECT unnest(recent) FROM notifyd_ack_totals) AS recent
FROM notifyd_ack_totals

-- name: get_template
-- One template.
SELECT body, created_at FROM notifyd_templates WHERE tenant = $1 AND id = $2

-- name: list_templates
-- A tenant's templates by id.
SELECT body, created_at FROM notifyd_templates WHERE tenant = $1 ORDER BY id

-- name: lock_templates
-- Of those who add to one tenant's templates, one counts at a time.
SELECT pg_advisory_xact_lock(hashtextextended('notifyd_templates:' || $1::text, 0))

-- name: create_template
-- Adds a template where its id is free and the tenant has room; says which of both it was not.
WITH known AS (
    SELECT count(*) AS count, count(*) FILTER (WHERE id = $2) > 0 AS taken
    FROM notifyd_templates WHERE tenant = $1
), made AS (
    INSERT INTO notifyd_templates (tenant, id, created_at, body)
    SELECT $1, $2, $3, $4 FROM known WHERE NOT taken AND count < $5
)
SELECT taken, count >= $5 AS full FROM known

-- name: replace_template
-- Puts a template in place of its namesake, which must be there; when that was created, stays.
UPDATE notifyd_templates SET body = $3 WHERE tenant = $1 AND id = $2
RETURNING created_at

-- name: delete_template
-- Deletes a template; returns its id if it was there.
DELETE FROM notifyd_templates WHERE tenant = $1 AND id = $2 RETURNING id

-- name: claim_keys
-- Gives keys to their first claimants, or to others where time ran out, or where nobody else can be
-- at work with them ($6); returns those given.
INSERT INTO notifyd_idempotency_keys AS known (scope, fingerprint, owner, expires_at)
SELECT scope, fingerprint, $3, $4
FROM unnest($1::bytea[], $2::bytea[]) AS wanted (scope, fingerprint)
ORDER BY scope
ON CONFLICT (scope) DO UPDATE SET
    fingerprint = EXCLUDED.fingerprint,
    owner = EXCLUDED.owner,
    status = NULL,
    body = NULL,
    expires_at = EXCLUDED.expires_at
WHERE known.expires_at <= $5
    OR (
        known.scope = ANY ($6::bytea[]) AND known.owner <> EXCLUDED.owner
        AND known.status IS NULL AND known.fingerprint = EXCLUDED.fingerprint
    )
RETURNING scope

-- name: find_keys
-- What is known of keys that were not given.
SELECT scope, fingerprint, status, body FROM notifyd_idempotency_keys
WHERE scope = ANY ($1::bytea[])

-- name: forget_keys
-- Deletes some keys whose time is up: more than a batch of claims adds, so that none pile up.
DELETE FROM notifyd_idempotency_keys
WHERE scope IN (
    SELECT scope FROM notifyd_idempotency_keys
    WHERE expires_at <= $1
    ORDER BY expires_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)

-- name: lock_keys
-- Locks keys that are to be kept or given up, in the order in which claims lock them.
SELECT scope FROM notifyd_idempotency_keys
WHERE scope = ANY ($1::bytea[])
ORDER BY scope
FOR UPDATE

-- name: keep_answers
-- Keeps answers, if nobody else took the key meanwhile.
UPDATE notifyd_idempotency_keys AS known
SET status = wanted.status, body = wanted.body, expires_at = $4
FROM unnest($1::bytea[], $2::smallint[], $3::bytea[]) AS wanted (scope, status, body)
WHERE known.scope = wanted.scope AND known.owner = $5 AND known.status IS NULL

-- name: release_keys
-- Frees keys that ended without an answer.
DELETE FROM notifyd_idempotency_keys
WHERE scope = ANY ($1::bytea[]) AND owner = $2 AND status IS NULL

-- name: limits_version
-- What grows with each change of a tenant's limits.
SELECT version FROM notifyd_tenant_changes

-- name: read_limits
-- The limits of all tenants that were set at run time.
SELECT id, limits FROM notifyd_tenants

-- name: change_limits
-- Of those who change limits one is at work at a time.
UPDATE notifyd_tenant_changes SET version = version + 1

-- name: put_limits
-- Keeps a tenant's limits where there is room for one more tenant; returns its name if it did.
INSERT INTO notifyd_tenants (id, limits)
SELECT $1, $2 WHERE (SELECT count(*) FROM notifyd_tenants WHERE id <> $1) < $3
ON CONFLICT (id) DO UPDATE SET limits = EXCLUDED.limits
RETURNING id

-- name: add_counts
-- Adds to what tenants sent in a day; rows are locked in the order of names.
INSERT INTO notifyd_tenant_counts AS known (day, tenant, notifications, deliveries)
SELECT $1, tenant, notifications, deliveries
FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS added (tenant, notifications, deliveries)
ORDER BY tenant COLLATE "C"
ON CONFLICT (day, tenant) DO UPDATE SET
    notifications = known.notifications + EXCLUDED.notifications,
    deliveries = known.deliveries + EXCLUDED.deliveries

-- name: forget_counts
-- Deletes what was sent before a day.
DELETE FROM notifyd_tenant_counts WHERE day < $1

-- name: tenant_figures
-- What one tenant, or where none is named each, sent on a day and in its month up to it.
SELECT
    tenant,
    coalesce(sum(notifications) FILTER (WHERE day = $1), 0)::bigint AS notifications_today,
    coalesce(sum(deliveries) FILTER (WHERE day = $1), 0)::bigint AS deliveries_today,
    sum(notifications)::bigint AS notifications,
    sum(deliveries)::bigint AS deliveries
FROM notifyd_tenant_counts
WHERE day >= date_trunc('month', $1::date)::date AND day <= $1
    AND ($2::text IS NULL OR tenant = $2)
GROUP BY tenant
