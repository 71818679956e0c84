"""The composition root: settings in, a server out. Every backend is chosen here, once."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.types import ASGIApp

from notifyd.api.acks import identify_with
from notifyd.api.demo import Demo
from notifyd.api.guard import Endpoint, Guard, Request
from notifyd.api.health import Phase
from notifyd.api.realtime import AsgiEndpoint, Authenticate, Realtime, TokenOutOfQuery
from notifyd.api.routes import Api, build_endpoints
from notifyd.api.routes import Services as ApiServices
from notifyd.auth import ApiKeys, Origins, TokenVerifier
from notifyd.backends import Backends
from notifyd.background import BackgroundTasks
from notifyd.channel_rules import ChannelRules
from notifyd.client.calls import Call
from notifyd.client.clients import PublishingCalls
from notifyd.cluster.nodes import machine_name
from notifyd.cluster.router import Cluster
from notifyd.connections.admission import Admission
from notifyd.connections.connection import State
from notifyd.connections.heartbeat import Heartbeat
from notifyd.connections.lifecycle import Lifecycle, Limits
from notifyd.connections.outbox import Bounds, Flusher
from notifyd.connections.registry import Registry
from notifyd.connections.replay import Replayer
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.dispatch.redis_sources import RedisSources
from notifyd.dispatch.store_writes import MAX_ON_THEIR_WAY, StoreWrites
from notifyd.errors import ConfigurationError, Unauthorized, Unavailable
from notifyd.eventually import Eventually, is_awaitable, settled
from notifyd.forwarded import TrustedProxies
from notifyd.identifiers import new_uuid
from notifyd.identity import DEFAULT_TENANT, Identity, Principal
from notifyd.log import RateLimitedLog, configure_logging
from notifyd.metrics import Metrics, Worker
from notifyd.notification import Notification
from notifyd.options import Settings
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.server.door import Timeouts
from notifyd.server.http import Services
from notifyd.server.serve import Serving, supervise
from notifyd.server.serve import serve as serve_sockets
from notifyd.settings import problems
from notifyd.tenants import SYNC_SECONDS, TenantLimits, Tenants

T = TypeVar("T")

DRAIN_PER_TURN = 200
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0
_IN_PROCESS = Principal(name="in process", scopes=frozenset({"publish"}))


class Notifyd(PublishingCalls):
    """A notification server inside an ASGI application, or behind `notifyd serve`.

    `app` is mounted, `lifespan` runs around it (Starlette does not run a mounted app's own), and
    `send` and `batch` publish in process; they raise `notifyd.errors`. `authenticate` says who a
    connection is by the application's own means instead of a JWT, None for nobody. `clock` gives
    Unix seconds, `worker` says which of several processes on one port this is. Raises
    ConfigurationError.
    """

    app: Starlette

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        authenticate: Authenticate | None = None,
        clock: Callable[[], float] = time.time,
        worker: Worker | None = None,
    ) -> None:
        self.settings = settings = settings or Settings()
        self._worker = worker
        # An application that authenticates by itself needs no secret for tokens.
        wrong = [
            problem
            for problem in problems(settings)
            if authenticate is None or not problem.startswith("auth.jwt")
        ]
        if wrong:
            raise ConfigurationError("\n".join(wrong))
        self._clock = clock
        self._log = structlog.get_logger("notifyd")
        self._started_at = clock()
        self._phase: Phase = "starting"
        self._tasks = BackgroundTasks()
        # Calls in this process that wait for a store. Whoever made them may be gone.
        self._sending: set[asyncio.Future[bytes]] = set()
        self._notes_lost = RateLimitedLog(self._log)
        self.metrics = Metrics()
        self._backends = Backends(
            settings, self.metrics, clock=clock, on_acknowledged=self._count_ack
        )
        self._logs, self._ledger = self._backends.logs, self._backends.ledger
        self._registry = Registry(clock)
        self.cluster = self._make_cluster()
        self._connect_parts(authenticate)
        self._observe()

    def _make_cluster(self) -> Cluster | None:
        settings, redis = self.settings.cluster, self._backends.redis
        if not settings.enabled or redis is None:
            self.metrics.leave_out("cluster")
            return None
        return Cluster(
            redis,
            self._backends.redis_keys,
            self._registry,
            self.metrics,
            name=settings.node_id,
            lease_seconds=settings.presence_ttl_seconds,
            started_at=self._started_at,
        )

    def _connect_parts(self, authenticate: Authenticate | None) -> None:
        settings, clock = self.settings, self._clock
        websocket, auth = settings.websocket, settings.auth
        production = settings.production
        spread = random.SystemRandom().uniform
        self.tenants = Tenants(
            settings.tenant,
            self._backends.tenants,
            limits=TenantLimits(
                websocket.max_connections,
                websocket.max_connections_per_user,
                websocket.max_subscriptions_per_connection,
            ),
            named=[key.tenant_id for key in auth.api_keys if key.tenant_id is not None],
            clock=clock,
        )
        if authenticate is not None:
            authenticate = _of_a_tenant(authenticate, self.tenants)
        self.verifier = TokenVerifier(
            auth, production=production, clock=clock, tenants=self.tenants
        )
        origins = Origins(settings.cors.origins, development=not production)
        admission = Admission(self.verifier, origins, cookie_name=auth.cookie_name)
        self._writes = StoreWrites(
            self._logs,
            self._ledger,
            # What waits only for its turn counts as well, and is not to be lost by a small bound.
            max_waiting=max(settings.ack.max_pending, MAX_ON_THEIR_WAY),
            clock=clock,
            spawn=self._tasks.spawn,
            on_lost=self._lost,
            on_unavailable=self._note_lost,
            is_away=lambda: settings.queue.backend in self._backends.stores.down(),
        )
        self._confirmations = Confirmations(
            self._registry,
            self._logs,
            self._ledger,
            max_pending=settings.ack.max_pending,
            idle_timeout=websocket.idle_timeout,
            clock=clock,
            writes=self._writes,
            cluster=self.cluster,
        )
        self._replayer = Replayer(
            self._logs,
            self._ledger,
            self._writes,
            self._confirmations,
            self.metrics,
            page_bytes=min(65536, websocket.outbox_max_bytes // 2),
            spawn=self._tasks.spawn,
        )
        self._flusher = Flusher(
            Bounds(
                max_bytes=websocket.outbox_max_bytes,
                max_messages=websocket.outbox_max_messages,
                total_bytes=websocket.outbox_total_bytes,
            ),
            on_slow=lambda outbox: self.lifecycle.too_slow(outbox),  # noqa: PLW0108  # made later
        )
        self._heartbeat = Heartbeat(
            self._confirmations,
            interval=websocket.heartbeat_interval,
            idle_timeout=websocket.idle_timeout,
            leeway=auth.leeway_seconds,
            clock=clock,
            on_idle=lambda connection: self.lifecycle.idle(connection),  # noqa: PLW0108  # as above
            on_expired=lambda connection: self.lifecycle.token_expired(  # noqa: PLW0108  # as above
                connection
            ),
            on_late=self.metrics.loop_lag_seconds.observe,
        )
        self.lifecycle = Lifecycle(
            registry=self._registry,
            flusher=self._flusher,
            confirmations=self._confirmations,
            replayer=self._replayer,
            heartbeat=self._heartbeat,
            admission=admission,
            verify=self.verifier.verify,
            rules=ChannelRules(settings.channels.rules),
            limits=Limits(
                max_connections=websocket.max_connections,
                evict_on_user_limit=websocket.on_user_limit == "evict",
                heartbeat_interval=websocket.heartbeat_interval,
                of_tenant=self.tenants.limits,
            ),
            metrics=self.metrics,
            clock=clock,
            spread=spread,
            spawn=self._tasks.spawn,
            presence=None if self.cluster is None else self.cluster.presence,
            occupancy=self.cluster.occupancy if self.cluster and self.tenants.enabled else None,
            rate_limits=self._backends.rate_limits,
        )
        self._writes.on_returned = self._returned
        dispatcher = Dispatcher(
            self._registry,
            self._flusher,
            self._confirmations,
            self._logs,
            self._ledger,
            self._writes,
            self.metrics,
            clock,
            store_first=settings.queue.mode == "always",
            cluster=self.cluster,
            tally=self.tenants.tally if self.tenants.enabled else None,
        )
        if self.cluster is not None:
            self.cluster.receiver = dispatcher
            self.cluster.replay_here = self.lifecycle.replay_again
            self.cluster.settle_here = self._confirmations.settle_from_elsewhere
            self.cluster.confirmed_here = self._confirmations.was_confirmed_here
            self.cluster.revoke_here = self._revoke
            self.cluster.revocations = self.verifier.revocations
            self.cluster.give_back = self._give_back
            self._writes.settle_confirmed = self.cluster.settle_confirmed
        self._sources = self._make_sources(dispatcher)
        self.guard = Guard(
            api_keys=ApiKeys(auth, clock=clock),
            identify=identify_with(admission)
            if authenticate is None
            else _identify_by(authenticate, origins),
            origins=origins,
            credentials=auth.cookie_name is not None,
            idempotency=self._backends.idempotency,
            metrics=self.metrics,
            production=production,
            rate_limits=self._backends.rate_limits,
            tenants=self.tenants,
        )
        # Its users come by tokens of ours: not where the application knows them by itself.
        demo = None
        if not production and authenticate is None:
            publisher = auth.publisher
            demo = Demo(
                self.guard,
                self.verifier,
                auth.publishing_key,
                tenant=(publisher and publisher.tenant_id) or DEFAULT_TENANT,
            )
        self.endpoints = build_endpoints(
            ApiServices(
                guard=self.guard,
                registry=self._registry,
                lifecycle=self.lifecycle,
                dispatcher=dispatcher,
                confirmations=self._confirmations,
                logs=self._logs,
                ledger=self._ledger,
                templates=self._backends.templates,
                verifier=self.verifier,
                demo=demo,
                metrics=self.metrics,
                metrics_enabled=settings.metrics.enabled,
                metrics_public=settings.metrics.public,
                queue_backend=settings.queue.backend,
                stores=self._backends.stores,
                cluster=self.cluster,
                worker=self._worker,
                phase=lambda: self._phase,
                clock=clock,
                started_at=self._started_at,
                new_id=new_uuid,
            )
        )
        self._in_process = {
            endpoint.path: endpoint for endpoint in self.endpoints if endpoint.access == "publish"
        }
        self.proxies = TrustedProxies(settings.server.forwarded_allow_ips)
        self.spread = spread
        self.app = self._application(authenticate)

    def _make_sources(self, dispatcher: Dispatcher) -> RedisSources | None:
        settings, backends = self.settings, self._backends
        if backends.redis is None or not settings.redis.has_sources:
            return None
        return RedisSources(
            settings.redis,
            backends.redis,
            backends.redis_keys,
            dispatcher,
            templates=backends.templates,
            idempotency=backends.idempotency,
            ledger=self._ledger,
            metrics=self.metrics,
            clock=self._clock,
            tenant_of=self.tenants.of_message,
            cluster=self.cluster,
            ledger_in_redis=settings.ack.enabled and settings.ack.backend == "redis",
        )

    def _application(self, authenticate: Authenticate | None) -> Starlette:
        realtime = Realtime(
            self.lifecycle,
            self.guard,
            self.proxies,
            max_message_bytes=self.settings.websocket.max_message_bytes,
            spread=self.spread,
            authenticate=authenticate,
        )
        api: ASGIApp = Api(self.guard, self.endpoints, client_address=self.proxies.client_address)
        stream = Route("/sse", AsgiEndpoint(realtime.stream))
        # Starlette would add HEAD, which opened a stream that nobody reads.
        stream.methods = {"GET"}
        routes: list[BaseRoute] = [
            WebSocketRoute("/ws", AsgiEndpoint(realtime.websocket)),
            stream,
            Mount("/", app=api),
        ]
        application = Starlette(
            routes=routes, middleware=[Middleware(TokenOutOfQuery)], lifespan=self.lifespan
        )
        # `OPTIONS *` has no path that is below `/`; Starlette's own answer is not one of ours.
        application.router.default = api
        return application

    def _observe(self) -> None:
        metrics, registry = self.metrics, self._registry
        for transport in ("websocket", "sse"):
            metrics.connections.labels(transport).read_from(
                lambda transport=transport: registry.by_transport[transport]  # type: ignore[misc]  # bound now
            )
        metrics.users_connected.read_from(lambda: registry.users)
        metrics.channels_active.read_from(lambda: registry.channels)
        metrics.channel_subscriptions.read_from(lambda: registry.subscriptions)
        metrics.outbox_bytes.read_from(lambda: self._flusher.waiting_bytes)

    def _count_ack(self, seconds: float) -> None:
        self.metrics.ack_received_total.inc()
        self.metrics.ack_seconds.observe(seconds)

    def _note_lost(self, error: Unavailable) -> None:
        """The ledger could not be told; delivery goes on without."""
        self.metrics.ack_notes_lost_total.inc()
        self._notes_lost.warning("acknowledgements are not recorded", reason=error.message)

    def _lost(self, notification: Notification) -> None:
        """Nothing keeps a notification that was held: it is over its ttl, or there is no queue that
        takes it."""
        if not notification.storable:
            return
        if notification.is_over(self._clock()):
            self.metrics.queue_expired_total.inc()
        else:
            self.metrics.queue_dropped_total.inc()

    def _revoke(self, tenant: str, user_id: str, at: float) -> None:
        """Another node revoked tokens, or one before this one began."""
        if user_id:
            self.verifier.revoke(tenant, user_id, at)
        else:
            self.verifier.revoke_all(tenant, at)

    def _give_back(self, tenant: str, user_id: str, notification: Notification) -> None:
        """Another node was sent it and never said that it has it."""
        if not self._confirmations.was_confirmed(tenant, user_id, notification.id):
            self._confirmations.goes_to_log(tenant, user_id, notification.id)
            self._writes.give_back(tenant, user_id, (notification,))

    def _returned(
        self, tenant: str, user_id: str, *, before_live: bool = False, here: bool = True
    ) -> None:
        """Something is in a user's log that his connections may be without; `here`: on this node
        too."""
        if here:
            self.lifecycle.replay_again(tenant, user_id, before_live=before_live)
        if self.cluster is not None:
            self.cluster.replay(tenant, (user_id,), before_live=before_live)

    # --- its life ---

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Serve while the block runs; for `FastAPI(lifespan=…)`. At its end clients are told and
        closed, and what only memory held is gone."""
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    async def start(self) -> None:
        """Begin to serve, in the running event loop.

        Raises ConfigurationError where a backend that was chosen cannot be used.
        """
        loop = asyncio.get_running_loop()
        await self._backends.start()
        if self.tenants.enabled:
            await self._load_tenants()
        self._backends.watch(self._tasks.spawn)
        self._backends.on_back(self._store_is_back)
        self._flusher.start(loop)
        self._heartbeat.start(loop)
        if self.cluster is not None:
            await self._join(self.cluster)
        if (problem := await self.verifier.prefetch()) is not None:
            self._log.warning("the keys for tokens cannot be had yet", reason=problem)
        if self.tenants.enabled:
            self._tasks.every(SYNC_SECONDS, self.tenants.sync, "keeping limits and figures")
        if self._logs is not None:
            seconds = self.settings.queue.cleanup_interval_seconds
            expire_logs = partial(self._expire_logs, self._logs)
            self._tasks.every(seconds, expire_logs, "expiring queued notifications")
            # A failure alone opens no breaker, so that none closes either.
            self._tasks.every(RETRY_SECONDS, self._retry, "repeating what a store did not take")
        if self._ledger is not None:
            seconds = self.settings.ack.cleanup_interval_seconds
            expire_acks = partial(_expire, self._ledger)
            self._tasks.every(seconds, expire_acks, "expiring acknowledgements")
        if self._backends.rate_limits is not None:
            self._tasks.every(SWEEP_SECONDS, self._backends.sweep, "sweeping rate limits")
        if self._sources is not None:
            self._sources.start()
        self._phase = "ready"

    async def _load_tenants(self) -> None:
        try:
            await self.tenants.load()
        except Unavailable as error:
            await self._backends.aclose()
            raise ConfigurationError(
                f"tenant: the limits that were set at run time cannot be read: {error.message}"
            ) from error

    async def _join(self, cluster: Cluster) -> None:
        try:
            await cluster.start()
        except BaseException:
            self._heartbeat.stop()
            await self._tasks.aclose()
            await self._backends.aclose()
            raise

    async def _expire_logs(self, logs: UserLogs) -> None:
        self.metrics.queue_expired_total.inc(await settled(logs.expire()))

    def _store_is_back(self) -> None:
        self._tasks.spawn(self._retry())

    async def _retry(self) -> None:
        await self._writes.retry()
        if not self._backends.logs_away:
            # Else all who wait for it would ask in vain, each second.
            self._replayer.store_is_back()

    async def drain(self) -> None:
        """Tell every client that the server stops and when to come back, and close."""
        self._phase = "draining"
        if self._sources is not None:
            # Before anybody leaves: what is not taken here is another node's, or stays in a stream.
            await self._sources.aclose()
        for index, connection in enumerate(self.lifecycle.begin_drain()):
            if connection.state is not State.CLOSED:
                self.lifecycle.go_away(connection, "the server is shutting down")
            if index % DRAIN_PER_TURN == DRAIN_PER_TURN - 1:
                await asyncio.sleep(0)

    async def stop(self) -> None:
        """Drain, store what clients had not confirmed and what was counted, for
        `server.shutdown_grace_seconds` at most, and end what runs in the background."""
        await self.drain()
        self._heartbeat.stop()
        grace = self.settings.server.shutdown_grace_seconds
        deadline = asyncio.get_running_loop().time() + grace
        left = await self._writes.finish(grace)
        if self.cluster is not None:
            await self.cluster.stop()
            # What other nodes have not answered for by now has gone to the logs, too.
            left = await self._writes.finish(max(0.0, deadline - asyncio.get_running_loop().time()))
        if left:
            self._log.error("unconfirmed notifications could not be stored", lost=left)
        await self._tasks.aclose()
        if not await self.tenants.finish(max(0.0, deadline - asyncio.get_running_loop().time())):
            self._log.warning("tenant counts could not be stored")
        await self._backends.aclose()
        await self.verifier.aclose()

    # --- publishing in process ---

    async def perform(self, call: Call[T]) -> T:
        """Make a publishing call in this process. Raises `notifyd.errors`; cancelled, the call is
        made all the same."""
        return await self._perform(call, DEFAULT_TENANT)

    def of_tenant(self, tenant_id: str) -> TenantCalls:
        """`send` and `batch` for a tenant; `default`'s are those of this object itself.

        Raises ValidationError where there is no such tenant.
        """
        return TenantCalls(partial(self._perform, tenant=self.tenants.named(tenant_id)))

    async def _perform(self, call: Call[T], tenant: str) -> T:
        endpoint: Endpoint = self._in_process[call.path]
        request = Request(call.method, endpoint.path, {}, b"", [], call.content or b"", "")
        request.source = "python"
        request.principal = _IN_PROCESS
        request.tenant = tenant
        request.request_id = "in process"
        # Nothing is repeated inside a process, so only a key of the caller's own is worth keeping.
        request.idempotency_key = call.idempotency_key
        answer = endpoint.in_process(request)
        if not is_awaitable(answer):
            return call.decode(answer)
        # Whoever gives up waiting takes nothing back: what a store was asked to keep would be in
        # the log, and be sent only when its user connects again.
        sending = asyncio.ensure_future(answer)
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        return call.decode(await asyncio.shield(sending))


class TenantCalls(PublishingCalls):
    """Publishing in process for one tenant; see `Notifyd.of_tenant`."""

    def __init__(self, perform: Callable[[Call[Any]], Awaitable[Any]]) -> None:
        self._perform = perform

    async def perform(self, call: Call[T]) -> T:
        """Make a publishing call. Raises `notifyd.errors`."""
        answer: T = await self._perform(call)
        return answer


def _of_a_tenant(authenticate: Authenticate, tenants: Tenants) -> Authenticate:
    """The application's own way, but for users of a tenant that does not exist."""

    async def authenticated(connection: HTTPConnection) -> Identity | None:
        identity = await authenticate(connection)
        if identity is not None:
            tenants.of_user(identity)
        return identity

    return authenticated


async def _expire(ledger: AckLedger) -> None:
    await settled(ledger.expire())


def _identify_by(
    authenticate: Authenticate, origins: Origins
) -> Callable[[Request], Eventually[Identity]]:
    async def identified(pending: Awaitable[Identity | None]) -> Identity:
        identity = await pending
        if identity is None:
            raise Unauthorized("The application does not know this client.")
        return identity

    def identify(request: Request) -> Eventually[Identity]:
        # Sessions are mostly cookies, which go along with every site's requests (CSRF).
        origins.require(request.header(b"origin"))
        # An embedded server has no lane but ASGI, so there is a scope.
        return identified(authenticate(HTTPConnection(request.scope or {})))

    return identify


def sockets_of(notifyd: Notifyd, timeouts: Timeouts | None = None) -> Serving:
    """What `notifyd.server` needs to serve this application on sockets of its own.

    `timeouts` are the contract's, unless others are given.
    """
    return Serving(
        app=notifyd.app,
        drain=notifyd.drain,
        services=Services(
            lifecycle=notifyd.lifecycle,
            guard=notifyd.guard,
            fast={
                endpoint.path.encode(): endpoint
                for endpoint in notifyd.endpoints
                if endpoint.access == "publish"
            },
            proxies=notifyd.proxies,
            max_message_bytes=notifyd.settings.websocket.max_message_bytes,
            spread=notifyd.spread,
            timeouts=timeouts or Timeouts(),
        ),
    )


def serve(settings: Settings, *, announce: Callable[[str], None]) -> int:
    """`notifyd serve`: run until a signal; returns the exit code.

    Raises ConfigurationError where a backend that was chosen cannot be used.
    """
    configure_logging(settings.log, sys.stderr)
    if settings.server.workers > 1:
        # What cannot be is said once, and not by each of the workers.
        Notifyd(settings)
        work = partial(partial, _work, settings, secrets.token_hex(8))
        return supervise(work, settings.server, announce=announce)
    return _serve(settings, announce)


def _serve(
    settings: Settings,
    announce: Callable[[str], None],
    *,
    worker: Worker | None = None,
) -> int:
    return serve_sockets(
        sockets_of(Notifyd(settings, worker=worker)),
        settings.server,
        idle_timeout=settings.websocket.idle_timeout,
        announce=announce,
        share_port=worker is not None,
    )


def _work(settings: Settings, group: str, port: int, number: int, ready: Callable[[], None]) -> int:
    """One of several workers: a node of the cluster by itself, on the port that they share."""
    configure_logging(settings.log, sys.stderr)
    name = f"{settings.cluster.node_id or machine_name()}-{number}"
    own = msgspec.structs.replace(
        settings,
        server=msgspec.structs.replace(settings.server, port=port, workers=1),
        cluster=msgspec.structs.replace(settings.cluster, node_id=name[-64:]),
    )
    try:
        return _serve(own, lambda url: ready(), worker=Worker(group, number))
    except ConfigurationError as error:
        structlog.get_logger("notifyd").error("a worker cannot start", reason=str(error))
        return 1
