"""User logs, the ledger, templates, idempotency keys and what is kept of tenants, in Redis.

Every step that must be whole is one script (lua/), and calls of one turn of the event loop go out
together, awaited or not. Times are Redis's own, so that all nodes agree; a `clock` stands in for it
in tests. Everything raises Unavailable, at once or when awaited, where Redis cannot answer.
"""

from notifyd.queue.redis.idempotency import RedisIdempotencyKeys
from notifyd.queue.redis.ledger import RedisAckLedger
from notifyd.queue.redis.logs import RedisUserLogs
from notifyd.queue.redis.templates import RedisTemplates
from notifyd.queue.redis.tenants import RedisTenants

__all__ = [
    "RedisAckLedger",
    "RedisIdempotencyKeys",
    "RedisTemplates",
    "RedisTenants",
    "RedisUserLogs",
]
