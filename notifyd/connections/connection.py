"""One client's connection: who it is, where it stands, and what it has not confirmed.

Pure state around an outbox. States go one way: authenticating, open, closed; a connection closes
once, with one reason, whoever asks first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import msgspec

from notifyd.connections.outbox import Outbox
from notifyd.identity import Identity
from notifyd.notification import Notification
from notifyd.ratelimit.messages import MessageBudget
from notifyd.wire import Message

Transport = Literal["websocket", "sse"]

TAKERS_PER_HOLDER = 16
"""Of a notification sent to many users at once, at most this many takers are kept for each one that
has yet to settle it: 128 bytes.
"""

UNIDENTIFIED = Identity(user_id="")


MAX_LEFT_TO_LOG = 1000
"""How many ids are remembered of what a connection got and the server no longer holds."""

MAX_LEFT_OUT = 1000
"""How many ids are remembered of what a connection must not get because it sent it."""


MAX_UNANSWERED = 256
"""So many ids of a connection's acks may wait for the stores; beyond, it is not read from."""


class State(enum.Enum):
    """Where a connection stands."""

    AUTHENTICATING = "authenticating"
    OPEN = "open"
    CLOSED = "closed"


class Held(msgspec.Struct, eq=False, gc=False):
    """A notification to a user that was delivered and is not yet confirmed.

    `connections` are those that took it. `stored`: the user's log has it for sure, so that nothing
    needs to go back there; `in_log`: it has it or may have it, so that a confirmation must settle
    it there; `shared`: nodes elsewhere may hold it for the same user; `since` in Unix seconds.
    `together`: he was one of many to whom it was delivered at once, and counts there until it is
    settled.

    The garbage collector does not walk them, of which there are many: a connection that ends
    forgets what it holds, and so ends the circle of the two.
    """

    notification: Notification
    connections: tuple[Connection, ...]
    since: float
    together: HeldTogether | None = None
    stored: bool = False
    in_log: bool = False
    shared: bool = False
    settled: bool = False


class HeldTogether:
    """A notification that was delivered to many users at once, to one connection of each: held for
    all of them in one, for as long as that is all there is to say of it.

    Where more is to be known of one of them, a `Held` takes its place at his connection. `takers`:
    who took it, some of whom may hold it no more; `left`: how many users have not settled it.
    """

    __slots__ = ("left", "look_at", "notification", "settled", "since", "takers")

    stored: ClassVar[bool] = False
    in_log: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __init__(
        self, notification: Notification, takers: Sequence[Connection], since: float
    ) -> None:
        self.notification = notification
        # The first one last, where it is taken away first.
        self.takers = list(reversed(takers))
        self.since = since
        self.left = len(takers)
        self.look_at = self.left // TAKERS_PER_HOLDER
        self.settled = False

    def leave(self, users: int = 1) -> None:
        """So many of the users have settled it."""
        self.left -= users
        if self.left <= self.look_at:
            self.look_after()

    def look_after(self) -> None:
        """Keep no more takers than TAKERS_PER_HOLDER times as many as hold it: called when `left`
        is down to `look_at`."""
        id = self.notification.id
        if not self.left:
            self.settled = True
            self.takers.clear()
        else:
            # No calls, for this is a part of the cost of each.
            self.takers = [
                each
                for each in self.takers
                if (unconfirmed := each.unconfirmed) is not None and id in unconfirmed
            ]
        self.look_at = self.left // TAKERS_PER_HOLDER

    def is_held_by(self, connection: Connection, id: str) -> bool:
        """Whether one of the takers has yet to settle it."""
        unconfirmed = connection.unconfirmed
        held = None if unconfirmed is None else unconfirmed.get(id)
        return held is self or (type(held) is Held and held.together is self)


class Connection:
    """A WebSocket or an SSE stream of one user.

    `address` and `user_agent` are the client's, as far as known; `opened_at` and `last_heard` in
    Unix seconds. `acks`: the client acknowledges by itself, so that a sign of life confirms
    nothing. `unconfirmed` maps notification ids to what is held, in order of delivery; `asked` is
    the counter of the Ping that is out and the ids that its Pong will confirm. `left_to_log` has
    the latest ids of what came here, is not confirmed, and is held by the user's log alone, or was
    acked in vain while a store was away, with the Unix seconds of their delivery. `left_out` has
    the latest ids that `exclude_connection` kept from this one, whatever becomes of them.
    `before_gap` has the ids of what it was sent, and had not confirmed, when it was last told what
    a full queue gave up; None where it was not.
    `replays` counts the replays that had something to bring, from their beginning. `ack_credit`
    counts what was held and is settled, and may be acked all the same; `budget` is what the client
    may still say, once that was asked. `unanswered` counts the ids of its acks that wait for the
    stores.
    """

    __slots__ = (
        "ack_credit",
        "acks",
        "address",
        "asked",
        "beat",
        "before_gap",
        "budget",
        "id",
        "identity",
        "last_heard",
        "left_out",
        "left_to_log",
        "on_answered",
        "opened_at",
        "outbox",
        "replays",
        "state",
        "subscriptions",
        "transport",
        "unanswered",
        "unconfirmed",
        "user_agent",
    )

    def __init__(
        self,
        id: str,
        transport: Transport,
        outbox: Outbox,
        *,
        address: str,
        user_agent: str,
        acks: bool,
        now: float,
    ) -> None:
        self.id = id
        self.transport: Transport = transport
        self.outbox = outbox
        outbox.connection = self
        self.address = address
        self.user_agent = user_agent
        self.acks = acks
        self.opened_at = now
        self.last_heard = now
        self.identity = UNIDENTIFIED
        self.state = State.AUTHENTICATING
        self.subscriptions: tuple[str, ...] = ()
        self.unconfirmed: dict[str, Held | HeldTogether] | None = None
        self.asked: tuple[int, tuple[str, ...]] | None = None
        self.beat = 0
        self.before_gap: frozenset[str] | None = None
        self.ack_credit = 0
        self.budget: MessageBudget | None = None
        self.replays = 0
        self.left_to_log: dict[str, float] | None = None
        self.left_out: dict[str, None] | None = None
        self.unanswered = 0
        self.on_answered: Callable[[], None] | None = None

    @property
    def must_wait(self) -> bool:
        """Whether it has asked for so much that nothing more is taken from it for now. Who reads
        from it sets `on_answered`, which is called once when that is over."""
        return self.unanswered >= MAX_UNANSWERED

    def answered(self, ids: int) -> None:
        """So many of what waited for the stores were answered."""
        self.unanswered -= ids
        go_on = self.on_answered
        if go_on is not None and not self.must_wait:
            self.on_answered = None
            go_on()

    def offer(self, message: Message) -> bool:
        """Put a message into the outbox, behind a replay; False where it cannot be taken."""
        return self.outbox.put(message.websocket if self.transport == "websocket" else message.sse)

    def reply(self, message: Message) -> bool:
        """Put a message into the outbox that need not wait behind a replay."""
        return self.outbox.put_ahead(
            message.websocket if self.transport == "websocket" else message.sse
        )

    def hold(self, held: Held) -> None:
        """Remember what this connection took and has not confirmed."""
        if self.unconfirmed is None:
            self.unconfirmed = {}
        self.unconfirmed[held.notification.id] = held

    def was_sent(self, notification_id: str) -> bool:
        """Whether it took this, as far as is remembered: it holds it, or left it to the log."""
        unconfirmed, left = self.unconfirmed, self.left_to_log
        return bool(
            (unconfirmed and notification_id in unconfirmed) or (left and notification_id in left)
        )

    def leave_to_log(self, notification_id: str, since: float) -> None:
        """Remember that it was sent here at `since` (Unix seconds), though it is held no longer:
        the user's log alone has it, or an ack of it was in vain."""
        left = self.left_to_log
        if left is None:
            left = self.left_to_log = {}
        left[notification_id] = since
        if len(left) > MAX_LEFT_TO_LOG:
            del left[next(iter(left))]

    def was_told_gap(self) -> None:
        """From here on, who confirms what he is sent has heard of the gap as well."""
        self.before_gap = frozenset((*(self.unconfirmed or ()), *(self.left_to_log or ())))

    def was_sent_behind_gap(self, notification_id: str) -> bool:
        """Whether one who confirms this has heard what a full queue gave up."""
        before = self.before_gap
        return before is not None and notification_id not in before

    def leave_out(self, notification_id: str) -> None:
        """Never take this one, also where it comes back from another connection or the log."""
        left = self.left_out
        if left is None:
            left = self.left_out = {}
        left[notification_id] = None
        if len(left) > MAX_LEFT_OUT:
            del left[next(iter(left))]

    def take_left_to_log(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that were left to the log, which are no longer remembered."""
        left = self.left_to_log or {}
        found = [id for id in ids if id in left]
        for id in found:
            del left[id]
        if not left:
            self.left_to_log = None
        return found

    def held_alone(self, id: str) -> Held:
        """What is held under this id, as a record of this user's own. Raises KeyError."""
        unconfirmed = self.unconfirmed or {}
        held = unconfirmed[id]
        if isinstance(held, HeldTogether):
            held = Held(held.notification, (self,), held.since, together=held)
            # In the place of the other: the order of delivery stays.
            unconfirmed[id] = held
        return held
