"""User logs, the ledger, templates, idempotency keys and what is kept of tenants, in PostgreSQL.

What is asked is in sql/queries.sql, a sentence each; here stands in which order. All calls of one
turn of the event loop, and all that come while a batch is under way, share one transaction. It
follows the same steps everywhere: lock the rows that stand for what is changed (logs, records), in
the order of their names; look; decide; write; bring the totals up to date.
"""

from notifyd.queue.postgres.calls import MIGRATIONS, QUERIES
from notifyd.queue.postgres.idempotency import PostgresIdempotencyKeys
from notifyd.queue.postgres.ledger import PostgresAckLedger
from notifyd.queue.postgres.logs import PostgresUserLogs
from notifyd.queue.postgres.templates import PostgresTemplates
from notifyd.queue.postgres.tenants import PostgresTenants

__all__ = [
    "MIGRATIONS",
    "QUERIES",
    "PostgresAckLedger",
    "PostgresIdempotencyKeys",
    "PostgresTemplates",
    "PostgresTenants",
    "PostgresUserLogs",
]
