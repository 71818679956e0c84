"""The HTTP API on real core objects, driven through ASGI; connections write into lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import httpx

from notifyd.api.acks import identify_with
from notifyd.api.guard import Endpoint, Guard
from notifyd.api.routes import Api, Services, build_endpoints
from notifyd.api.stats import NO_STORES, Stores
from notifyd.auth import ApiKeys, Origins, TokenVerifier
from notifyd.background import BackgroundTasks
from notifyd.channel_rules import ChannelRules
from notifyd.connections.admission import Admission, Handshake
from notifyd.connections.connection import Connection, Transport
from notifyd.connections.heartbeat import Heartbeat
from notifyd.connections.lifecycle import Lifecycle, Limits
from notifyd.connections.outbox import Bounds, Flusher, Outbox
from notifyd.connections.registry import Registry
from notifyd.connections.replay import Replayer
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.idempotency import MemoryIdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.identity import Identity
from notifyd.metrics import Metrics
from notifyd.options import ApiKeySettings, AuthSettings, ChannelRule, IdempotencySettings
from notifyd.queue.memory import MemoryAckLedger, MemoryUserLogs
from notifyd.templates import MemoryTemplates, TemplateStore
from notifyd.tenants import TenantLimits

ADMIN = "admin-key-0123456789"
PUBLISH = "publish-key-0123456789"
READ = "read-key-0123456789"
SECRET = "0123456789abcdef0123456789abcdef"
ORIGIN = "https://app.example.com"
NOW = 1_767_268_800.0
"""2026-01-01T12:00:00Z"""


class ListSink:
    """Keeps what a connection would have written."""

    pings: ClassVar[bool] = True

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed: tuple[int, str] | None = None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def messages(self) -> list[dict[str, Any]]:
        """The messages of a WebSocket, whose frames are all unmasked and under 64 KiB."""
        data, messages = b"".join(self.written), []
        while data:
            start = 4 if data[1] == 126 else 2
            end = start + (int.from_bytes(data[2:4], "big") if start == 4 else data[1])
            if data[0] == 0x81:
                messages.append(json.loads(data[start:end]))
            data = data[end:]
        return messages

    def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class ApiServer:
    """One server's API, without sockets."""

    def __init__(
        self,
        *,
        production: bool = True,
        queue: bool = True,
        acks: bool = True,
        metrics_enabled: bool = True,
        metrics_public: bool = False,
        cookie_name: str | None = None,
        templates: TemplateStore | None = None,
        logs: Any = None,
        stores: Stores = NO_STORES,
        body_seconds: float = 30.0,
    ) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.registry = Registry(self.clock)
        self.phase: Any = "ready"
        self.tasks = BackgroundTasks()
        self.logs = logs or (
            MemoryUserLogs(
                max_size_per_user=3,
                max_messages=1000,
                message_ttl_seconds=3600,
                clock=self.clock,
                on_dropped=self.metrics.queue_dropped_total.inc,
            )
            if queue
            else None
        )
        self.ledger = (
            MemoryAckLedger(
                timeout_seconds=30,
                max_pending=1000,
                clock=self.clock,
                on_acknowledged=self.metrics.ack_seconds.observe,
                on_expired=self.metrics.ack_expired_total.inc,
            )
            if acks
            else None
        )
        self.writes = StoreWrites(
            self.logs,
            self.ledger,
            max_waiting=1000,
            clock=self.clock,
            spawn=self.tasks.spawn,
            on_lost=lambda notification: None,
            on_unavailable=lambda error: None,
        )
        self.confirmations = Confirmations(
            self.registry,
            self.logs,
            self.ledger,
            max_pending=1000,
            idle_timeout=120,
            clock=self.clock,
            writes=self.writes,
        )
        auth = AuthSettings(
            jwt_secret=SECRET,
            cookie_name=cookie_name,
            api_keys=(
                ApiKeySettings(name="admin", key=ADMIN, scopes=("admin",)),
                ApiKeySettings(name="publisher", key=PUBLISH, scopes=("publish",)),
                ApiKeySettings(name="reader", key=READ, scopes=("read",)),
            ),
        )
        self.verifier = TokenVerifier(auth, production=production, clock=self.clock)
        origins = Origins((ORIGIN,), development=not production)
        admission = Admission(self.verifier, origins, cookie_name=cookie_name)
        self.flusher = Flusher(
            Bounds(max_bytes=1 << 20, max_messages=1000, total_bytes=1 << 30),
            on_slow=self.fail_slow,
        )
        heartbeat = Heartbeat(
            self.confirmations,
            interval=30,
            idle_timeout=120,
            leeway=30,
            clock=self.clock,
            on_idle=self.never,
            on_expired=self.never,
            on_late=lambda seconds: None,
        )
        self.lifecycle = Lifecycle(
            registry=self.registry,
            flusher=self.flusher,
            confirmations=self.confirmations,
            replayer=Replayer(
                self.logs,
                self.ledger,
                self.writes,
                self.confirmations,
                self.metrics,
                page_bytes=65536,
                spawn=self.tasks.spawn,
            ),
            heartbeat=heartbeat,
            admission=admission,
            verify=self.verifier.verify,
            rules=ChannelRules({"*": ChannelRule(subscribe="any")}),
            limits=Limits(1000, True, 30, lambda name: TenantLimits(1000, 20, 50)),
            metrics=self.metrics,
            clock=self.clock,
            spread=lambda low, high: low,
            spawn=self.tasks.spawn,
        )
        self.guard = Guard(
            api_keys=ApiKeys(auth, clock=self.clock),
            identify=identify_with(admission),
            origins=origins,
            credentials=cookie_name is not None,
            idempotency=MemoryIdempotencyKeys(IdempotencySettings(), clock=self.clock),
            metrics=self.metrics,
            production=production,
        )
        dispatcher = Dispatcher(
            registry=self.registry,
            flusher=self.flusher,
            confirmations=self.confirmations,
            logs=self.logs,
            ledger=self.ledger,
            writes=self.writes,
            metrics=self.metrics,
            clock=self.clock,
        )
        self.endpoints = build_endpoints(
            Services(
                guard=self.guard,
                registry=self.registry,
                lifecycle=self.lifecycle,
                dispatcher=dispatcher,
                confirmations=self.confirmations,
                logs=self.logs,
                ledger=self.ledger,
                templates=templates or MemoryTemplates(),
                verifier=self.verifier,
                metrics=self.metrics,
                metrics_enabled=metrics_enabled,
                metrics_public=metrics_public,
                queue_backend="memory",
                stores=stores,
                phase=lambda: self.phase,
                clock=self.clock,
                started_at=NOW - 90,
                new_id=new_uuid,
            )
        )
        self.app = Api(
            self.guard,
            self.endpoints,
            client_address=lambda peer, headers: peer,
            body_seconds=body_seconds,
        )

    def never(self, connection: Connection) -> None:
        """No timer runs here."""
        raise AssertionError(connection)

    def fail_slow(self, outbox: Outbox) -> None:
        """Every sink here takes what it gets."""
        raise AssertionError(outbox)

    def endpoint(self, method: str, path: str) -> Endpoint:
        """The endpoint of this method and pattern."""
        return next(each for each in self.endpoints if (each.method, each.path) == (method, path))

    def connect(
        self,
        user_id: str,
        *channels: str,
        transport: Transport = "websocket",
        roles: tuple[str, ...] = (),
    ) -> tuple[Connection, ListSink]:
        """A live connection of a user, subscribed to these channels. Needs a running loop."""
        self.flusher.start(asyncio.get_running_loop())
        sink = ListSink()
        handshake = Handshake(transport, b"", [(b"user-agent", b"tests/1.0")], "192.0.2.7")
        identity = Identity(user_id, roles=roles, subscribe=channels)
        return self.lifecycle.connect(handshake, identity, sink), sink

    def token(self, user_id: str) -> str:
        """A token that holds."""
        return self.verifier.mint(user_id, ttl=3600)[0]

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = ADMIN,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """One request through ASGI; `body` becomes JSON, `content` goes as it is."""
        sent = dict(headers or {})
        if key is not None:
            sent["X-API-Key"] = key
        if body is not None:
            content = json.dumps(body).encode()
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://notifyd.test") as client:
            return await client.request(method, path, content=content, headers=sent)

    async def publish(self, call: str, body: object, **options: Any) -> httpx.Response:
        """One of the publishing calls."""
        options.setdefault("key", PUBLISH)
        return await self.request("POST", f"/api/v1/notifications{call}", body, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have one."""
    error = response.json()["error"]
    assert isinstance(error, dict)
    return error


class LaterLogs:
    """A queue whose `enqueue` must be awaited, as a store's."""

    def __init__(self, enqueue: Callable[..., Awaitable[Any]]) -> None:
        self.enqueue = enqueue

    def read(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("nobody connects here")

    def depth(self) -> Awaitable[int]:
        return _later(7)


async def _later(value: Any) -> Any:
    return value
