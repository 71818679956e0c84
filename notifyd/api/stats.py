"""The server's figures."""

from __future__ import annotations

from collections import Counter as CountPerName
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Literal, Protocol, TypeVar

import msgspec

from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.api.others import NodeFigures, Others
from notifyd.connections.registry import Registry
from notifyd.errors import Forbidden, Unavailable
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.identity import Principal
from notifyd.metrics import FAILURE_REASONS, SOURCES, TARGETS, TRANSPORTS, Counter, Metrics
from notifyd.queue.base import AckLedger, AckStats, UserLogs
from notifyd.resilience import BreakerState, CircuitBreaker

T = TypeVar("T")


class ConnectionFigures(msgspec.Struct, gc=False):
    """Connections open now; `channels` maps each channel to its subscribers."""

    total_connections: int
    unique_users: int
    websocket: int
    sse: int
    channels: dict[str, int]


class ConnectionTotals(msgspec.Struct, gc=False):
    """Connections open now."""

    total: int
    unique_users: int
    channels: int


class UserFigures(msgspec.Struct, gc=False):
    """Users with at least one connection."""

    connected: int


class ChannelFigures(msgspec.Struct, gc=False):
    """Channels with at least one subscriber, and all subscriptions."""

    active: int
    subscriptions: int


class NotificationFigures(msgspec.Struct, gc=False):
    """Since the start, of all tenants. `total_sent` counts notifications, `total_delivered`
    connections."""

    total_sent: int
    total_delivered: int
    total_failed: int
    user_notifications: int
    broadcast_notifications: int
    channel_notifications: int


class QueueFigures(msgspec.Struct, gc=False):
    """What waits for users who are not connected, of all tenants; `total_messages` is null while
    the store does not answer, and for a key that is bound to one tenant."""

    enabled: bool
    backend: str
    total_messages: int | None


class AckFigures(msgspec.Struct, gc=False):
    """Of this process since its start, where memory keeps the ledger; in a store of all nodes, and
    since the store was empty. `pending_count` is of now; times in ms, null before the first ack."""

    enabled: bool
    total_tracked: int
    total_acked: int
    total_expired: int
    pending_count: int
    ack_rate: float
    avg_latency_ms: float | None
    p95_latency_ms: float | None


class StoreFigures(msgspec.Struct, gc=False, omit_defaults=True):
    """A store; `disabled` where nothing uses it, `degraded` where it does not answer as it should.

    While `breaker` is not `closed`, calls to the store fail at once.
    """

    status: Literal["connected", "degraded", "disabled"]
    connected: bool
    breaker: Literal["closed", "open", "half_open"] | None = None


class Figures(msgspec.Struct, gc=False):
    """All of it; `ack` is null while its store does not answer. `notifications` and `ack` are of
    all tenants, and null for a key that is bound to one.
    """

    connections: ConnectionFigures
    users: UserFigures
    channels: ChannelFigures
    notifications: NotificationFigures | None
    queue: QueueFigures
    ack: AckFigures | None
    redis: StoreFigures
    postgres: StoreFigures


class Store(Protocol):
    """What notifyd.redis_client and notifyd.postgres say of themselves."""

    @property
    def up(self) -> bool:
        """Whether it answered last."""

    @property
    def breaker(self) -> CircuitBreaker:
        """Whether it is asked at all."""


class Stores(msgspec.Struct, frozen=True):
    """The stores in use, None for one that is not; the server is not ready without the required."""

    redis: Store | None = None
    postgres: Store | None = None
    required: frozenset[Literal["redis", "postgres"]] = frozenset()

    def figures(self) -> dict[str, StoreFigures]:
        """Of each, by its name."""
        return {"redis": _store_figures(self.redis), "postgres": _store_figures(self.postgres)}

    def down(self) -> list[str]:
        """The names of those that do not answer."""
        return [name for name, each in self.figures().items() if each.status == "degraded"]


NO_STORES = Stores()

_BREAKER: dict[BreakerState, Literal["closed", "open", "half_open"]] = {
    BreakerState.CLOSED: "closed",
    BreakerState.OPEN: "open",
    BreakerState.HALF_OPEN: "half_open",
}
_NO_ACKS = AckFigures(False, 0, 0, 0, 0, 0.0, None, None)


class Stats:
    """The handlers of figures. `logs` and `ledger` are None where they are switched off.

    What a store does not answer is left out, so that figures can be had when they are needed most.
    """

    def __init__(
        self,
        guard: Guard,
        registry: Registry,
        metrics: Metrics,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        *,
        queue_backend: str,
        stores: Stores,
    ) -> None:
        self.stores = stores
        self.others: Others | None = None
        """The other nodes of the cluster; None where this is the only one."""
        self._guard = guard
        self._registry = registry
        self._metrics = metrics
        self._logs = logs
        self._ledger = ledger
        self._queue_backend = queue_backend

    def endpoints(self) -> list[Endpoint]:
        """The figures, under both of their paths, and the ledger's alone."""
        description = Description("The server's figures", "Operations", answer=Figures)
        return [
            Endpoint(self._guard, "GET", "/stats", self.all, description, access="read"),
            Endpoint(self._guard, "GET", "/api/v1/stats", self.all, description, access="read"),
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/stats/acks",
                self.acks,
                Description("The ledger's figures", "Operations", answer=AckFigures),
                access="read",
            ),
        ]

    def connections(self, tenant_name: str) -> ConnectionFigures:
        """Of one tenant."""
        tenant = self._registry.tenant(tenant_name)
        total = len(tenant.connections)
        streams = sum(each.transport == "sse" for each in tenant.connections.values())
        return ConnectionFigures(
            total,
            len(tenant.users),
            total - streams,
            streams,
            {name: len(channel.connections) for name, channel in tenant.channels.items()},
        )

    def queue(self, *, hidden: bool = False) -> Eventually[QueueFigures]:
        """Of all tenants; `hidden` from who may not know of all."""
        if self._logs is None:
            return QueueFigures(False, self._queue_backend, 0)
        if hidden:
            return QueueFigures(True, self._queue_backend, None)
        depth = or_none(self._logs.depth)
        if is_awaitable(depth):
            return self._queue_later(depth)
        return QueueFigures(True, self._queue_backend, depth)

    async def _queue_later(self, depth: Awaitable[int | None]) -> QueueFigures:
        return QueueFigures(True, self._queue_backend, await depth)

    def bound(self, principal: Principal) -> bool:
        """Whether this caller may know of one tenant alone."""
        return self._guard.tenants.enabled and principal.tenant is not None

    def require_unbound(self, principal: Principal) -> None:
        """Raises Forbidden where he may not know of all tenants."""
        if self.bound(principal):
            raise Forbidden(
                f'These figures are of all tenants, and the API key "{principal.name}" is bound to '
                "one."
            )

    def connected(self, tenant_name: str | None) -> ConnectionTotals:
        """Of one tenant or all."""
        registry = self._registry
        if tenant_name is None:
            return ConnectionTotals(len(registry), registry.users, registry.channels)
        tenant = registry.tenant(tenant_name)
        return ConnectionTotals(len(tenant.connections), len(tenant.users), len(tenant.channels))

    def acks(self, request: Request) -> Eventually[AckFigures]:
        """GET /api/v1/stats/acks."""
        self.require_unbound(request.principal)
        if self._ledger is None:
            return _NO_ACKS
        return then(self._ledger.stats(), _ack_figures)

    def all(self, request: Request) -> Eventually[Figures]:
        """GET /stats and GET /api/v1/stats."""
        if self.bound(request.principal):
            hidden = self.queue(hidden=True)
            if self.others is not None:
                return self._bound_later(request, hidden, self.others)
            return then(
                hidden, lambda queue: self._figures(request, queue, None, notifications=None)
            )
        queue, acks = self.queue(), or_none(partial(self.acks, request))
        if self.others is not None or is_awaitable(queue) or is_awaitable(acks):
            return self._all_later(request, queue, acks)
        return self._figures(request, queue, acks, notifications=self._notifications())

    async def _all_later(
        self, request: Request, queue: Eventually[QueueFigures], acks: Eventually[AckFigures | None]
    ) -> Figures:
        figures = self._figures(
            request, await settled(queue), await settled(acks), notifications=self._notifications()
        )
        if self.others is not None:
            await self._add_others(self.others, request.tenant, figures)
        return figures

    async def _bound_later(
        self, request: Request, queue: Eventually[QueueFigures], others: Others
    ) -> Figures:
        figures = self._figures(request, await settled(queue), None, notifications=None)
        await self._add_others(others, request.tenant, figures)
        return figures

    async def _add_others(self, others: Others, tenant: str, figures: Figures) -> None:
        elsewhere = await others.figures(tenant)
        _add_others(figures, list(elsewhere.values()), await others.users(tenant))

    def _figures(
        self,
        request: Request,
        queue: QueueFigures,
        acks: AckFigures | None,
        *,
        notifications: NotificationFigures | None,
    ) -> Figures:
        connections = self.connections(request.tenant)
        subscriptions = sum(connections.channels.values())
        return Figures(
            connections,
            UserFigures(connections.unique_users),
            ChannelFigures(len(connections.channels), subscriptions),
            notifications,
            queue,
            acks,
            **self.stores.figures(),
        )

    def measure(self) -> Eventually[None]:
        """Bring the metrics of what stores keep up to date; what one does not answer stays as it
        was. What is in memory is read when it is asked for."""
        depth = None if self._logs is None else or_none(self._logs.depth)
        stats = None if self._ledger is None else or_none(self._ledger.stats)
        if is_awaitable(depth) or is_awaitable(stats):
            return self._measure_later(depth, stats)
        return None

    async def _measure_later(
        self, depth: Eventually[int | None], stats: Eventually[AckStats | None]
    ) -> None:
        if (messages := await settled(depth)) is not None:
            self._metrics.queue_messages.set(messages)
        if (figures := await settled(stats)) is not None:
            self._metrics.ack_pending.set(figures.pending)

    def counted(self) -> dict[str, int]:
        """What this node counted since its start, by the names of `NotificationFigures`."""
        return msgspec.structs.asdict(self._notifications())

    def _notifications(self) -> NotificationFigures:
        metrics = self._metrics
        sent = {
            target: _sum(metrics.notifications_total.labels(target, each) for each in SOURCES)
            for target in TARGETS
        }
        return NotificationFigures(
            sum(sent.values()),
            _sum(metrics.deliveries_total.labels(each) for each in TRANSPORTS),
            _sum(metrics.delivery_failures_total.labels(each) for each in FAILURE_REASONS),
            sent["user"] + sent["users"],
            sent["broadcast"],
            sent["channel"] + sent["channels"],
        )


def _add_others(figures: Figures, others: Sequence[NodeFigures], users: int | None) -> None:
    """Make one node's figures those of the cluster. `users`: those on any node, each once."""
    connections = figures.connections
    channels = CountPerName(connections.channels)
    for node in others:
        connections.websocket += node.websocket
        connections.sse += node.sse
        connections.unique_users += node.users
        channels.update(node.channels)
        for name, count in node.counted.items():
            # A node of another version may count what this one does not know.
            if figures.notifications is not None and name in NotificationFigures.__struct_fields__:
                setattr(figures.notifications, name, getattr(figures.notifications, name) + count)
    connections.total_connections = connections.websocket + connections.sse
    connections.channels = dict(channels)
    if users is not None:
        connections.unique_users = users
    figures.users.connected = connections.unique_users
    figures.channels.active = len(channels) + sum(node.more for node in others)
    figures.channels.subscriptions = channels.total() + sum(
        node.more_subscriptions for node in others
    )


def _sum(counters: Iterable[Counter]) -> int:
    return int(sum(counter.value for counter in counters))


def _ack_figures(stats: AckStats) -> AckFigures:
    tracked = stats.pending + stats.acknowledged + stats.expired
    settled = stats.acknowledged + stats.expired
    return AckFigures(
        True,
        tracked,
        stats.acknowledged,
        stats.expired,
        stats.pending,
        stats.acknowledged / settled if settled else 0.0,
        stats.average_ms,
        stats.p95_ms,
    )


def or_none(ask: Callable[[], Eventually[T]]) -> Eventually[T | None]:
    """What `ask` gives; None where a store does not answer, said now or later."""
    try:
        value = ask()
    except Unavailable:
        return None
    return _or_none_later(value) if is_awaitable(value) else value


async def _or_none_later(value: Awaitable[T]) -> T | None:
    try:
        return await value
    except Unavailable:
        return None


def _store_figures(store: Store | None) -> StoreFigures:
    if store is None:
        return StoreFigures("disabled", connected=False)
    breaker = _BREAKER[store.breaker.state]
    well = store.up and breaker == "closed"
    return StoreFigures("connected" if well else "degraded", store.up, breaker)
