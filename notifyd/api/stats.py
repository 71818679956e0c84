"""The server's figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.connections.registry import Registry
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.metrics import FAILURE_REASONS, SOURCES, TARGETS, TRANSPORTS, Counter, Metrics
from notifyd.queue.base import AckLedger, AckStats, UserLogs


class ConnectionFigures(msgspec.Struct, gc=False):
    """Connections open now; `channels` maps each channel to its subscribers."""

    total_connections: int
    unique_users: int
    websocket: int
    sse: int
    channels: dict[str, int]


class UserFigures(msgspec.Struct, gc=False):
    """Users with at least one connection."""

    connected: int


class ChannelFigures(msgspec.Struct, gc=False):
    """Channels with at least one subscriber, and all subscriptions."""

    active: int
    subscriptions: int


class NotificationFigures(msgspec.Struct, gc=False):
    """Since the start. `total_sent` counts notifications, `total_delivered` connections."""

    total_sent: int
    total_delivered: int
    total_failed: int
    user_notifications: int
    broadcast_notifications: int
    channel_notifications: int


class QueueFigures(msgspec.Struct, gc=False):
    """What waits for users who are not connected."""

    enabled: bool
    backend: str
    total_messages: int


class AckFigures(msgspec.Struct, gc=False):
    """Since the start, but for `pending_count`; times in ms, null before the first ack."""

    enabled: bool
    total_tracked: int
    total_acked: int
    total_expired: int
    pending_count: int
    ack_rate: float
    avg_latency_ms: float | None
    p95_latency_ms: float | None


class StoreFigures(msgspec.Struct, gc=False):
    """A store; `disabled` where nothing uses it."""

    status: Literal["disabled"]
    connected: bool


class Figures(msgspec.Struct, gc=False):
    """All of it."""

    connections: ConnectionFigures
    users: UserFigures
    channels: ChannelFigures
    notifications: NotificationFigures
    queue: QueueFigures
    ack: AckFigures
    redis: StoreFigures


NO_STORE = StoreFigures("disabled", connected=False)
_NO_ACKS = AckFigures(False, 0, 0, 0, 0, 0.0, None, None)


class Stats:
    """The handlers of figures. `logs` and `ledger` are None where they are switched off."""

    def __init__(
        self,
        guard: Guard,
        registry: Registry,
        metrics: Metrics,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        *,
        queue_backend: str,
    ) -> None:
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

    def queue(self) -> Eventually[QueueFigures]:
        """Of all tenants."""
        if self._logs is None:
            return QueueFigures(False, self._queue_backend, 0)
        return then(
            self._logs.depth(), lambda depth: QueueFigures(True, self._queue_backend, depth)
        )

    def acks(self, request: Request) -> Eventually[AckFigures]:
        """GET /api/v1/stats/acks."""
        return _NO_ACKS if self._ledger is None else then(self._ledger.stats(), _ack_figures)

    def all(self, request: Request) -> Eventually[Figures]:
        """GET /stats and GET /api/v1/stats."""
        queue, acks = self.queue(), self.acks(request)
        if is_awaitable(queue) or is_awaitable(acks):
            return self._all_later(request, queue, acks)
        return self._figures(request, queue, acks)

    async def _all_later(
        self, request: Request, queue: Eventually[QueueFigures], acks: Eventually[AckFigures]
    ) -> Figures:
        return self._figures(request, await settled(queue), await settled(acks))

    def _figures(self, request: Request, queue: QueueFigures, acks: AckFigures) -> Figures:
        connections = self.connections(request.tenant)
        subscriptions = sum(connections.channels.values())
        return Figures(
            connections,
            UserFigures(connections.unique_users),
            ChannelFigures(len(connections.channels), subscriptions),
            self._notifications(),
            queue,
            acks,
            NO_STORE,
        )

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
