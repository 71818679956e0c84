-- The users' logs, the ledger of acknowledgements, templates, and idempotency keys.
--
-- Times are Unix seconds of the server that wrote them. Names are compared by their bytes, so that
-- all who lock rows in the order of names lock them in the same order. Nothing refers to another
-- table by a constraint: entries come and go under the lock of their log, acks under that of their
-- record, and checking every row again would cost a third of the writes.

-- One row for each user whose log is not empty, or was not long ago. `pending` counts its entries,
-- none of which expires before `expires_first`; `overflow_count` what it gave up, and whether that
-- was told since. Updated in place: no index holds what changes.
CREATE TABLE notifyd_logs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    epoch text NOT NULL,
    next_offset bigint NOT NULL,
    pending integer NOT NULL,
    expires_first double precision NOT NULL,
    overflow_count integer NOT NULL DEFAULT 0,
    overflow_first bigint NOT NULL DEFAULT 0,
    overflow_last bigint NOT NULL DEFAULT 0,
    overflow_told boolean NOT NULL DEFAULT false,
    touched_at double precision NOT NULL,
    UNIQUE (tenant, user_id)
) WITH (fillfactor = 70);

-- Entries, in the order of their offsets. All are pending, but for those with a reason in `corrupt`:
-- they could not be read, and stay until they expire, for somebody to look at.
CREATE TABLE notifyd_entries (
    log_id bigint NOT NULL,
    entry_offset bigint NOT NULL,
    notification_id uuid NOT NULL,
    priority smallint NOT NULL,
    page_bytes integer NOT NULL,
    expires_at double precision NOT NULL,
    body bytea NOT NULL,
    corrupt text,
    PRIMARY KEY (log_id, entry_offset)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- What is pending is not stored twice; settling finds it by this.
CREATE UNIQUE INDEX notifyd_entries_pending
    ON notifyd_entries (log_id, notification_id) WHERE corrupt IS NULL;

-- What a full log gives up first.
CREATE INDEX notifyd_entries_to_give_up
    ON notifyd_entries (log_id, priority, entry_offset) WHERE corrupt IS NULL;

CREATE INDEX notifyd_entries_to_expire ON notifyd_entries (expires_at);

-- How many entries are pending in all: the sum of a few rows, so that writers rarely meet.
CREATE TABLE notifyd_log_totals (
    shard smallint PRIMARY KEY,
    pending bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

INSERT INTO notifyd_log_totals (shard) SELECT generate_series(0, 15);

-- What the ledger knows of one notification; the oldest have the lowest ids. `anyone`: nobody in
-- particular is expected to ack it, and `acks` counts those who did.
CREATE TABLE notifyd_ack_records (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    notification_id uuid NOT NULL,
    sent_at double precision NOT NULL,
    anyone boolean NOT NULL,
    acks integer NOT NULL DEFAULT 0,
    recipients integer NOT NULL DEFAULT 0,
    UNIQUE (tenant, notification_id)
) WITH (fillfactor = 80);

-- One row for each expected recipient. State: 0 queued, 1 pending since `sent_at`, 2 confirmed at
-- `confirmed_at` (`by_ack`, else by the transport), 3 expired.
CREATE TABLE notifyd_acks (
    record_id bigint NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    state smallint NOT NULL,
    sent_at double precision NOT NULL,
    confirmed_at double precision,
    by_ack boolean NOT NULL DEFAULT false,
    PRIMARY KEY (record_id, user_id)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

-- The few that are pending, among the many that are confirmed.
CREATE INDEX notifyd_acks_pending ON notifyd_acks (sent_at) WHERE state = 1;

-- The ledger's figures, and the seconds that the last acks took; the same way as the logs' totals.
CREATE TABLE notifyd_ack_totals (
    shard smallint PRIMARY KEY,
    size bigint NOT NULL DEFAULT 0,
    pending bigint NOT NULL DEFAULT 0,
    acknowledged bigint NOT NULL DEFAULT 0,
    expired bigint NOT NULL DEFAULT 0,
    seconds double precision NOT NULL DEFAULT 0,
    recent double precision[] NOT NULL DEFAULT '{}'
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

INSERT INTO notifyd_ack_totals (shard) SELECT generate_series(0, 15);

-- Templates as JSON in bytes: their texts may hold what PostgreSQL's text may not (U+0000).
CREATE TABLE notifyd_templates (
    tenant text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    created_at double precision NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, id)
);

-- Idempotency keys by the digest of their scope. Without a `status` the first call is at work, its
-- `owner` until `expires_at`; with one, that is when its answer is forgotten.
CREATE TABLE notifyd_idempotency_keys (
    scope bytea PRIMARY KEY,
    fingerprint bytea NOT NULL,
    owner bytea NOT NULL,
    status smallint,
    body bytea,
    expires_at double precision NOT NULL
);

CREATE INDEX notifyd_idempotency_keys_to_expire ON notifyd_idempotency_keys (expires_at);
