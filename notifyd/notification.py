"""What is sent, to whom, and what became of it. Frozen, no I/O."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

MAX_NOTIFICATION_BYTES = 65536
MAX_PAYLOAD_DEPTH = 64


class Priority(enum.Enum):
    """Decides what a full queue gives up; never the order of delivery."""

    LOW = "Low"
    NORMAL = "Normal"
    HIGH = "High"
    CRITICAL = "Critical"

    @property
    def rank(self) -> int:
        """0 (given up first) to 3 (given up last)."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}

AudienceType = Literal["All", "Roles", "Users", "Channels"]


class Audience(msgspec.Struct, frozen=True, gc=False):
    """Narrows who receives; `values` are roles, user ids or channels, and never told to
    recipients.
    """

    type: AudienceType = "All"
    values: frozenset[str] = frozenset()

    def admits(self, user_id: str, roles: tuple[str, ...], subscriptions: tuple[str, ...]) -> bool:
        """Whether a connection of this user, with these roles and subscriptions, may receive."""
        if self.type == "All":
            return True
        if self.type == "Users":
            return user_id in self.values
        return not self.values.isdisjoint(roles if self.type == "Roles" else subscriptions)


EVERYONE = Audience()


class Notification(msgspec.Struct, frozen=True, gc=False):
    """One notification, whole and checked.

    `id` is a UUID in its canonical text; `occurred_at` and `expires_at` are Unix seconds
    (`expires_at` None: no limit of its own); `payload` is normalised JSON (UTF-8, one line, at most
    64 deep); `ttl` is in seconds, as the caller gave it. `entry` says of which entry of a stream it
    was made, and None of all else: only what has one may be dispatched again after a fault.
    """

    id: str
    occurred_at: float
    event_type: str
    payload: msgspec.Raw
    priority: Priority = Priority.NORMAL
    ttl: int | None = None
    correlation_id: str | None = None
    source: str | None = None
    audience: Audience = EVERYONE
    require_ack: bool = False
    entry: str | None = None

    @property
    def expires_at(self) -> float | None:
        """Unix seconds after which nobody gets it any more; None: never by its own ttl."""
        return None if self.ttl is None else self.occurred_at + self.ttl

    def is_over(self, now: float) -> bool:
        """Whether its own ttl is over at `now` (Unix seconds)."""
        return self.ttl is not None and self.occurred_at + self.ttl <= now

    @property
    def storable(self) -> bool:
        """False for `ttl` 0: only who is connected now."""
        return self.ttl != 0


TargetType = Literal["user", "users", "broadcast", "channel", "channels"]


class Target(msgspec.Struct, frozen=True, gc=False):
    """Whom a notification is for; `names` are user ids or channels, empty for a broadcast."""

    type: TargetType
    names: tuple[str, ...] = ()


class Outcome(enum.Enum):
    """What became of one recipient; the order is best first, and a call has the best of its own."""

    DELIVERED = "delivered"
    ROUTED = "routed"
    QUEUED = "queued"
    NOBODY = "nobody"
    FILTERED = "filtered"
    EXPIRED = "expired"
    FAILED = "failed"


class RecipientResult(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What became of one user of a send-to-users; `connections` counts those that took it."""

    outcome: Outcome
    connections: int = 0
    reason: str | None = None


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What became of a notification.

    `delivered_to` and `routed` count connections (of a channel or a broadcast, `routed` counts the
    nodes that are silent), `queued` and `failed` recipients. `results` holds every user of a
    `users` target, `channels` the connections taken per channel of a `channels` target; `reason`
    says why a single recipient failed.
    """

    notification_id: str
    outcome: Outcome
    delivered_to: int = 0
    routed: int = 0
    queued: int = 0
    failed: int = 0
    results: dict[str, RecipientResult] | None = None
    channels: dict[str, int] | None = None
    reason: str | None = None

    @property
    def success(self) -> bool:
        """Whether anybody has it, or will."""
        return self.delivered_to + self.routed + self.queued > 0
