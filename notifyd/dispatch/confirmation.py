"""What was delivered to a user and is not confirmed yet: held here, settled, or handed to his
queue.

A notification to a user is held from delivery to confirmation, by every connection that took it.
One confirmation by any of them settles it for the user. When the last connection that holds it ends
without one, it goes back to the user's log. Confirmed is what the client acked; where it does not
ack, what a Pong answered that was asked for after it (WebSocket), or what the connection outlived
by `idle_timeout` (SSE).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from heapq import merge
from itertools import count, islice
from typing import TypeVar

import msgspec

from notifyd.cluster.router import Cluster, Waiting
from notifyd.connections.connection import Connection, Held, HeldTogether, State
from notifyd.connections.registry import Registry
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually, and_then, rescue, then
from notifyd.eventually import settled as settled_value
from notifyd.identity import Identity
from notifyd.notification import Notification
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.wire import ping_frame

ASK_AT = 128
"""A connection with this many unconfirmed notifications is asked at once, not at the next tick. A
Ping and its Pong cost what a delivery costs.
"""

ASK_REPLAYED_AT = 16
"""With so many from a replay it is asked when that is over. Else a thousand who returned together
would confirm together, and what others want of the store would wait behind all of it."""

LOOK_EVERY = 8
"""One in this many notifications to many users looks for connections that have ASK_AT."""

KEPT_SETTLED = 256
"""How many settled notifications may stay in memory, beyond twice the number that are held."""

REMEMBERED = 50_000
"""How many confirmations a node of a cluster remembers: what another node hands back to a log is
not sent again to a user who has confirmed it meanwhile. It waits for as many that others asked for.
"""


HeldT = TypeVar("HeldT", Held, Held | HeldTogether)


class AckAnswer(msgspec.Struct, frozen=True, gc=False):
    """Which ids were acknowledged, and which this user may not acknowledge."""

    acked: list[str]
    refused: list[str]


class Confirmations:
    """Holds, settles and hands back. `logs` or `ledger` is None where it is switched off."""

    def __init__(
        self,
        registry: Registry,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        *,
        max_pending: int,
        idle_timeout: float,
        clock: Callable[[], float],
        writes: StoreWrites,
        cluster: Cluster | None = None,
    ) -> None:
        self._registry = registry
        self._logs = logs
        self._ledger = ledger
        self._max_pending = max_pending
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._writes = writes
        self._cluster = cluster
        self._remembered: dict[tuple[str, str, str], None] = {}
        # Nodes that are to be told when these are confirmed.
        self._asked_by: dict[tuple[str, str, str], str] = {}
        self._oldest_first: deque[Held | HeldTogether] = deque()
        self.held = 0
        # What the log has is counted apart: nothing has to go there to make room for it.
        self._stored_first: deque[Held] = deque()
        self._stored = 0
        self._to_ask: dict[Connection, None] = {}
        self._settled_during_replay: dict[Connection, set[str]] = {}
        # What others held that moved to the log meanwhile, by those who have not got it.
        self._moved_during_replay: dict[Connection, dict[str, Held]] = {}
        # Asked for ASK_AT since the last tick.
        self._asked_early: set[Connection] = set()
        self._counter = count(1)
        # Those who got the same confirm the same, one after the other: how many did, of what.
        self._settled_alike: tuple[Held | HeldTogether, ...] = ()
        self._settled_alike_by = 0
        self._held_together = 0

    # --- holding ---

    def hold(
        self,
        notification: Notification,
        connections: tuple[Connection, ...],
        *,
        shared: bool = False,
    ) -> None:
        """These connections of one user just took it; `shared`: so may some on other nodes."""
        if len(connections) == 1:
            self.hold_alone(notification, connections, self._clock(), shared=shared)
            return
        id = notification.id
        takers = tuple(
            connection
            for connection in connections
            if connection.unconfirmed is None or id not in connection.unconfirmed
        )
        if not takers:
            # Sent again under the same id: one confirmation settles both.
            return
        held = Held(notification, takers, self._clock(), shared=shared)
        for connection in takers:
            connection.hold(held)
        self._oldest_first.append(held)
        self.held += 1
        if self.held > self._max_pending:
            self._move_oldest_to_log()
        # Last, because a Ping can be what closes a connection, which then hands back what it holds.
        for connection in connections:
            self._ask_soon(connection)

    def hold_alone(
        self,
        notification: Notification,
        connections: tuple[Connection, ...],
        now: float,
        *,
        shared: bool = False,
    ) -> None:
        """`hold` for a user's only connection, which took it at `now` (Unix seconds)."""
        (connection,) = connections
        id = notification.id
        unconfirmed = connection.unconfirmed
        if unconfirmed is None:
            held = Held(notification, connections, now, shared=shared)
            unconfirmed = connection.unconfirmed = {id: held}
            self._ask_soon(connection)
        elif id in unconfirmed:
            return
        else:
            # It is asked by its Ping, or waits to be, as ever while it has something.
            held = unconfirmed[id] = Held(notification, connections, now, shared=shared)
        self._oldest_first.append(held)
        self.held += 1
        if self.held > self._max_pending:
            self._move_oldest_to_log()
        if len(unconfirmed) >= ASK_AT and connection.asked is None:
            self._ask_early((connection,))

    def hold_each(self, notification: Notification, connections: Sequence[Connection]) -> None:
        """`hold` for many users at once, of each of whom one connection just took it."""
        held = HeldTogether(notification, connections, self._clock())
        id = notification.id
        known = 0
        for connection in connections:
            unconfirmed = connection.unconfirmed
            if unconfirmed is None:
                connection.unconfirmed = {id: held}
                self._ask_soon(connection)
            elif unconfirmed.setdefault(id, held) is not held:
                # Sent again under the same id: one confirmation settles both.
                known += 1
        if known:
            held.left -= known
            held.look_after()
        self.held += held.left
        if held.left:
            self._oldest_first.append(held)
        if self.held > self._max_pending:
            self._move_oldest_to_log()
        self._held_together += 1
        if self._held_together % LOOK_EVERY == 0:
            # Last, because a Ping can be what closes a connection, which then hands back what it
            # holds.
            self._ask_early(
                [
                    each
                    for each in connections
                    if each.asked is None
                    and each.unconfirmed is not None
                    and len(each.unconfirmed) >= ASK_AT
                ]
            )

    def share(self, held: Held, connection: Connection) -> None:
        """A further connection of the same user took it, from what the others hold or held."""
        if held.settled:
            # It moved to the log; or writing it closed the last of the others.
            self.hold_stored(held.notification, connection)
            return
        held.connections += (connection,)
        if held.together is not None:
            held.together.takers.append(connection)
        connection.hold(held)
        self._ask_soon(connection)

    def hold_stored(
        self, notification: Notification, connection: Connection, *, shared: bool = False
    ) -> None:
        """A connection took it from the log, which keeps it until it is settled."""
        id = notification.id
        unconfirmed = connection.unconfirmed
        if unconfirmed is not None and id in unconfirmed:
            connection.held_alone(id).in_log = True
        else:
            held = Held(
                notification,
                (connection,),
                self._clock(),
                stored=True,
                in_log=True,
                shared=shared,
            )
            connection.hold(held)
            self._note_stored(held)
        self._ask_soon(connection)

    def hold_all_stored(
        self,
        notification: Notification,
        connections: Sequence[Connection],
        *,
        shared: bool = False,
    ) -> None:
        """These connections of one user took what the user's log keeps until it is settled."""
        if len(connections) == 1:
            self.hold_stored(notification, connections[0], shared=shared)
            return
        id = notification.id
        takers = tuple(
            [
                connection
                for connection in connections
                if connection.unconfirmed is None or id not in connection.unconfirmed
            ]
        )
        held = Held(notification, takers, self._clock(), stored=True, in_log=True, shared=shared)
        for connection in connections:
            if connection.unconfirmed is None or id not in connection.unconfirmed:
                connection.hold(held)
            else:
                connection.held_alone(id).in_log = True
        if takers:
            self._note_stored(held)
        for connection in connections:
            self._ask_soon(connection)

    def _note_stored(self, held: Held) -> None:
        self._stored_first.append(held)
        self._stored += 1
        while self._stored > self._max_pending:
            oldest = self._stored_first.popleft()
            if not oldest.settled:
                self._leave_to_log(oldest)

    def hold_homeless(self, notification: Notification, connection: Connection) -> None:
        """A connection took what waited for a store that is away, and may have it or not."""
        # It was sent before what is live meanwhile.
        since = min(notification.occurred_at, self._clock())
        held = Held(notification, (connection,), since, in_log=True)
        connection.hold(held)
        self._oldest_first.append(held)
        self.held += 1
        self._ask_soon(connection)

    def is_alone(self, connection: Connection) -> bool:
        """Whether a connection is its user's only one here."""
        identity = connection.identity
        return self._registry.tenant(identity.tenant).of_user(identity.user_id) == (connection,)

    def held_by_others(self, connection: Connection) -> list[Held]:
        """What the user's other connections hold that is not in his log, or held when this one's
        replay began and that moved there since, in order of delivery.

        Without what was for those connected then, and what is over its ttl.
        """
        identity = connection.identity
        now = self._clock()
        found: dict[str, Held] = {
            id: held
            for id, held in self._moved_during_replay.get(connection, {}).items()
            if not held.notification.is_over(now)
        }
        for other in self._registry.tenant(identity.tenant).of_user(identity.user_id):
            if other is not connection and other.unconfirmed is not None:
                for id, held in tuple(other.unconfirmed.items()):
                    notification = held.notification
                    if not (held.stored or notification.is_over(now)) and notification.storable:
                        found.setdefault(id, other.held_alone(id))
        return sorted(found.values(), key=lambda held: held.since)

    def _move_oldest_to_log(self) -> None:
        while self.held > self._max_pending:
            oldest = self._oldest_first[0]
            if isinstance(oldest, Held):
                self._oldest_first.popleft()
                if not oldest.settled:
                    self._move_to_log(oldest)
            elif oldest.takers:
                connection = oldest.takers.pop()
                id = oldest.notification.id
                if oldest.is_held_by(connection, id):
                    self._move_to_log(connection.held_alone(id))
            else:
                self._oldest_first.popleft()

    def _move_to_log(self, held: Held) -> None:
        identity = held.connections[0].identity
        if self._settled_during_replay and self._logs is not None and held.notification.storable:
            self._note_moved(identity, held)
        self._leave_to_log(held)
        self._writes.give_back(
            identity.tenant, identity.user_id, (held.notification,), replay=False
        )

    def _note_moved(self, identity: Identity, held: Held) -> None:
        """Whose replay is under way may have asked for the last page already, and will find that
        nobody holds it."""
        id = held.notification.id
        for connection in self._registry.tenant(identity.tenant).of_user(identity.user_id):
            if self.is_replaying(connection) and not connection.was_sent(id):
                self._moved_during_replay.setdefault(connection, {})[id] = held

    def _leave_to_log(self, held: Held) -> None:
        """Hold it no more, though it is not confirmed: its connections have got it all the same."""
        for connection in held.connections:
            connection.leave_to_log(held.notification.id, held.since)
        self._let_go(held)

    def goes_to_log(self, tenant: str, user_id: str, id: str) -> None:
        """What connections here may hold is about to be stored all the same: confirmed, it is to be
        settled there."""
        for connection in self._registry.tenant(tenant).of_user(user_id):
            if connection.unconfirmed and id in connection.unconfirmed:
                connection.held_alone(id).in_log = True

    # --- what other nodes hold of the same ---

    def is_shared(self, tenant: str, user_id: str, id: str) -> None:
        """What was sent to connections here has gone to other nodes too."""
        for connection in self._registry.tenant(tenant).of_user(user_id):
            if connection.unconfirmed and id in connection.unconfirmed:
                connection.held_alone(id).shared = True
                return
        if self._cluster is not None and self.was_confirmed(tenant, user_id, id):
            # The confirmation was faster than we heard of the others.
            self._cluster.settled(tenant, user_id, (id,))

    def was_confirmed(self, tenant: str, user_id: str, id: str) -> bool:
        """Whether this node of a cluster knows that the user confirmed it not long ago."""
        return (tenant, user_id, id) in self._remembered

    def _remember(self, tenant: str, user_id: str, ids: Sequence[str]) -> None:
        remembered = self._remembered
        for id in ids:
            remembered[tenant, user_id, id] = None
        while len(remembered) > REMEMBERED:
            del remembered[next(iter(remembered))]
        if self._asked_by and self._cluster is not None:
            for id in ids:
                node = self._asked_by.pop((tenant, user_id, id), None)
                if node is not None:
                    self._cluster.tell_settled(node, tenant, user_id, id)

    def was_confirmed_here(self, node: str, waiting: Waiting) -> Waiting:
        """What of this the user has confirmed, as far as it is remembered; of the rest, that node
        is told when he does."""
        found = []
        for tenant, user_id, ids in waiting:
            confirmed = [id for id in ids if self.was_confirmed(tenant, user_id, id)]
            if confirmed:
                found.append((tenant, user_id, confirmed))
            for id in set(ids).difference(confirmed):
                self._asked_by[tenant, user_id, id] = node
        while len(self._asked_by) > REMEMBERED:
            del self._asked_by[next(iter(self._asked_by))]
        return found

    def settle_from_elsewhere(self, tenant: str, user_id: str, ids: Sequence[str]) -> Sequence[str]:
        """A device on another node confirmed these; returns those that were held here.

        What is not held any more may be on its way to the log, and is settled there.
        """
        connections = self._registry.tenant(tenant).of_user(user_id)
        self._remember(tenant, user_id, ids)
        if self._ledger is not None:
            self._ledger.note_resent(tenant, ids)
        found = {id: self._settle_here(connections, id) for id in ids}
        self._writes.confirmed(tenant, user_id, ids)
        in_log = [id for id, held in found.items() if held is None or held.in_log]
        if in_log and self._logs is not None:
            self._note_settled(connections, in_log)
            self._writes.settle(tenant, user_id, in_log)
        return [id for id, held in found.items() if held is not None]

    def _let_go(self, held: Held) -> None:
        """No connection holds it any more."""
        held.settled = True
        id = held.notification.id
        for connection in held.connections:
            unconfirmed = connection.unconfirmed
            if unconfirmed is not None and id in unconfirmed:
                del unconfirmed[id]
                connection.ack_credit += 1
                if not unconfirmed:
                    connection.unconfirmed = None
        held.connections = ()
        if held.together is not None:
            held.together.leave()
        if held.stored:
            self._stored -= 1
        else:
            self.held -= 1
        self._forget_settled()

    def release(self, connection: Connection) -> None:
        """A connection ended: what only it held goes back to the user's log, in order.

        The connection must be out of the registry already.
        """
        self._to_ask.pop(connection, None)
        self._asked_early.discard(connection)
        # It is in the log or on its way there, and nobody holds it.
        self._moved_during_replay.pop(connection, None)
        connection.asked = None
        unconfirmed, connection.unconfirmed = connection.unconfirmed, None
        if not unconfirmed:
            return
        identity = connection.identity
        returned: list[Held | HeldTogether] = []
        for held in unconfirmed.values():
            if isinstance(held, HeldTogether):
                held.leave()
                self.held -= 1
            else:
                held.connections = tuple(
                    each for each in held.connections if each is not connection
                )
                if held.connections:
                    continue
                self._let_go(held)
                if held.stored:
                    continue
            returned.append(held)
        if not returned:
            self._forget_settled()
            return
        # A replay brings what was sent before what it took meanwhile.
        returned.sort(key=lambda held: held.since)
        # What others hold of before goes to the log between these, or who connects later would get
        # it out of its order.
        last = returned[-1].since
        earlier = [held for held in self.held_by_others(connection) if held.since < last]
        for held in earlier:
            self._leave_to_log(held)
        self._forget_settled()
        self._writes.give_back(
            identity.tenant,
            identity.user_id,
            [held.notification for held in merge(earlier, returned, key=lambda held: held.since)],
        )

    # --- confirming ---

    def acknowledge(
        self, tenant: str, user_id: str, ids: Sequence[str], *, by: Connection | None = None
    ) -> Eventually[AckAnswer]:
        """The user's own acks, over the connection `by` where it is known. Answered after the store
        settled them; a second ack is acked again. Raises Unavailable where a store that has to know
        is away: the client is to repeat it.
        """
        connections = self._registry.tenant(tenant).of_user(user_id)
        had = {id: [each for each in connections if each.was_sent(id)] for id in ids}
        here = frozenset([id for id, by_whom in had.items() if by_whom])
        held = {id: self._settle_here(connections, id) for id in ids}
        elsewhere = self._settle_elsewhere(tenant, user_id, held)
        # What goes back to the log just now would be in it again after it was settled.
        returning = self._writes.confirmed(tenant, user_id, ids)
        in_log = [id for id, found in held.items() if found is None or found.in_log]
        self._note_settled(connections, in_log)
        # What the client has been sent for sure, as far as is known.
        known = set(here | returning)

        def settle() -> Eventually[AckAnswer]:
            settled: Eventually[frozenset[str]] = frozenset()
            if in_log:
                heard = any(_heard_gap(id, had[id], by) for id in in_log)
                settled = self._writes.settle_acked(tenant, user_id, in_log, heard=heard)
            return then(and_then(settled, after_settling), answer)

        def after_settling(in_store: frozenset[str]) -> Eventually[frozenset[str]]:
            known.update(in_store)
            found = frozenset(known)
            if elsewhere is None:
                return in_ledger(found)
            return with_elsewhere(elsewhere, found)

        async def with_elsewhere(
            pending: Awaitable[frozenset[str]], found: frozenset[str]
        ) -> frozenset[str]:
            known.update(await pending)
            return await settled_value(in_ledger(found | known))

        def in_ledger(found: frozenset[str]) -> Eventually[frozenset[str]]:
            ledger = self._ledger
            if ledger is None:
                return found

            def without_ledger(error: Unavailable) -> frozenset[str]:
                if found.issuperset(held):
                    # Settled where it counts; only the account of it is away.
                    self._writes.note_is_lost(error)
                    return frozenset()
                raise error

            expected = rescue(
                lambda: ledger.acknowledge(tenant, user_id, list(held)), without_ledger
            )
            return then(expected, found.union)

        def answer(found: frozenset[str]) -> AckAnswer:
            for id in here:
                for connection in had[id]:
                    connection.take_left_to_log((id,))
            acked = [id for id in held if id in found]
            return AckAnswer(acked, [id for id in held if id not in found])

        def unanswered(error: Unavailable) -> AckAnswer:
            # They are not held any more, and maybe in no store: these connections are not to get
            # them again, and are to be acked when they ask again.
            now = self._clock()
            for id in known:
                for connection in had[id] or ((by,) if by is not None else connections):
                    if connection.state is State.OPEN:
                        connection.leave_to_log(id, now)
            raise error

        return rescue(settle, unanswered)

    def _settle_elsewhere(
        self, tenant: str, user_id: str, held: dict[str, Held | HeldTogether | None]
    ) -> Awaitable[frozenset[str]] | None:
        """Let other nodes go of what a device here confirmed; what is not held here may be there,
        which has to be awaited."""
        cluster = self._cluster
        if cluster is None:
            return None
        self._remember(tenant, user_id, list(held))
        shared = [id for id, record in held.items() if record is not None and record.shared]
        if shared:
            cluster.settled(tenant, user_id, shared)
        unknown = [id for id, record in held.items() if record is None]
        return cluster.settle(tenant, user_id, unknown) if unknown else None

    def _settle_here(
        self, connections: Sequence[Connection], id: str
    ) -> Held | HeldTogether | None:
        """Let every connection of the user go of it; what was held, or None."""
        found: Held | HeldTogether | None = None
        for connection in connections:
            unconfirmed = connection.unconfirmed
            held = unconfirmed.get(id) if unconfirmed else None
            if held is not None:
                if isinstance(held, HeldTogether):
                    self._settle_alone(connection, (id,), [], [], [])
                else:
                    self._let_go(held)
                if found is None or held.in_log:
                    found = held
        return found

    def _confirm(self, connection: Connection, ids: tuple[str, ...]) -> None:
        """The transport's sign of life confirms these ids, as far as they are still held."""
        identity = connection.identity
        confirmed: list[str] = []
        in_log: list[str] = []
        shared: list[str] = []
        connections = self._registry.tenant(identity.tenant).of_user(identity.user_id)
        if connections == (connection,):
            if self._settle_alike(connection, ids):
                self._confirmed(identity, ids, shared)
                return
            self._settle_alone(connection, ids, confirmed, in_log, shared)
        else:
            for id in ids:
                held = self._settle_here(connections, id)
                if held is not None:
                    confirmed.append(id)
                    if held.in_log:
                        in_log.append(id)
                    if held.shared:
                        shared.append(id)
        if connection.left_to_log and (left := connection.take_left_to_log(ids)):
            in_log += left
            confirmed += left
        if in_log:
            # They may be on their way there still, or once more where an answer was lost.
            self._writes.confirmed(identity.tenant, identity.user_id, in_log)
            self._note_settled(connections, in_log)
            heard = any(connection.was_sent_behind_gap(id) for id in in_log)
            self._writes.settle(identity.tenant, identity.user_id, in_log, heard=heard)
        if confirmed:
            self._confirmed(identity, confirmed, shared)

    def _confirmed(self, identity: Identity, ids: Sequence[str], shared: Sequence[str]) -> None:
        """Let the other nodes and the ledger know."""
        if self._cluster is not None:
            self._remember(identity.tenant, identity.user_id, ids)
            if shared:
                self._cluster.settled(identity.tenant, identity.user_id, shared)
        if self._ledger is not None:
            self._writes.note(self._ledger.confirm, identity.tenant, identity.user_id, ids)

    def _settle_alike(self, connection: Connection, ids: tuple[str, ...]) -> bool:
        """Settle what a Pong confirmed as many others have confirmed it; False where it is not
        that.

        The rule while many get the same: what is known of all of them is written down once.
        """
        unconfirmed = connection.unconfirmed
        if unconfirmed is None or connection.left_to_log is not None:
            return False
        count = len(ids)
        held = tuple(islice(unconfirmed.values(), count))
        if tuple(islice(unconfirmed, count)) != ids:
            return False
        if held != self._settled_alike:
            if not all(isinstance(each, HeldTogether) for each in held):
                return False
            self._note_settled_alike()
            self._settled_alike = held
        self._settled_alike_by += 1
        self.held -= count
        connection.ack_credit += count
        connection.unconfirmed = dict(islice(unconfirmed.items(), count, None)) or None
        return True

    def _note_settled_alike(self) -> None:
        """Until here only those who settled it know, which is all that anybody has to ask."""
        users, self._settled_alike_by = self._settled_alike_by, 0
        settled, self._settled_alike = self._settled_alike, ()
        for held in settled:
            if isinstance(held, HeldTogether):
                held.leave(users)
        if settled:
            self._forget_settled()

    def _settle_alone(
        self,
        connection: Connection,
        ids: Sequence[str],
        confirmed: list[str],
        in_log: list[str],
        shared: list[str],
    ) -> None:
        """`_settle_here` for a user's only connection, of many ids at once."""
        unconfirmed = connection.unconfirmed
        if unconfirmed is None:
            return
        before = len(confirmed)
        stored = 0
        for id in ids:
            held = unconfirmed.pop(id, None)
            if held is None:
                continue
            confirmed.append(id)
            if isinstance(held, HeldTogether):
                left = held.left = held.left - 1
                if left <= held.look_at:
                    held.look_after()
                continue
            held.settled = True
            held.connections = ()
            if held.in_log:
                in_log.append(id)
                stored += held.stored
            if held.shared:
                shared.append(id)
            if held.together is not None:
                held.together.leave()
        settled = len(confirmed) - before
        self._stored -= stored
        self.held -= settled - stored
        connection.ack_credit += settled
        if not unconfirmed:
            connection.unconfirmed = None
        self._forget_settled()

    def _forget_settled(self) -> None:
        self._oldest_first = _without_settled(self._oldest_first, self.held)
        self._stored_first = _without_settled(self._stored_first, self._stored)

    # --- while a replay is on ---

    def replay_begins(self, connection: Connection) -> None:
        """From here on, a page that was read before something was settled must not bring it."""
        connection.replays += 1
        identity = connection.identity
        settling = self._writes.settling(identity.tenant, identity.user_id)
        self._settled_during_replay[connection] = set(settling)

    def replay_ends(self, connection: Connection) -> None:
        """No page is under way any more."""
        del self._settled_during_replay[connection]
        self._moved_during_replay.pop(connection, None)

    def is_replaying(self, connection: Connection) -> bool:
        """Whether pages of the log are on their way to a connection."""
        return connection in self._settled_during_replay

    def was_settled(self, connection: Connection, id: str) -> bool:
        """Whether the user confirmed this since the connection's replay began."""
        return id in self._settled_during_replay.get(connection, ())

    def _note_settled(self, connections: Sequence[Connection], ids: Sequence[str]) -> None:
        if self._settled_during_replay:
            for connection in connections:
                if connection in self._settled_during_replay:
                    self._settled_during_replay[connection].update(ids)

    # --- asking ---

    def _ask_soon(self, connection: Connection) -> None:
        """Who holds something is asked already, or is to be asked."""
        if connection.acks or not connection.outbox.sink.pings:
            return
        self._to_ask[connection] = None
        unconfirmed = connection.unconfirmed
        if unconfirmed is not None and len(unconfirmed) >= ASK_AT and connection.asked is None:
            self._ask_early((connection,))

    def ask_replayed(self, connection: Connection) -> None:
        """A replay is over, and what it brought is written."""
        unconfirmed = connection.unconfirmed
        if (
            unconfirmed is not None
            and len(unconfirmed) >= ASK_REPLAYED_AT
            and connection in self._to_ask
            and connection.asked is None
        ):
            self._ask_early((connection,))

    def ask_waiting(self) -> None:
        """Ask every connection that took something since the last call (once a second).

        Who was asked since then, because he takes so much, will soon be for the same reason, and is
        asked here the next time if not.
        """
        self._note_settled_alike()
        waiting, self._to_ask = self._to_ask, {}
        early, self._asked_early = self._asked_early, set()
        now = []
        for connection in waiting:
            if connection.asked is not None or connection in early:
                self._to_ask[connection] = None
            else:
                now.append(connection)
        self._ask_all(now)

    def _ask_early(self, connections: Sequence[Connection]) -> None:
        """Not wait for the tick with those that have many to confirm."""
        self._asked_early.update(connections)
        self._ask_all(connections)

    def _ask_all(self, connections: Iterable[Connection]) -> None:
        """Write a Ping, whose Pong confirms all that was written before it (RFC 6455, section
        5.5.3), to each that has something to confirm.
        """
        counter = next(self._counter) & 0xFFFFFFFF
        ping = ping_frame(counter.to_bytes(4, "big"))
        for connection in connections:
            unconfirmed, outbox = connection.unconfirmed, connection.outbox
            left = connection.left_to_log
            if (
                (unconfirmed is None and left is None)
                or connection.acks
                or connection.asked is not None
                or connection.state is not State.OPEN
                or not outbox.sink.pings
            ):
                continue
            if outbox.holds_back:
                # What is held behind a replay is not written yet, and no Pong may confirm it.
                self._to_ask[connection] = None
                continue
            connection.asked = (counter, (*(left or ()), *(unconfirmed or ())))
            outbox.put(ping)

    def pong(self, connection: Connection, payload: bytes) -> None:
        """A Pong came; ours carries the counter of the Ping that is out."""
        asked = connection.asked
        if asked is None or payload != asked[0].to_bytes(4, "big"):
            return
        connection.asked = None
        if not connection.acks:
            self._confirm(connection, asked[1])
            if connection.unconfirmed is not None or connection.left_to_log is not None:
                self._to_ask[connection] = None

    def confirm_outlived(self, connection: Connection, now: float) -> None:
        """An SSE stream lived on: what was written `idle_timeout` ago counts as received."""
        outbox = connection.outbox
        unconfirmed, left = connection.unconfirmed, connection.left_to_log
        if unconfirmed is None and left is None:
            return
        if connection.acks or outbox.paused or outbox.holds_back:
            return
        before = now - self._idle_timeout
        if connection.opened_at > before:
            # What it shares with older connections was delivered to them long before it was to it.
            return
        outlived = [id for id, since in (left or {}).items() if since <= before]
        outlived += [id for id, held in (unconfirmed or {}).items() if held.since <= before]
        if outlived:
            self._confirm(connection, tuple(outlived))


def _heard_gap(id: str, had: Sequence[Connection], by: Connection | None) -> bool:
    """Whether an ack of this says that a gap was heard: of the connections that had it, which one
    acked may not be known."""
    asked = [each for each in had if by is None or each is by]
    return bool(asked) and all(each.was_sent_behind_gap(id) for each in asked)


def _without_settled(oldest_first: deque[HeldT], count: int) -> deque[HeldT]:
    """`count` of them are not settled: without the others, where that is cheap or they are many."""
    while oldest_first and oldest_first[0].settled:
        oldest_first.popleft()
    if len(oldest_first) > 2 * count + KEPT_SETTLED:
        return deque([each for each in oldest_first if not each.settled])
    return oldest_first
