"""The way of a notification: resolve the target, offer it, hold it, queue it, and say what became
of it.

Everything up to the store happens in one turn of the event loop, so that what one caller sends one
after the other reaches every connection in that order. Every recipient gets one outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TypeAlias

from notifyd.cluster.messages import UserOutcome
from notifyd.cluster.router import (
    NOWHERE,
    UNKNOWN,
    Cluster,
    Elsewhere,
    FoundElsewhere,
    Spreading,
)
from notifyd.connections.connection import Connection, State
from notifyd.connections.outbox import Flusher
from notifyd.connections.registry import Registry, TenantConnections
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.receipts import (
    joined,
    receipt_of_many,
    receipt_of_one,
    receipt_of_queued,
    with_others,
)
from notifyd.dispatch.repeats import Repeats
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.dispatch.targets import (
    admitted,
    count_per_channel,
    may_await,
    narrowed,
    resolve,
)
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually, and_then, is_awaitable, rescue, then
from notifyd.metrics import Metrics
from notifyd.notification import (
    MAX_NOTIFICATION_BYTES,
    Notification,
    Outcome,
    Receipt,
    RecipientResult,
    Target,
)
from notifyd.queue.base import AckLedger, Rejection, UserLogs
from notifyd.wire import Message, notification_message

_BY_ONE = RecipientResult(Outcome.DELIVERED, 1)

# Below this no notification can be over the limit with everything else that goes with its payload.
_SURELY_SMALL = MAX_NOTIFICATION_BYTES - 8192


UserSend: TypeAlias = tuple[str, Notification]
"""A user id, and what is for that user."""


class Dispatcher:
    """Sends notifications to whom they are for. `logs` or `ledger` is None where it is switched
    off, `cluster` where this is the only node. `store_first` is `queue.mode = "always"`: what is
    for a user is in his log before it is sent, so that it outlives this process. `tally(tenant,
    deliveries)` is told what each tenant sends, where somebody counts that.
    """

    def __init__(  # noqa: PLR0917  # the parts that it connects
        self,
        registry: Registry,
        flusher: Flusher,
        confirmations: Confirmations,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        writes: StoreWrites,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        store_first: bool = False,
        cluster: Cluster | None = None,
        tally: Callable[[str, int], None] | None = None,
    ) -> None:
        self._registry = registry
        self._flusher = flusher
        self._confirmations = confirmations
        self._logs = logs
        self._ledger = ledger
        self._writes = writes
        self._store_first = store_first
        self._cluster = cluster
        self._repeats = Repeats()
        self._tally = tally
        self._clock = clock
        self._metrics = metrics
        self._delivered_websocket = metrics.deliveries_total.labels("websocket")
        self._delivered_sse = metrics.deliveries_total.labels("sse")
        self._notifications = metrics.notifications_total.labels
        self._observe_seconds = metrics.dispatch_seconds.observe
        self._observe_average = metrics.dispatch_seconds.observe_average
        self._refused = metrics.delivery_failures_total.labels("slow")

    def dispatch(
        self,
        tenant: str,
        target: Target,
        notification: Notification,
        *,
        exclude_connection: str | None = None,
        source: str,
    ) -> Eventually[Receipt]:
        """Send one notification; `source` is the way it came in, for the metrics.

        Immediate unless a store must be awaited. Raises ValidationError where the encoded
        notification is over 64 KiB; cancelling the awaitable does not undo what was delivered.
        """
        started = perf_counter()
        self._notifications(target.type, source).inc()
        try:
            receipt = self._send(tenant, target, notification, exclude_connection)
            return receipt if self._tally is None else self._tallied(tenant, receipt)
        finally:
            self._observe_seconds(perf_counter() - started)

    def dispatch_each(
        self, tenant: str, sends: Sequence[UserSend], *, source: str
    ) -> list[Eventually[Receipt] | Exception]:
        """`dispatch` for many notifications to one user each, in their order.

        Where one could not be sent, its exception stands in its place. In `dispatch_seconds` each
        counts with the average of them all.
        """
        started = perf_counter()
        self._notifications("user", source).inc(len(sends))
        users = self._registry.tenant(tenant).users
        now = self._clock()
        at_once = self._cluster is None and not self._store_first
        # Where all who are connected here get it, and nothing else comes first.
        messages = [
            notification_message(notification)
            if at_once
            and user_id in users
            and (not (ttl := notification.ttl) or notification.occurred_at + ttl > now)
            and notification.audience.type == "All"
            and len(memoryview(notification.payload)) <= _SURELY_SMALL
            else None
            for user_id, notification in sends
        ]
        if self._ledger is not None:
            # What is expected of each is noted in one call, and as ever before it is written.
            sent = [
                (notification.id, user_id)
                for (user_id, notification), message in zip(sends, messages, strict=True)
                if message is not None
            ]
            if sent:
                self._writes.note(self._ledger.expect_each, tenant, sent)
        receipts: list[Eventually[Receipt] | Exception] = []
        websockets = streams = 0
        hold_alone = self._confirmations.hold_alone
        for (user_id, notification), message in zip(sends, messages, strict=True):
            try:
                if message is None:
                    target = Target("user", (user_id,))
                    receipts.append(self._send(tenant, target, notification, None))
                    continue
                # One of those before may have been the last that its connection could take.
                connections = users.get(user_id, ())
                if len(connections) != 1:
                    taken_by = self._offer(notification, message, connections)
                else:
                    # Most users have one device: counted together, and held before the next one is
                    # offered anything, which may be what closes this one.
                    (connection,) = connections
                    if connection.transport == "websocket":
                        taken_by = int(connection.outbox.put(message.websocket))
                        websockets += taken_by
                    else:
                        taken_by = int(connection.outbox.put(message.sse))
                        streams += taken_by
                    if taken_by:
                        hold_alone(notification, connections, now)
                    else:
                        self._refused.inc()
                receipts.append(
                    Receipt(notification.id, Outcome.DELIVERED, taken_by)
                    if taken_by
                    else self._queue(tenant, user_id, notification)
                )
            except Exception as error:  # noqa: BLE001  # the caller's to tell, of this one alone
                receipts.append(error)
        self._count(websockets, streams)
        if self._tally is not None:
            receipts = [
                each if isinstance(each, Exception) else self._tallied(tenant, each)
                for each in receipts
            ]
        self._observe_average(perf_counter() - started, len(sends))
        return receipts

    def _tallied(self, tenant: str, receipt: Eventually[Receipt]) -> Eventually[Receipt]:
        """Count it for its tenant, where that is asked for."""
        tally = self._tally

        def counted(receipt: Receipt) -> Receipt:
            if tally is not None:
                tally(tenant, receipt.delivered_to)
            return receipt

        return then(receipt, counted)

    def _send(
        self, tenant_name: str, target: Target, notification: Notification, exclude: str | None
    ) -> Eventually[Receipt]:
        message: Message | None = None
        if len(memoryview(notification.payload)) > _SURELY_SMALL:
            message = notification_message(notification)
        if notification.ttl and notification.is_over(self._clock()):
            return Receipt(notification.id, Outcome.EXPIRED)
        tenant = self._registry.tenant(tenant_name)
        if target.type == "user":
            return self._send_to_user(
                tenant_name, tenant, target.names[0], notification, message, exclude
            )
        if target.type == "users":
            return self._send_to_users(
                tenant_name, tenant, target.names, notification, message, exclude
            )
        receipt = self._send_to_connected(
            tenant_name, tenant, target, notification, message, exclude
        )
        if self._cluster is None:
            return receipt
        return self._spread(self._cluster, tenant_name, target, notification, exclude, receipt)

    # --- channels and broadcasts: for those who are connected ---

    def _send_to_connected(
        self,
        tenant_name: str,
        tenant: TenantConnections,
        target: Target,
        notification: Notification,
        message: Message | None,
        exclude: str | None,
    ) -> Receipt:
        entry = notification.entry
        if entry is not None and (before := self._repeats.given_to_connected(entry)) is not None:
            return before
        found = resolve(tenant, target)
        if not found.connections and target.type != "channels":
            return Receipt(notification.id, Outcome.NOBODY)
        recipients = narrowed(found, notification.audience, exclude)
        connections = recipients.connections
        if connections:
            message = message or notification_message(notification)
            if refused := self._flusher.give_up_full(recipients, message):
                self._refused.inc(refused)
                return self._send_to_connected(
                    tenant_name, tenant, target, notification, message, exclude
                )
            # The expectation is there before the first bytes are: no ack can come too early.
            if self._ledger is None:
                pass
            elif notification.require_ack:
                users = {connection.identity.user_id: None for connection in connections}
                self._writes.note(self._ledger.expect, tenant_name, notification.id, tuple(users))
            else:
                self._writes.note(self._ledger.expect_anyone, tenant_name, notification.id)
            started = perf_counter()
            self._flusher.put_all(recipients, message)
            self._metrics.fanout_seconds.observe(perf_counter() - started)
            self._count(recipients.websockets, recipients.streams)
            outcome = Outcome.DELIVERED
        else:
            outcome = Outcome.FILTERED if found.connections else Outcome.NOBODY
        counts = None
        if target.type == "channels":
            counts = count_per_channel(tenant, target.names, recipients)
        receipt = Receipt(notification.id, outcome, len(connections), channels=counts)
        if entry is not None and connections:
            self._repeats.note_connected(entry, receipt)
        return receipt

    def _count(self, websockets: int, streams: int, refused: int = 0) -> None:
        if websockets:
            self._delivered_websocket.inc(websockets)
        if streams:
            self._delivered_sse.inc(streams)
        if refused:
            self._refused.inc(refused)

    # --- users: held until confirmed, queued where nobody took it ---

    def _send_to_user(
        self,
        tenant_name: str,
        tenant: TenantConnections,
        user_id: str,
        notification: Notification,
        message: Message | None,
        exclude: str | None,
    ) -> Eventually[Receipt]:
        if self._stores_first(notification):
            if self._cluster is None and exclude is None and notification.audience.type == "All":
                return self._writes.in_turn(
                    tenant_name,
                    (user_id,),
                    lambda: self._store_then_send_to_one(tenant_name, user_id, notification),
                )
            return self._writes.in_turn(
                tenant_name,
                (user_id,),
                lambda: self._store_then_send(
                    tenant_name, (user_id,), notification, exclude, receipt_of_one
                ),
            )
        outcome, connections = Outcome.NOBODY, 0
        if user_id in tenant.users:
            message = message or notification_message(notification)
            outcome, connections = self._deliver(tenant, user_id, notification, message, exclude)
        if outcome is Outcome.DELIVERED:
            self._expect(tenant_name, notification, (user_id,))
        if self._cluster is not None:
            return self._send_elsewhere(
                self._cluster, tenant_name, user_id, notification, exclude, (outcome, connections)
            )
        if outcome is not Outcome.NOBODY:
            return Receipt(notification.id, outcome, connections)
        return self._queue(tenant_name, user_id, notification)

    def _queue(
        self, tenant_name: str, user_id: str, notification: Notification
    ) -> Eventually[Receipt]:
        """Keep it for a user whom no connection took it for."""
        if not may_await(notification.audience, user_id):
            return Receipt(notification.id, Outcome.FILTERED)
        if self._logs is None or not notification.storable:
            return Receipt(notification.id, Outcome.NOBODY)
        stored = self._enqueue(self._logs, tenant_name, (user_id,), notification)
        return then(stored, lambda rejections: receipt_of_queued(notification.id, rejections[0]))

    def _expect(
        self,
        tenant_name: str,
        notification: Notification,
        users: Sequence[str],
        *,
        queued: bool = False,
    ) -> None:
        if self._ledger is not None and users:
            self._writes.note(
                self._ledger.expect, tenant_name, notification.id, users, queued=queued
            )

    def _deliver(
        self,
        tenant: TenantConnections,
        user_id: str,
        notification: Notification,
        message: Message,
        exclude: str | None,
        *,
        shared: bool = False,
    ) -> tuple[Outcome, int]:
        """Offer to a user's connections and hold; NOBODY where none is left that could take it."""
        entry = notification.entry
        if entry is not None and (before := self._repeats.given_to_user(entry, user_id)):
            return Outcome.DELIVERED, before
        connections = tenant.users[user_id]
        if exclude is not None or notification.audience.type != "All":
            connections = tuple(_admitted(connections, notification, exclude))
            if not connections:
                return Outcome.FILTERED, 0
        taken_by = self._offer(notification, message, connections, shared=shared)
        if entry is not None and taken_by:
            self._repeats.note_user(entry, user_id, taken_by)
        return (Outcome.DELIVERED if taken_by else Outcome.NOBODY), taken_by

    def _offer(
        self,
        notification: Notification,
        message: Message,
        connections: tuple[Connection, ...],
        *,
        shared: bool = False,
    ) -> int:
        """Offer to a user's connections and hold; how many took it, now or before under this id."""
        if len(connections) == 1:
            # Most users have one device: no lists, no loops.
            (connection,) = connections
            if connection.unconfirmed and notification.id in connection.unconfirmed:
                return 1
            if connection.transport == "websocket":
                accepted = connection.outbox.put(message.websocket)
                delivered = self._delivered_websocket
            else:
                accepted = connection.outbox.put(message.sse)
                delivered = self._delivered_sse
            if not accepted:
                self._refused.inc()
                return 0
            delivered.inc()
            self._confirmations.hold(notification, connections, shared=shared)
            return 1
        id = notification.id
        offered = []
        known = 0
        for connection in connections:
            if connection.unconfirmed and id in connection.unconfirmed:
                known += 1
            elif connection.offer(message):
                offered.append(connection)
        # One that took it may have been given up to make room for it in another.
        taken_by = tuple(each for each in offered if each.state is State.OPEN)
        streams = sum(connection.transport == "sse" for connection in taken_by)
        refused = len(connections) - known - len(taken_by)
        self._count(len(taken_by) - streams, streams, refused)
        if taken_by:
            self._confirmations.hold(notification, taken_by, shared=shared)
        return known + len(taken_by)

    def _send_to_users(
        self,
        tenant_name: str,
        tenant: TenantConnections,
        user_ids: Sequence[str],
        notification: Notification,
        message: Message | None,
        exclude: str | None,
    ) -> Eventually[Receipt]:
        if self._stores_first(notification):
            distinct = tuple(dict.fromkeys(user_ids))
            return self._writes.in_turn(
                tenant_name,
                distinct,
                lambda: self._store_then_send(
                    tenant_name, distinct, notification, exclude, receipt_of_many
                ),
            )
        message = message or notification_message(notification)
        started = perf_counter()
        results: dict[str, RecipientResult] = {}
        delivered: list[str] = []
        away: list[str] = []
        takers: list[Connection] = []
        for_all = (
            exclude is None and notification.audience.type == "All" and notification.entry is None
        )
        users = tenant.users
        id = notification.id
        open_before = len(self._registry)
        for user_id in user_ids:
            if user_id in results:
                continue
            outcome, connections = Outcome.NOBODY, 0
            devices = users.get(user_id)
            if devices is None:
                pass
            elif for_all and len(devices) == 1:
                # Most users have one device, and all of those are held for in one.
                (device,) = devices
                if (device.unconfirmed and id in device.unconfirmed) or device.offer(message):
                    takers.append(device)
                    results[user_id] = _BY_ONE
                    continue
                self._refused.inc()
            else:
                outcome, connections = self._deliver(
                    tenant, user_id, notification, message, exclude
                )
            if outcome is Outcome.DELIVERED:
                delivered.append(user_id)
            elif outcome is Outcome.NOBODY:
                if not may_await(notification.audience, user_id):
                    outcome = Outcome.FILTERED
                else:
                    away.append(user_id)
            results[user_id] = RecipientResult(outcome, connections)
        if len(self._registry) != open_before:
            # Some that took it were given up to make room for it in others.
            gone = [each.identity.user_id for each in takers if each.state is not State.OPEN]
            takers = [each for each in takers if each.state is State.OPEN]
            results.update(dict.fromkeys(gone, RecipientResult(Outcome.NOBODY)))
            self._refused.inc(len(gone))
            away += gone
        if takers:
            self._hold_each(notification, takers)
            # The connections' own strings, so that a thousand notifications to them share those.
            delivered += [each.identity.user_id for each in takers]
        self._metrics.fanout_seconds.observe(perf_counter() - started)
        self._expect(tenant_name, notification, delivered)
        if self._cluster is not None:
            return self._send_many_elsewhere(
                self._cluster, tenant_name, notification, exclude, results
            )
        return self._queue_for_many(tenant_name, notification, results, away)

    def _queue_for_many(
        self,
        tenant_name: str,
        notification: Notification,
        results: dict[str, RecipientResult],
        away: list[str],
    ) -> Eventually[Receipt]:
        """`away` are those among the recipients who are to be queued for."""
        if not away or self._logs is None or not notification.storable:
            return receipt_of_many(notification.id, results)

        def with_queued(rejections: Sequence[Rejection | None]) -> Receipt:
            for user_id, rejection in zip(away, rejections, strict=True):
                results[user_id] = (
                    RecipientResult(Outcome.QUEUED)
                    if rejection is None
                    else RecipientResult(Outcome.FAILED, reason=rejection)
                )
            return receipt_of_many(notification.id, results)

        logs = self._logs
        stored = rescue(
            lambda: self._enqueue(logs, tenant_name, away, notification),
            lambda error: self._unavailable(len(away)),
        )
        return then(stored, with_queued)

    def _hold_each(self, notification: Notification, takers: Sequence[Connection]) -> None:
        streams = sum([each.transport == "sse" for each in takers])
        self._count(len(takers) - streams, streams)
        self._confirmations.hold_each(notification, takers)

    def _unavailable(self, recipients: int) -> Sequence[Rejection | None]:
        """The outcome of several recipients while the store is away; a single one's is a 503."""
        self._metrics.delivery_failures_total.labels("unavailable").inc(recipients)
        return ["unavailable"] * recipients

    def _enqueue(
        self, logs: UserLogs, tenant_name: str, user_ids: Sequence[str], notification: Notification
    ) -> Eventually[Sequence[Rejection | None]]:
        def enqueue() -> Eventually[Sequence[Rejection | None]]:
            return then(
                logs.enqueue(tenant_name, user_ids, notification),
                lambda rejections: self._enqueued(tenant_name, user_ids, notification, rejections),
            )

        return self._writes.in_turn(tenant_name, user_ids, enqueue)

    def _enqueued(
        self,
        tenant_name: str,
        user_ids: Sequence[str],
        notification: Notification,
        rejections: Sequence[Rejection | None],
    ) -> Sequence[Rejection | None]:
        kept = [
            user_id
            for user_id, rejection in zip(user_ids, rejections, strict=True)
            if rejection is None
        ]
        if kept:
            self._metrics.queue_enqueued_total.inc(len(kept))
            self._expect(tenant_name, notification, kept, queued=True)
            # A store that had to be awaited answers later: they may have connected meanwhile.
            tenant = self._registry.tenant(tenant_name)
            for user_id in kept:
                if user_id in tenant.users:
                    self._writes.on_returned(tenant_name, user_id, before_live=True)
            if self._cluster is not None:
                self._cluster.replay(tenant_name, kept, before_live=True)
        if len(kept) < len(user_ids):
            self._count_failures([each for each in rejections if each is not None])
        return rejections

    def _count_failures(self, reasons: Sequence[str]) -> None:
        for reason in dict.fromkeys(reasons):
            self._metrics.delivery_failures_total.labels(reason).inc(reasons.count(reason))

    # --- stored before it is sent ---

    def _stores_first(self, notification: Notification) -> bool:
        # Who is subscribed to what is known of connections alone, so that nothing can be kept.
        return (
            self._store_first
            and self._logs is not None
            and notification.storable
            and notification.audience.type != "Channels"
        )

    def _store_then_send(
        self,
        tenant_name: str,
        user_ids: Sequence[str],
        notification: Notification,
        exclude: str | None,
        receipt: Callable[[str, dict[str, RecipientResult]], Receipt],
    ) -> Eventually[Receipt]:
        """Store for every recipient, then send to those who were connected when that began.

        Who connects meanwhile, or is replayed to, gets it from his log, in its order there.
        """
        message = notification_message(notification)
        tenant = self._registry.tenant(tenant_name)
        results: dict[str, RecipientResult] = {}
        ready: dict[str, dict[Connection, int]] = {}
        # The connections here are left out; there may be others on other nodes.
        uncertain: set[str] = set()
        for user_id in user_ids:
            found = tenant.of_user(user_id)
            connections = _admitted(found, notification, exclude)
            awaits = may_await(notification.audience, user_id)
            if found and not connections and awaits and self._cluster is not None:
                uncertain.add(user_id)
            if connections or user_id in uncertain or (not found and awaits):
                ready[user_id] = {
                    each: each.replays
                    for each in connections
                    if not self._confirmations.is_replaying(each)
                }
            results[user_id] = RecipientResult(Outcome.FILTERED)
        recipients = tuple(ready)
        logs = self._logs
        if not recipients or logs is None:
            return receipt(notification.id, results)

        def send(rejections: Sequence[Rejection | None]) -> Eventually[Receipt]:
            send_here(rejections)
            if self._cluster is None:
                return after_all(rejections)
            return self._send_stored_elsewhere(
                self._cluster,
                tenant_name,
                notification,
                exclude,
                (results, uncertain, dict(zip(recipients, rejections, strict=True))),
                lambda: after_all(rejections),
            )

        def send_here(rejections: Sequence[Rejection | None]) -> None:
            delivered: list[str] = []
            for user_id, rejection in zip(recipients, rejections, strict=True):
                connections = [
                    each
                    for each, replays in ready[user_id].items()
                    # A replay that began meanwhile may have brought it, or not.
                    if each.replays == replays
                ]
                result = self._send_stored(notification, message, connections, rejection)
                results[user_id] = result
                if result.outcome is Outcome.DELIVERED:
                    delivered.append(user_id)
                now = self._registry.tenant(tenant_name).of_user(user_id)
                # As a rule nothing has changed, and there is nothing to look for.
                if (
                    rejection is None
                    and list(now) != connections
                    and any(
                        each not in connections
                        for each in admitted(now, notification.audience, exclude)
                    )
                ):
                    self._writes.on_returned(tenant_name, user_id, before_live=True)
            self._expect(tenant_name, notification, delivered)

        def after_all(rejections: Sequence[Rejection | None]) -> Receipt:
            queued = [
                user_id for user_id in recipients if results[user_id].outcome is Outcome.QUEUED
            ]
            self._expect(tenant_name, notification, queued, queued=True)
            self._metrics.queue_enqueued_total.inc(rejections.count(None))
            if rejections.count(None) < len(rejections):
                failed = [results[user_id].reason for user_id in recipients]
                self._count_failures([reason for reason in failed if reason is not None])
            return receipt(notification.id, results)

        def refused(error: Unavailable) -> Sequence[Rejection | None]:
            return ["unavailable"] * len(recipients)

        if len(user_ids) == 1:
            # Where the store is away, that is the answer.
            return and_then(logs.enqueue(tenant_name, recipients, notification), send)
        return and_then(
            rescue(lambda: logs.enqueue(tenant_name, recipients, notification), refused), send
        )

    def _store_then_send_to_one(
        self, tenant_name: str, user_id: str, notification: Notification
    ) -> Eventually[Receipt]:
        """`_store_then_send` for one user of the only node, all of whose connections may receive:
        by far the most common case."""
        logs = self._logs
        assert logs is not None  # noqa: S101  # for the type checker
        message = notification_message(notification)
        tenant = self._registry.tenant(tenant_name)
        is_replaying = self._confirmations.is_replaying
        ready = [(each, each.replays) for each in tenant.of_user(user_id) if not is_replaying(each)]

        def send(rejections: Sequence[Rejection | None]) -> Receipt:
            (rejection,) = rejections
            # A replay that began meanwhile may have brought it, or not.
            connections = [each for each, replays in ready if each.replays == replays]
            result = self._send_stored(notification, message, connections, rejection)
            outcome = result.outcome
            if rejection is None:
                self._metrics.queue_enqueued_total.inc()
                now = self._registry.tenant(tenant_name).of_user(user_id)
                # As a rule nothing has changed, and there is nothing to look for.
                if list(now) != connections and any(each not in connections for each in now):
                    self._writes.on_returned(tenant_name, user_id, before_live=True)
            elif result.reason is not None:
                self._count_failures((result.reason,))
            if outcome is Outcome.DELIVERED:
                self._expect(tenant_name, notification, (user_id,))
                return Receipt(notification.id, outcome, result.connections)
            if outcome is Outcome.QUEUED:
                self._expect(tenant_name, notification, (user_id,), queued=True)
            return receipt_of_one(notification.id, {user_id: result})

        return and_then(logs.enqueue(tenant_name, (user_id,), notification), send)

    def _send_stored(
        self,
        notification: Notification,
        message: Message,
        connections: Sequence[Connection],
        rejection: Rejection | None,
        *,
        shared: bool = False,
    ) -> RecipientResult:
        """Offer to a user's connections what his log has, or could not take."""
        if rejection == "unavailable":
            return RecipientResult(Outcome.FAILED, reason=rejection)
        id = notification.id
        entry = notification.entry
        if entry is not None and connections:
            identity = connections[0].identity
            if before := self._repeats.given_to_user(entry, identity.user_id):
                self._settle_again(identity.tenant, identity.user_id, id)
                return RecipientResult(Outcome.DELIVERED, before)
        taken_by = [
            connection
            for connection in connections
            if connection.state is State.OPEN
            # Something else of the same id may be there already.
            and (
                (connection.unconfirmed and id in connection.unconfirmed)
                or connection.offer(message)
            )
        ]
        if len(taken_by) > 1:
            # One that took it may have been given up to make room for it in another.
            taken_by = [connection for connection in taken_by if connection.state is State.OPEN]
        if taken_by:
            streams = sum([connection.transport == "sse" for connection in taken_by])
            self._count(len(taken_by) - streams, streams)
            if rejection is None:
                self._confirmations.hold_all_stored(notification, taken_by, shared=shared)
            else:
                self._confirmations.hold(notification, tuple(taken_by), shared=shared)
            if entry is not None:
                self._repeats.note_user(entry, taken_by[0].identity.user_id, len(taken_by))
            return RecipientResult(Outcome.DELIVERED, len(taken_by))
        if rejection is None:
            return RecipientResult(Outcome.QUEUED)
        return RecipientResult(Outcome.FAILED, reason=rejection)

    def _settle_again(self, tenant: str, user_id: str, id: str) -> None:
        """An entry that is dispatched again is in his log anew, though he may have confirmed it."""
        if self._confirmations.was_confirmed(tenant, user_id, id):
            self._writes.settle(tenant, user_id, (id,))

    # --- other nodes ---

    def _send_elsewhere(
        self,
        cluster: Cluster,
        tenant_name: str,
        user_id: str,
        notification: Notification,
        exclude: str | None,
        here: tuple[Outcome, int],
    ) -> Awaitable[Receipt]:
        """To a user's connections on other nodes, after those here."""
        receipt: asyncio.Future[Receipt] = self._flusher.loop.create_future()
        outcome, connections = here

        def sent(there: Elsewhere) -> Eventually[Receipt]:
            # Where Redis has yet to say who else has it, others may.
            if connections and (there.nodes or not there.known):
                self._confirmations.is_shared(tenant_name, user_id, notification.id)
            result = joined(RecipientResult(outcome, connections), there)
            if result.outcome is Outcome.NOBODY:
                return self._queue(tenant_name, user_id, notification)
            routed = there.routed
            delivered = result.connections if result.outcome is Outcome.DELIVERED else 0
            return Receipt(notification.id, result.outcome, delivered, routed)

        cluster.to_user(
            tenant_name,
            user_id,
            notification,
            exclude=exclude,
            stored=False,
            patient=not connections,
            done=lambda there: _resolve(receipt, lambda: sent(there)),
        )
        return receipt

    def _send_many_elsewhere(
        self,
        cluster: Cluster,
        tenant_name: str,
        notification: Notification,
        exclude: str | None,
        results: dict[str, RecipientResult],
    ) -> Awaitable[Receipt]:
        """To the connections of many users on other nodes; `results` says what became of each
        here."""
        receipt: asyncio.Future[Receipt] = self._flusher.loop.create_future()

        def sent(found: FoundElsewhere) -> Eventually[Receipt]:
            # As above, where nothing is known.
            shared = results if found is None else found
            for user_id in [each for each in shared if results[each].connections]:
                self._confirmations.is_shared(tenant_name, user_id, notification.id)
            for user_id, there in (found or {}).items():
                results[user_id] = joined(results[user_id], there)
            away = [each for each, result in results.items() if result.outcome is Outcome.NOBODY]
            return self._queue_for_many(tenant_name, notification, results, away)

        cluster.to_users(
            tenant_name,
            tuple(results),
            notification,
            exclude=exclude,
            stored=False,
            patient=any(each.outcome is Outcome.NOBODY for each in results.values()),
            done=lambda found: _resolve(receipt, lambda: sent(found)),
        )
        return receipt

    def _send_stored_elsewhere(
        self,
        cluster: Cluster,
        tenant_name: str,
        notification: Notification,
        exclude: str | None,
        here: tuple[dict[str, RecipientResult], set[str], dict[str, Rejection | None]],
        finished: Callable[[], Receipt],
    ) -> Awaitable[Receipt]:
        """To the connections on other nodes of users whose logs have it, or are full.

        `here`: what became of each, whose connections here were all left out, what the store said.
        """
        receipt: asyncio.Future[Receipt] = self._flusher.loop.create_future()
        results, uncertain, rejections = here
        stored = [each for each, rejection in rejections.items() if rejection is None]
        full = [each for each, rejection in rejections.items() if rejection == "queue_full"]
        missing = bool(stored) + bool(full)

        def sent(users: Sequence[str], found: FoundElsewhere) -> None:
            nonlocal missing
            untold = []
            for user_id in users:
                there = UNKNOWN if found is None else found.get(user_id, NOWHERE)
                if there.nodes and results[user_id].outcome is Outcome.DELIVERED:
                    self._confirmations.is_shared(tenant_name, user_id, notification.id)
                result = results[user_id] = joined(results[user_id], there)
                queued = result.outcome is Outcome.QUEUED and not there.queued
                if queued and there.known and user_id in uncertain:
                    # There is nobody but who was left out.
                    self._writes.settle(tenant_name, user_id, (notification.id,))
                    results[user_id] = RecipientResult(Outcome.FILTERED)
                if users is stored and not there.known:
                    untold.append(user_id)
            if untold:
                # Whoever has one of them is told when Redis is back for this node.
                cluster.replay(tenant_name, untold, before_live=True)
            missing -= 1
            if not missing:
                _resolve(receipt, finished)

        if not missing:
            _resolve(receipt, finished)
        for users, in_log in ((stored, True), (full, False)):
            if users:
                cluster.to_users(
                    tenant_name,
                    users,
                    notification,
                    exclude=exclude,
                    stored=in_log,
                    patient=bool(uncertain),
                    done=partial(sent, users),
                )
        return receipt

    def _spread(
        self,
        cluster: Cluster,
        tenant_name: str,
        target: Target,
        notification: Notification,
        exclude: str | None,
        here: Receipt,
    ) -> Awaitable[Receipt]:
        """To who is connected to other nodes; `here` is what became of it on this one."""
        receipt: asyncio.Future[Receipt] = self._flusher.loop.create_future()

        others = cluster.nodes.has_others()

        def sent(there: Spreading) -> None:
            if others:
                self._flusher.answer_came()
            if not receipt.done():
                receipt.set_result(with_others(here, there))

        if others:
            self._flusher.answer_is_due()
        cluster.to_connected(tenant_name, target, notification, exclude=exclude, done=sent)
        return receipt

    def take_for_users(
        self,
        tenant: str,
        users: Sequence[str],
        notification: Notification,
        *,
        exclude: str | None,
        stored: bool,
        shared: bool,
    ) -> list[tuple[UserOutcome, int]]:
        """What another node sent to users here; see `notifyd.cluster.router.Receiver`."""
        message = notification_message(notification)
        connected = self._registry.tenant(tenant)
        results = []
        delivered = []
        for user_id in users:
            if user_id not in connected.users:
                results.append((_TOLD[Outcome.NOBODY], 0))
                continue
            if stored:
                outcome, connections = self._take_stored(
                    connected, user_id, notification, message, exclude, shared
                )
            else:
                outcome, connections = self._deliver(
                    connected, user_id, notification, message, exclude, shared=shared
                )
            if outcome is Outcome.DELIVERED:
                delivered.append(user_id)
            results.append((_TOLD[outcome], connections))
        self._expect(tenant, notification, delivered)
        return results

    def _take_stored(
        self,
        tenant: TenantConnections,
        user_id: str,
        notification: Notification,
        message: Message,
        exclude: str | None,
        shared: bool,
    ) -> tuple[Outcome, int]:
        connections = _admitted(tenant.users[user_id], notification, exclude)
        if not connections:
            return Outcome.FILTERED, 0
        if self._confirmations.was_confirmed(tenant.name, user_id, notification.id):
            # His log was faster: he has read it there, and is done with it.
            if notification.entry is not None:
                self._settle_again(tenant.name, user_id, notification.id)
            return Outcome.DELIVERED, len(connections)
        ready = [each for each in connections if not self._confirmations.is_replaying(each)]
        if len(ready) < len(connections):
            # In the middle of a replay that may have been there already, or not.
            self._writes.on_returned(tenant.name, user_id, before_live=True)
        result = self._send_stored(notification, message, ready, None, shared=shared)
        return result.outcome, result.connections

    def take_for_connected(
        self, tenant: str, target: Target, notification: Notification, exclude: str | None
    ) -> tuple[Outcome, int, Sequence[int]]:
        """What another node sent to who is connected; see `notifyd.cluster.router.Receiver`."""
        connected = self._registry.tenant(tenant)
        receipt = self._send_to_connected(tenant, connected, target, notification, None, exclude)
        channels = receipt.channels or {}
        return receipt.outcome, receipt.delivered_to, [channels.get(name, 0) for name in channels]


_TOLD: dict[Outcome, UserOutcome] = {
    Outcome.DELIVERED: "delivered",
    Outcome.FILTERED: "filtered",
    Outcome.QUEUED: "queued",
    Outcome.NOBODY: "nobody",
}


def _admitted(
    connections: Sequence[Connection], notification: Notification, exclude: str | None
) -> Sequence[Connection]:
    """A user's connections that may receive. What one of them is left out of may still come back
    from another one that dies, or from the log."""
    if exclude is not None:
        for connection in connections:
            if connection.id == exclude:
                connection.leave_out(notification.id)
    return admitted(connections, notification.audience, exclude)


def _resolve(receipt: asyncio.Future[Receipt], work: Callable[[], Eventually[Receipt]]) -> None:
    """Give a receipt what `work` gives or raises, now or later. Never raises."""
    try:
        value = work()
    except Exception as error:  # noqa: BLE001  # whoever awaits the receipt gets it
        if not receipt.done():
            receipt.set_exception(error)
        return
    if is_awaitable(value):
        asyncio.ensure_future(value).add_done_callback(partial(_copy, receipt))
    elif not receipt.done():
        receipt.set_result(value)


def _copy(receipt: asyncio.Future[Receipt], ended: asyncio.Future[Receipt]) -> None:
    error = None if ended.cancelled() else ended.exception()
    if receipt.done():
        return
    if ended.cancelled():
        receipt.cancel()
    elif error is not None:
        receipt.set_exception(error)
    else:
        receipt.set_result(ended.result())
