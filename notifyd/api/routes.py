"""Every route of the HTTP API, and the ASGI application that serves them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from starlette.types import Message, Receive, Scope, Send

from notifyd.api.acks import Acks
from notifyd.api.channels import Channels
from notifyd.api.cluster import ClusterStatusApi
from notifyd.api.demo import Demo
from notifyd.api.guard import Answer, Description, Endpoint, Guard, Headers, Request, too_large
from notifyd.api.health import Operations, Phase
from notifyd.api.notifications import Publishing
from notifyd.api.openapi import openapi_endpoint
from notifyd.api.others import Others
from notifyd.api.stats import NO_STORES, Stats, Stores
from notifyd.api.templates import Templates
from notifyd.api.tenants import TenantApi
from notifyd.api.users import Users
from notifyd.auth import TokenVerifier
from notifyd.cluster.router import Cluster
from notifyd.connections.lifecycle import Lifecycle
from notifyd.connections.registry import Registry
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    NotifydError,
    RequestTimeout,
    UpgradeRequired,
)
from notifyd.eventually import Eventually, settled
from notifyd.metrics import Metrics, Worker
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.templates import TemplateStore

BODY_SECONDS = 30.0
SMALL_BODY_BYTES = 16384
"""What is waited for before anybody asks who sends it."""

MAX_DISCARDED_BYTES = 4_194_304
"""What is read of a body beyond its limit, so that its sender reads the answer."""

_CLOSE: Headers = ((b"connection", b"close"),)
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the handlers work with, made by the composition root.

    `logs` and `ledger` are None where they are switched off, `demo` but in development, `cluster`
    where this is the only node, `worker` where this is the only process on its port. `clock` gives
    Unix seconds, as `started_at`; `new_id` a UUID's text; `phase` where the server stands in its
    life.
    """

    guard: Guard
    registry: Registry
    lifecycle: Lifecycle
    dispatcher: Dispatcher
    confirmations: Confirmations
    logs: UserLogs | None
    ledger: AckLedger | None
    templates: TemplateStore
    verifier: TokenVerifier
    demo: Demo | None = None
    metrics: Metrics
    metrics_enabled: bool
    metrics_public: bool
    queue_backend: str
    stores: Stores = NO_STORES
    cluster: Cluster | None = None
    worker: Worker | None = None
    phase: Callable[[], Phase]
    clock: Callable[[], float]
    started_at: float
    new_id: Callable[[], str]


def build_endpoints(services: Services) -> list[Endpoint]:
    """Every endpoint, the description of them all included."""
    guard, clock = services.guard, services.clock
    stats = Stats(
        guard,
        services.registry,
        services.metrics,
        services.logs,
        services.ledger,
        queue_backend=services.queue_backend,
        stores=services.stores,
    )
    others = None
    if services.cluster is not None:
        others = Others(
            services.cluster,
            services.registry,
            services.lifecycle,
            metrics=services.metrics,
            counted=stats.counted,
            worker=services.worker,
        )
        stats.others = others
    endpoints = [
        *Publishing(
            guard, services.dispatcher, services.templates, clock=clock, new_id=services.new_id
        ).endpoints(),
        *Channels(guard, services.registry, others).endpoints(),
        *Users(
            guard,
            services.registry,
            services.lifecycle,
            services.verifier,
            clock=clock,
            others=others,
        ).endpoints(),
        *Templates(guard, services.templates, clock=clock).endpoints(),
        *Acks(guard, services.confirmations, services.ledger).endpoints(),
        *TenantApi(guard, services.registry, others).endpoints(),
        *stats.endpoints(),
        *ClusterStatusApi(guard, services.registry, others).endpoints(),
        *Operations(
            guard,
            stats,
            services.metrics,
            phase=services.phase,
            clock=clock,
            started_at=services.started_at,
            metrics_enabled=services.metrics_enabled,
            metrics_public=services.metrics_public,
        ).endpoints(),
        *(() if services.demo is None else services.demo.endpoints()),
    ]
    return [*endpoints, openapi_endpoint(guard, endpoints)]


class _Route:
    """One path and its endpoints by method; parameters are segments of the raw path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.endpoints: dict[str, Endpoint] = {}
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path))
        self._match = re.compile(pattern.encode()).fullmatch

    def match(self, raw_path: bytes) -> dict[str, bytes] | None:
        """The parameters as they were written, None where this is another path."""
        found = self._match(raw_path)
        return None if found is None else found.groupdict()

    @property
    def allowed(self) -> str:
        """The methods, for Allow."""
        methods = {*self.endpoints, "OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))


class Api:
    """The ASGI application of the HTTP API: reads requests, calls endpoints, sends answers.

    `client_address(peer, headers)` tells whose request it is behind proxies.
    """

    def __init__(
        self,
        guard: Guard,
        endpoints: Iterable[Endpoint],
        *,
        client_address: Callable[[str, Sequence[tuple[bytes, bytes]]], str],
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._guard = guard
        self._client_address = client_address
        self._body_seconds = body_seconds
        self._routes: dict[str, _Route] = {}
        for endpoint in endpoints:
            route = self._routes.setdefault(endpoint.path, _Route(endpoint.path))
            route.endpoints[endpoint.method] = endpoint
        # These stand beside this application; what else is asked of them comes here.
        for path, handler in (("/sse", _only_get), ("/ws", _only_upgraded)):
            beside = self._routes[path] = _Route(path)
            beside.endpoints["GET"] = Endpoint(
                guard, "GET", path, handler, Description("", ""), access="open"
            )
        self._exact = {path.encode(): route for path, route in self._routes.items()}
        self._patterns = [route for path, route in self._routes.items() if "{" in path]
        self._unmatched = Endpoint(
            guard, "GET", "unmatched", _not_found, Description("", ""), access="open"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a client that goes away before its end is told nothing."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        client = scope.get("client")
        request = Request(
            scope["method"],
            "unmatched",
            {},
            scope["query_string"],
            headers,
            b"",
            self._client_address(client[0] if client else "", headers),
            scope,
        )
        answer = await self._answer(scope, receive, request)
        if answer is not None:
            await _send(send, answer, head=request.method == "HEAD")

    async def _answer(self, scope: Scope, receive: Receive, request: Request) -> Answer | None:
        route, parameters = self._find(_raw_path(scope))
        if route is None:
            return await settled(self._unmatched(request))
        request.route = route.path
        method = request.method
        endpoint = route.endpoints.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            return await settled(self._without_endpoint(route, request))
        try:
            request.path_params = {name: _decoded(value) for name, value in parameters.items()}
            if endpoint.method != "GET":
                body = await self._body(receive, request, endpoint)
                if body is None:
                    return None
                request.body = body
        except BadRequest as error:
            return await settled(endpoint.refuse(request, error))
        except NotifydError as error:
            # What is left of the body is not read, so nothing more can come on this connection.
            return await settled(endpoint.refuse(request, error, _CLOSE))
        return await settled(endpoint(request))

    def _find(self, raw_path: bytes) -> tuple[_Route | None, dict[str, bytes]]:
        route = self._exact.get(raw_path)
        if route is not None and "{" not in route.path:
            return route, {}
        for route in self._patterns:
            parameters = route.match(raw_path)
            if parameters is not None:
                return route, parameters
        return None, {}

    def _without_endpoint(self, route: _Route, request: Request) -> Eventually[Answer]:
        """OPTIONS (RFC 9110, section 9.3.7), or a method that this path does not have."""
        any_endpoint = next(iter(route.endpoints.values()))
        allow = (b"allow", route.allowed.encode())
        if request.method != "OPTIONS":
            error = MethodNotAllowed(f"{route.path} has no such method, but {route.allowed}.")
            return any_endpoint.refuse(request, error, (allow,))
        origin = request.header(b"origin")
        if origin is None or request.header(b"access-control-request-method") is None:
            return any_endpoint.finish(request, Answer(204, b"", (allow,)))
        asked = request.header(b"access-control-request-headers")
        try:
            return any_endpoint.finish(request, self._guard.preflight(origin, asked, route.allowed))
        except NotifydError as error:
            return any_endpoint.refuse(request, error)

    async def _body(self, receive: Receive, request: Request, endpoint: Endpoint) -> bytes | None:
        """The whole body, None where the client went away.

        Raises what refuses its sender, before it takes in more than has come with the head, and
        before it waits for a large one; PayloadTooLarge, before reading where the client waits to
        be told to go on or means to send very much; and RequestTimeout.
        """
        limit = endpoint.max_body
        awaited = request.header(b"expect") is not None
        length = _announced(request.header(b"content-length"))
        known = awaited or not 0 <= length <= SMALL_BODY_BYTES
        if known:
            await settled(endpoint.check_caller(request))
        if length > (limit if awaited else limit + MAX_DISCARDED_BYTES):
            raise too_large(limit)
        try:
            async with asyncio.timeout(self._body_seconds):
                message = await receive()
                if not known and message.get("more_body", False):
                    await settled(endpoint.check_caller(request))
                return await _read(message, receive, limit)
        except TimeoutError as error:
            raise RequestTimeout(
                f"The body did not arrive within {self._body_seconds:g} s."
            ) from error


def _announced(length: bytes | None) -> int:
    """How long a body is to be, -1 where that is not said."""
    return int(length) if length is not None and length.isdigit() else -1


async def _read(message: Message, receive: Receive, limit: int) -> bytes | None:
    """Read a body from its first message to its end, one that is somewhat too large as well.

    Closing a socket with bytes unread resets it, and the client may never see why it was refused
    (RFC 9112, section 9.6).
    """
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        over = size > limit + MAX_DISCARDED_BYTES
        if over or not message.get("more_body", False):
            if size > limit:
                raise too_large(limit)
            return b"".join(parts)
        message = await receive()


async def _send(send: Send, answer: Answer, *, head: bool) -> None:
    headers: list[tuple[bytes, bytes]] = []
    if answer.status != 204:
        headers.append((b"content-type", answer.content_type))
        headers.append((b"content-length", b"%d" % len(answer.body)))
    headers.extend(answer.headers)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})


def _raw_path(scope: Scope) -> bytes:
    """The path below where the application is mounted, as the client wrote it."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    raw = raw.partition(b"?")[0]
    root: str = scope.get("root_path", "")
    for prefix in (root.encode(), quote(root).encode()):
        if root and raw.startswith(prefix):
            return raw[len(prefix) :] or b"/"
    return raw


def _decoded(segment: bytes) -> str:
    """A segment of a path (RFC 3986, section 2.1), in strict UTF-8; raises BadRequest."""
    if _BAD_ESCAPE.search(segment):
        raise BadRequest("The path has a % that does not begin an escape.")
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError as error:
        raise BadRequest("The path is not UTF-8.") from error


def _only_get(request: Request) -> Any:
    raise MethodNotAllowed("A stream is opened with GET; there is nothing in its head alone.")


def _only_upgraded(request: Request) -> Any:
    raise UpgradeRequired(
        "This is a WebSocket: connect to it with a WebSocket client, at ws:// or wss://."
    )


def _not_found(request: Request) -> Any:
    raise NotFound("There is nothing under this path.")
