-- What is kept of tenants: limits that were set at run time, and what each has sent.

-- Limits as JSON; what is not among them is as the settings have it.
CREATE TABLE notifyd_tenants (
    id text COLLATE "C" PRIMARY KEY,
    limits bytea NOT NULL
);

-- One row: it grows with each change, so that a node need read the limits only when they changed.
-- Whoever changes them locks it first, so that one at a time counts how many there are.
CREATE TABLE notifyd_tenant_changes (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    version bigint NOT NULL
);

INSERT INTO notifyd_tenant_changes (version) VALUES (0);

-- Days are UTC's. Last month's and older are deleted.
CREATE TABLE notifyd_tenant_counts (
    day date NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    notifications bigint NOT NULL,
    deliveries bigint NOT NULL,
    PRIMARY KEY (day, tenant)
) WITH (fillfactor = 70);
