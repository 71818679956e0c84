"""What we keep until the client confirms: one log per user, and the ledger of acknowledgements.

Kept by every backend: a user's entries are read in the order in which they were stored; nothing is
gone before it was settled, expired, or given up by a full log (which the next read tells); settling
twice is settling once. Memory answers at once, other backends with an awaitable (`Eventually`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from notifyd.eventually import Eventually
from notifyd.notification import Notification

Rejection = Literal["queue_full", "unavailable"]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A pending entry of a user's log; `offset` grows with each entry of that user."""

    offset: int
    notification: Notification


def entry_bytes(notification: Notification) -> int:
    """What an entry counts against a page: its payload and a flat 256 bytes of everything else."""
    return 256 + len(memoryview(notification.payload))


class Overflow(msgspec.Struct, frozen=True, gc=False):
    """What a full log gave up and nobody is known to have heard of: how many, between which
    offsets."""

    count: int
    first: int
    last: int


class Page(msgspec.Struct, frozen=True, gc=False):
    """Pending entries in order. `cursor` is where the next page starts, None at the end."""

    entries: Sequence[Entry]
    cursor: int | None = None
    overflow: Overflow | None = None


class UserLogs(Protocol):
    """The logs of all users, each addressed by tenant and user id."""

    def enqueue(
        self,
        tenant: str,
        recipients: Sequence[str],
        notification: Notification,
        *,
        owed: bool = False,
    ) -> Eventually[Sequence[Rejection | None]]:
        """Store one notification for each recipient; None says stored, else why not.

        A full log gives up its lowest priority first, of that the oldest; the new one counts too.
        `owed`: its sender was told that the recipient gets it; so where it is refused, it is the
        recipient who is told, as part of the overflow.
        """

    def read(
        self, tenant: str, user_id: str, *, after: int = 0, max_bytes: int = 65536
    ) -> Eventually[Page]:
        """Pending entries with an offset above `after`: at least one, then up to `max_bytes`
        as `entry_bytes` counts them.

        The first page (`after` 0) tells the overflow, again and again until one who was told it
        settles an entry: it may not have reached the others. With no entry left, it is forgotten at
        once.
        """

    def settle(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> Eventually[frozenset[str]]:
        """Settle notifications by id; those that were pending are returned.

        `heard`: what confirmed them was told the overflow before it was sent one of them.
        """

    def erase(self, tenant: str, user_id: str) -> Eventually[int]:
        """Forget a user's log; returns how many entries were pending."""

    def expire(self) -> Eventually[int]:
        """Drop what has outlived its ttl; returns how many."""

    def depth(self) -> Eventually[int]:
        """Pending entries of all users, in O(1)."""


class Confirmation(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One expected recipient: when he confirmed (Unix seconds), and whether by an ack of his own or
    by the transport's sign of life."""

    user_id: str
    state: Literal["queued", "pending", "confirmed", "expired"]
    confirmed_at: float | None = None
    by: Literal["ack", "transport"] | None = None


class AckReport(msgspec.Struct, frozen=True, gc=False):
    """What the ledger knows of one notification; `acks` counts those of a notification that expects
    none in particular (a channel or broadcast without `require_ack`)."""

    notification_id: str
    sent_at: float
    recipients: Sequence[Confirmation]
    acks: int


class AckStats(msgspec.Struct, frozen=True, gc=False):
    """Times in milliseconds over recent acks; None before the first."""

    pending: int
    acknowledged: int
    expired: int
    average_ms: float | None
    p95_ms: float | None


class AckLedger(Protocol):
    """Who was expected to confirm what, keyed by tenant, notification and user."""

    def expect(
        self,
        tenant: str,
        notification_id: str,
        recipients: Sequence[str],
        *,
        queued: bool = False,
    ) -> Eventually[None]:
        """Expect a confirmation from each recipient from now on; queued ones once they were sent
        it.
        """

    def expect_each(self, tenant: str, sent: Sequence[tuple[str, str]]) -> Eventually[None]:
        """`expect` for many notifications that were sent to one user each: (notification, user)."""

    def resent(self, tenant: str, user_id: str, ids: Sequence[str]) -> Eventually[None]:
        """`expect` for what was queued for a user and was sent to him now. It may be noted a little
        later, and only where he has not confirmed it by then.
        """

    def note_resent(self, tenant: str, ids: Sequence[str]) -> None:
        """Note at once what `resent` left for later of these: another node is told that they are
        confirmed, and will note that.
        """

    def expect_anyone(self, tenant: str, notification_id: str) -> Eventually[None]:
        """One bounded entry for a notification that nobody in particular must ack."""

    def acknowledge(
        self, tenant: str, user_id: str, ids: Sequence[str]
    ) -> Eventually[frozenset[str]]:
        """Record acks; returns the ids that this user may ack (acked before counts once)."""

    def confirm(self, tenant: str, user_id: str, ids: Sequence[str]) -> Eventually[None]:
        """Record what the transport confirmed."""

    def report(self, tenant: str, notification_id: str) -> Eventually[AckReport | None]:
        """Who has confirmed; None once the ledger let go of the notification."""

    def expire(self) -> Eventually[int]:
        """Count what was not confirmed in time, and let go of what is old; returns how many
        expired.
        """

    def stats(self) -> Eventually[AckStats]:
        """Figures over all tenants."""
