"""Whether the server lives, is ready, and how it does; and its metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from notifyd.api.guard import Answer, Description, Endpoint, Guard, Request
from notifyd.api.others import Others
from notifyd.api.stats import QueueFigures, Stats, StoreFigures
from notifyd.errors import ShuttingDown, Unavailable
from notifyd.eventually import Eventually, settled, then
from notifyd.metrics import Metrics, Worker
from notifyd.version import __version__

Phase: TypeAlias = Literal["starting", "ready", "draining"]


class ConnectionHealth(msgspec.Struct, gc=False):
    """Connections open now."""

    total: int
    unique_users: int
    channels_count: int


class QueueHealth(msgspec.Struct, gc=False):
    """What waits for users who are not connected, of all tenants; `total_messages` is null while
    the store does not answer, and for a key that is bound to one tenant."""

    enabled: bool
    backend: str
    total_messages: int | None


class ClusterHealth(msgspec.Struct, gc=False, omit_defaults=True):
    """Whether this is one of several nodes; `degraded` where it does not hear the others."""

    enabled: bool
    status: Literal["healthy", "degraded"] | None = None
    node_id: str | None = None
    nodes: int | None = None


class Health(msgspec.Struct, gc=False, omit_defaults=True):
    """How the server does; all but the first three for callers who may read.

    `degraded`: it starts or ends, a store does not answer, or the other nodes are not heard.
    """

    status: Literal["healthy", "degraded"]
    version: str
    uptime_seconds: int
    redis: StoreFigures | None = None
    postgres: StoreFigures | None = None
    connections: ConnectionHealth | None = None
    queue: QueueHealth | None = None
    cluster: ClusterHealth | None = None


class Alive(msgspec.Struct, gc=False):
    """The event loop runs."""

    status: Literal["alive"]


class Ready(msgspec.Struct, gc=False):
    """Connections and calls are welcome."""

    status: Literal["ready"]


class Operations:
    """The handlers of health and metrics.

    `phase` tells where the server stands in its life; `clock` gives Unix seconds, as `started_at`.
    """

    def __init__(
        self,
        guard: Guard,
        stats: Stats,
        metrics: Metrics,
        *,
        phase: Callable[[], Phase],
        clock: Callable[[], float],
        started_at: float,
        metrics_enabled: bool,
        metrics_public: bool,
    ) -> None:
        self._guard = guard
        self._stats = stats
        self._metrics = metrics
        self._phase = phase
        self._clock = clock
        self._started_at = started_at
        self._metrics_enabled = metrics_enabled
        self._metrics_public = metrics_public

    def endpoints(self) -> list[Endpoint]:
        """Health for anybody; metrics for who may read, where they are switched on."""
        guard, tag = self._guard, "Operations"
        endpoints = [
            Endpoint(
                guard,
                "GET",
                "/health",
                self.health,
                Description("How the server does", tag, answer=Health),
                access="open",
                limited=False,
            ),
            Endpoint(
                guard,
                "GET",
                "/health/live",
                self.live,
                Description("Whether the server lives", tag, answer=Alive),
                access="open",
                limited=False,
            ),
            Endpoint(
                guard,
                "GET",
                "/health/ready",
                self.ready,
                Description("Whether the server is ready", tag, answer=Ready, errors=(503,)),
                access="open",
                limited=False,
            ),
        ]
        if self._metrics_enabled:
            public = self._metrics_public or not guard.production
            description = Description("Metrics for Prometheus", tag, content_type="text/plain")
            endpoints.append(
                Endpoint(
                    guard,
                    "GET",
                    "/metrics",
                    self.metrics,
                    description,
                    access="open" if public else "read",
                    operating=True,
                )
            )
        return endpoints

    def health(self, request: Request) -> Eventually[Health]:
        """GET /health."""
        others = self._stats.others
        well = self._phase() == "ready" and not self._stats.stores.down()
        well = well and (others is None or others.well)
        status: Literal["healthy", "degraded"] = "healthy" if well else "degraded"
        uptime = max(0, int(self._clock() - self._started_at))
        reader = self._guard.reader(request)
        if reader is None:
            return Health(status, __version__, uptime)
        bound = reader.tenant if self._stats.bound(reader) else None
        connections = self._stats.connected(bound)

        def in_full(queue: QueueFigures) -> Health:
            return Health(
                status,
                __version__,
                uptime,
                connections=ConnectionHealth(
                    connections.total, connections.unique_users, connections.channels
                ),
                queue=QueueHealth(queue.enabled, queue.backend, queue.total_messages),
                cluster=_cluster_health(others),
                **self._stats.stores.figures(),
            )

        return then(self._stats.queue(hidden=bound is not None), in_full)

    def live(self, request: Request) -> Alive:
        """GET /health/live."""
        return Alive("alive")

    def ready(self, request: Request) -> Ready:
        """GET /health/ready."""
        phase = self._phase()
        if phase == "starting":
            raise Unavailable("The server is starting.")
        if phase == "draining":
            raise ShuttingDown("The server is shutting down.")
        stores = self._stats.stores
        if missing := stores.required.intersection(stores.down()):
            raise Unavailable(f"A store does not answer: {', '.join(sorted(missing))}.")
        return Ready("ready")

    def metrics(self, request: Request) -> Eventually[Answer]:
        """GET /metrics, of all processes on this port. Raises Forbidden for a key that is bound to
        a tenant: they are of all."""
        self._stats.require_unbound(request.principal)
        others = self._stats.others
        if others is not None and others.worker is not None:
            return self._of_workers(others, others.worker)
        return then(self._stats.measure(), lambda _: self._answer(self._metrics.render()))

    async def _of_workers(self, others: Others, worker: Worker) -> Answer:
        await settled(self._stats.measure())
        found = await others.samples(worker.group)
        return self._answer(self._metrics.render_workers(worker.number, found))

    def _answer(self, body: bytes) -> Answer:
        return Answer(200, body, content_type=self._metrics.content_type.encode())


def _cluster_health(others: Others | None) -> ClusterHealth:
    if others is None:
        return ClusterHealth(enabled=False)
    status: Literal["healthy", "degraded"] = "healthy" if others.well else "degraded"
    return ClusterHealth(True, status, others.node_id, len(others.nodes()))
