"""Every key that we have in Redis, composed here and nowhere else.

    prefix:{<bucket>}:log:<tenant>|<user>      a user's log, with order: beside it
    prefix:{<bucket>}:depth                    what a bucket counts, with due and corrupt beside it
    prefix:{acks}:record:<tenant>|<id>         a notification in the ledger, with pending: beside it
    prefix:{acks}:stats                        what the ledger counts, with order, due and times
    prefix:{<tenant>}:templates
    prefix:{tenants}:limits                    what tenants may have, where it was set at run time
    prefix:{tenants}:counts:<day or month>     what each of them has sent
    prefix:{idem-<digest of a scope>}
    prefix:{rate|<limit>|<caller>}             a bucket of tokens
    prefix:{trigger}:lease                     the node that dispatches what comes from Redis
    prefix:probe                               a key, and what channels of probes begin with

Names are percent-encoded, so that no name reaches another's keys (`notifyd.tenants.scoped`). A
script touches keys of one hash tag, the part in braces, which a cluster keeps on one node. A user's
tag is one of `BUCKETS` and not his own, so that the count and the first expiry over many users can
change in the same step as his log.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple
from zlib import crc32

import msgspec

from notifyd.tenants import encoded
from notifyd.tenants import scoped as member

BUCKETS = 64
"""Part of what is stored: a user is looked for in the bucket that his name gives."""


def bucket_of(member: str) -> int:
    """Where a user is kept."""
    return crc32(member.encode()) % BUCKETS


__all__ = ["BUCKETS", "Bucket", "LedgerKeys", "RedisKeys", "bucket_of", "member"]


class Bucket(NamedTuple):
    """Keys that many users' logs share, and what those of one of them begin with."""

    depth: str
    due: str
    corrupt: str
    log: str
    order: str

    def of(self, member: str) -> tuple[str, str]:
        """A user's log and its order."""
        return self.log + member, self.order + member

    def with_user(self, member: str) -> tuple[str, str, str, str]:
        """The keys of a script on one user's log."""
        return self.depth, self.due, self.log + member, self.order + member


class LedgerKeys(msgspec.Struct, frozen=True):
    """The ledger's keys, and what those of one notification begin with."""

    stats: str
    order: str
    due: str
    times: str
    record: str
    pending: str


class RedisKeys:
    """Keys under a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.buckets = tuple(self._bucket(number) for number in range(BUCKETS))
        acks = f"{prefix}:{{acks}}:"
        self.ledger = LedgerKeys(
            f"{acks}stats",
            f"{acks}order",
            f"{acks}due",
            f"{acks}times",
            f"{acks}record:",
            f"{acks}pending:",
        )
        self.trigger_lease = f"{prefix}:{{trigger}}:lease"
        self.probe = f"{prefix}:probe"
        self.tenant_limits = f"{prefix}:{{tenants}}:limits"

    def _bucket(self, number: int) -> Bucket:
        tag = f"{self._prefix}:{{{number}}}:"
        return Bucket(
            f"{tag}depth",
            f"{tag}due",
            f"{tag}corrupt",
            f"{tag}log:",
            f"{tag}order:",
        )

    def templates(self, tenant: str) -> str:
        """All templates of a tenant."""
        return f"{self._prefix}:{{{encoded(tenant)}}}:templates"

    def tenant_counts(self, period: str) -> str:
        """What tenants sent in a day (`2026-01-31`) or a month (`2026-01`)."""
        return f"{self._prefix}:{{tenants}}:counts:{period}"

    def idempotency(self, scope: tuple[str, ...]) -> str:
        """What is known of an idempotency key; hashed, for it may be long, or somebody's secret."""
        digest = hashlib.blake2b(msgspec.json.encode(scope), digest_size=20).hexdigest()
        return f"{self._prefix}:{{idem-{digest}}}"

    def rate_limit(self, limit: str, who: str) -> str:
        """A caller's bucket under the limit of this name, which has no bar in it."""
        return f"{self._prefix}:{{rate|{limit}|{encoded(who)}}}"
