"""The client without a notifyd: its calls, its retries, and its obedience to close codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import httpx
import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from notifyd.client import (
    AsyncClient,
    AsyncStream,
    Backoff,
    Client,
    ConnectError,
    ConnectionClosed,
    Disconnected,
    Event,
    InvalidResponse,
    Message,
    Notification,
    Problem,
    Receipt,
    Reconnect,
    Retry,
    StatusError,
    Stream,
    Template,
    TimeoutException,
    TransportError,
    calls,
)
from notifyd.client.credentials import Credentials, FetchToken, Wait
from notifyd.client.errors import retry_after
from notifyd.client.listening import (
    Close,
    Closed,
    Connect,
    Deliver,
    Failed,
    Listening,
    Opened,
    Receive,
    Refused,
    Reply,
    Send,
    Silence,
    Step,
    Tell,
)
from notifyd.client.retry import Attempt, exchange

RECEIPT = {
    "success": True,
    "notification_id": "n1",
    "delivered_to": 2,
    "failed": 0,
    "timestamp": "2026-01-01T12:00:00.000Z",
    "outcome": "delivered",
    "from_a_newer_server": [1],
}
FAST = Reconnect(backoff=Backoff(initial=0.01, maximum=0.02))


def body(call: calls.Call[Any]) -> Any:
    assert call.content is not None
    return json.loads(call.content)


TEMPLATE = Template(id="t", name="T", event_type="e", payload_template={"a": "{{b}}"})
TEMPLATE_BODY = {"id": "t", "name": "T", "event_type": "e", "payload_template": {"a": "{{b}}"}}


class TestCalls:
    @pytest.mark.parametrize(
        ("target", "path", "named"),
        [
            ({"user": "u"}, "send", {"target_user_id": "u"}),
            ({"users": ["u", "v"]}, "send-to-users", {"target_user_ids": ["u", "v"]}),
            ({"channel": "c"}, "channel", {"channel": "c"}),
            ({"channels": ["c", "d"]}, "channels", {"channels": ["c", "d"]}),
            ({"broadcast": True}, "broadcast", {}),
        ],
    )
    def test_each_target_has_its_route(
        self, target: dict[str, Any], path: str, named: dict[str, Any]
    ) -> None:
        call = calls.send(Message(**target, event="e", payload=None))
        assert (call.method, call.path) == ("POST", f"/api/v1/notifications/{path}")
        assert body(call) == {**named, "event_type": "e", "payload": None}

    def test_content_is_named_as_the_protocol_names_it(self) -> None:
        id = uuid.uuid4()
        message = Message(
            user="u",
            template="t",
            variables={"a": 1},
            priority="High",
            ttl=0,
            correlation_id="c",
            source="s",
            id=id,
            exclude_connection="x",
            require_ack=True,
            audience=calls.Audience(type="Roles", value=["admin"]),
        )
        assert body(calls.send(message)) == {
            "target_user_id": "u",
            "template_id": "t",
            "variables": {"a": 1},
            "priority": "High",
            "ttl": 0,
            "correlation_id": "c",
            "source": "s",
            "id": str(id),
            "exclude_connection": "x",
            "require_ack": True,
            "audience": {"type": "Roles", "value": ["admin"]},
        }

    def test_an_event_without_a_payload_has_an_empty_one(self) -> None:
        assert body(calls.send(Message(user="u", event="e")))["payload"] == {}

    @pytest.mark.parametrize(
        "arguments",
        [
            {"event": "e"},
            {"user": "u", "channel": "c", "event": "e"},
            {"user": "u"},
            {"user": "u", "event": "e", "template": "t"},
            {"user": "u", "template": "t", "payload": {}},
            {"user": "u", "event": "e", "variables": {}},
            {"users": "u", "event": "e"},
            {"user": "u", "event": "e", "pirority": "High"},
        ],
    )
    def test_what_makes_no_notification_is_refused_before_it_is_sent(
        self, arguments: dict[str, Any]
    ) -> None:
        with pytest.raises(TypeError):
            Message(**arguments)

    def test_a_batch_holds_the_same_content(self) -> None:
        call = calls.batch(
            [
                Message(user="u", event="e", idempotency_key="k"),
                Message(broadcast=True, template="t"),
            ],
            stop_on_error=True,
        )
        assert body(call) == {
            "notifications": [
                {
                    "target": {"type": "user", "value": "u"},
                    "event_type": "e",
                    "payload": {},
                    "idempotency_key": "k",
                },
                {"target": {"type": "broadcast"}, "template_id": "t"},
            ],
            "options": {"stop_on_error": True, "deduplicate": False},
        }

    @pytest.mark.parametrize(
        ("call", "line", "content"),
        [
            (calls.notification_acks("n"), "GET /api/v1/notifications/n/acks", None),
            (calls.ack("n", "m"), "POST /api/v1/acks", {"notification_ids": ["n", "m"]}),
            (calls.list_channels(), "GET /api/v1/channels", None),
            (calls.get_channel("a:b"), "GET /api/v1/channels/a%3Ab", None),
            (calls.user_subscriptions("u"), "GET /api/v1/users/u/subscriptions", None),
            (calls.user_connections("u"), "GET /api/v1/users/u/connections", None),
            (
                calls.subscribe_user("u", ["c"]),
                "POST /api/v1/users/u/subscribe",
                {"channels": ["c"]},
            ),
            (
                calls.unsubscribe_user("u", ["c"]),
                "POST /api/v1/users/u/unsubscribe",
                {"channels": ["c"]},
            ),
            (
                calls.disconnect_user("u", reason="abuse", revoke=True),
                "POST /api/v1/users/u/disconnect",
                {"revoke": True, "reason": "abuse"},
            ),
            (calls.disconnect("c1"), "DELETE /api/v1/connections/c1", None),
            (calls.presence(["u"]), "POST /api/v1/presence", {"user_ids": ["u"]}),
            (
                calls.create_token("u", ttl=60, roles=["r"]),
                "POST /api/v1/tokens",
                {"user_id": "u", "ttl": 60, "roles": ["r"]},
            ),
            (calls.create_template(TEMPLATE), "POST /api/v1/templates", TEMPLATE_BODY),
            (calls.replace_template(TEMPLATE), "PUT /api/v1/templates/t", TEMPLATE_BODY),
            (calls.list_templates(), "GET /api/v1/templates", None),
            (calls.get_template("t"), "GET /api/v1/templates/t", None),
            (calls.delete_template("t"), "DELETE /api/v1/templates/t", None),
            (calls.stats(), "GET /api/v1/stats", None),
            (calls.ack_stats(), "GET /api/v1/stats/acks", None),
            (calls.health(), "GET /health", None),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_each_call_is_the_contracts(
        self, call: calls.Call[Any], line: str, content: Any
    ) -> None:
        assert f"{call.method} {call.path}" == line
        assert (None if call.content is None else body(call)) == content
        assert call.credential == ("token" if line == "POST /api/v1/acks" else "key")

    def test_every_publishing_call_has_a_key_of_its_own(self) -> None:
        keys = [
            calls.send(Message(user="u", event="e")).headers["Idempotency-Key"] for _ in range(2)
        ]
        assert keys[0] != keys[1]
        given = calls.send(Message(user="u", event="e", idempotency_key="order 7/ü"))
        assert given.headers["Idempotency-Key"] == "order 7/%C3%BC"
        spaced = calls.send(Message(user="u", event="e", idempotency_key="  a b "))
        assert spaced.headers["Idempotency-Key"] == "%20%20a b%20"

    @pytest.mark.parametrize(
        ("user", "raw"),
        [("a/b?c#d%2F", "a%2Fb%3Fc%23d%252F"), ("..", "%2E%2E"), ("zoë", "zo%C3%AB")],
    )
    def test_a_user_id_stays_one_segment_of_the_raw_path(self, user: str, raw: str) -> None:
        paths = []

        def answer(request: httpx.Request) -> httpx.Response:
            paths.append(request.url.raw_path)
            return httpx.Response(404)

        with (
            Client("http://test/realtime", transport=httpx.MockTransport(answer)) as client,
            pytest.raises(StatusError),
        ):
            client.user_subscriptions(user)
        assert paths == [f"/realtime/api/v1/users/{raw}/subscriptions".encode()]


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def answers(
    call: calls.Call[Any],
    replies: list[httpx.Response | httpx.TransportError],
    *,
    policy: Retry | None = None,
    credentials: Credentials | None = None,
) -> tuple[Any, list[Attempt], list[float]]:
    """Drive the exchange; what it returned or raised, the attempts, and the waits between them."""
    clock = Clock()
    attempts: list[Attempt] = []
    waits: list[float] = []
    flow = exchange(
        call,
        credentials or Credentials(api_key="key"),
        policy=policy or Retry(backoff=Backoff(initial=1.0, maximum=8.0)),
        clock=clock,
        random=lambda: 1.0,
    )
    reply: httpx.Response | httpx.TransportError | str | None = None
    pending = iter(replies)
    fetched = 0
    while True:
        try:
            step = flow.send(reply)
        except StopIteration as done:
            return done.value, attempts, waits
        except (StatusError, TransportError, InvalidResponse) as error:
            return error, attempts, waits
        reply = None
        if isinstance(step, Attempt):
            attempts.append(step)
            reply = next(pending)
        elif isinstance(step, FetchToken):
            fetched += 1
            reply = f"token-{fetched}"
        else:
            waits.append(step.seconds)
            clock.time += step.seconds


def ok() -> httpx.Response:
    return httpx.Response(200, json=RECEIPT)


SEND = calls.send(Message(user="u", event="e"))


class TestRetries:
    @pytest.mark.parametrize(
        "failure",
        [
            httpx.Response(429),
            httpx.Response(502),
            httpx.Response(503),
            httpx.Response(504),
            httpx.ConnectError("refused"),
            httpx.ReadTimeout("slow"),
            httpx.ReadError("reset"),
            httpx.RemoteProtocolError("closed without an answer"),
        ],
    )
    def test_a_passing_failure_is_tried_again_under_the_same_key(
        self, failure: httpx.Response | httpx.TransportError
    ) -> None:
        receipt, attempts, waits = answers(SEND, [failure, failure, ok()])
        assert receipt.delivered_to == 2
        assert waits == [1.0, 2.0]
        assert len(attempts) == 3
        assert len({attempt.headers["Idempotency-Key"] for attempt in attempts}) == 1
        assert len({attempt.content for attempt in attempts}) == 1

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 301])
    def test_any_other_failure_is_final(self, status: int) -> None:
        error, attempts, _ = answers(SEND, [httpx.Response(status)])
        assert isinstance(error, StatusError)
        assert (error.status, error.code) == (status, f"HTTP_{status}")
        assert len(attempts) == 1

    def test_attempts_are_bounded(self) -> None:
        error, attempts, waits = answers(SEND, [httpx.ConnectError("refused")] * 4)
        assert isinstance(error, ConnectError)
        assert len(attempts) == 4
        assert waits == [1.0, 2.0, 4.0]

    def test_retry_after_is_obeyed(self) -> None:
        _, _, waits = answers(SEND, [httpx.Response(503, headers={"Retry-After": "7"}), ok()])
        assert waits == [8.0]  # and the jitter: those told the same do not come the same instant

    def test_a_retry_after_beyond_the_total_ends_the_call(self) -> None:
        answer = httpx.Response(429, headers={"Retry-After": "3600"})
        error, attempts, waits = answers(SEND, [answer])
        assert error.retry_after == 3600
        assert (len(attempts), waits) == (1, [])

    def test_the_total_is_bounded(self) -> None:
        policy = Retry(attempts=100, total=10.0, backoff=Backoff(initial=4.0, maximum=4.0))
        error, attempts, waits = answers(SEND, [httpx.ReadTimeout("")] * 3, policy=policy)
        assert isinstance(error, TimeoutException)
        assert (len(attempts), waits) == (3, [4.0, 4.0])

    def test_what_acting_twice_would_spoil_is_repeated_only_if_the_server_did_not_act(self) -> None:
        delete = calls.delete_template("t")
        gone = httpx.Response(204)
        for certain in (httpx.ConnectError(""), httpx.Response(503), httpx.Response(429)):
            assert answers(delete, [certain, gone])[0] is None
        for uncertain in (httpx.ReadTimeout(""), httpx.ReadError(""), httpx.Response(504)):
            error, attempts, _ = answers(delete, [uncertain])
            assert isinstance(error, StatusError | TransportError)
            assert len(attempts) == 1

    def test_a_users_call_fetches_a_new_token_once(self) -> None:
        credentials = Credentials(api_key="key", renewable=True)
        acked = httpx.Response(200, json={"acked": ["n"], "refused": []})
        replies = [httpx.Response(401), acked]
        receipt, attempts, _ = answers(calls.ack("n"), list(replies), credentials=credentials)
        assert receipt.acked == ["n"]
        shown = [attempt.headers["Authorization"] for attempt in attempts]
        assert shown == ["Bearer token-1", "Bearer token-2"]
        assert all("X-API-Key" not in attempt.headers for attempt in attempts)
        error, attempts, _ = answers(
            calls.ack("n"), [httpx.Response(401)] * 2, credentials=credentials
        )
        assert error.status == 401
        assert len(attempts) == 2

    def test_an_answer_of_another_server_is_an_error(self) -> None:
        error, _, _ = answers(SEND, [httpx.Response(200, text="<html>")])
        assert isinstance(error, InvalidResponse)

    def test_an_error_carries_what_the_server_told(self) -> None:
        told = {
            "code": "VALIDATION_ERROR",
            "message": "no",
            "details": {"field": "payload.x", "constraint": "depth"},
        }
        answer = httpx.Response(422, json={"error": told}, headers={"X-Request-ID": "r1"})
        error, _, _ = answers(SEND, [answer])
        assert (error.status, error.code, error.message) == (422, "VALIDATION_ERROR", "no")
        assert (error.field, error.constraint, error.request_id) == ("payload.x", "depth", "r1")
        assert str(error) == "422 VALIDATION_ERROR: no (field payload.x) [request r1]"

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({}, None),
            ({"Retry-After": "12"}, 12.0),
            ({"Retry-After": "soon"}, None),
            ({"Retry-After": "Thu, 01 Jan 2026 00:01:00 GMT"}, None),
            (
                {
                    "Retry-After": "Thu, 01 Jan 2026 00:01:00 GMT",
                    "Date": "Thu, 01 Jan 2026 00:00:00 GMT",
                },
                60.0,
            ),
        ],
    )
    def test_retry_after_is_read_as_the_rfc_says(
        self, headers: dict[str, str], seconds: float | None
    ) -> None:
        assert retry_after(httpx.Headers(headers)) == seconds

    def test_backoff_doubles_to_its_bound_with_jitter(self) -> None:
        backoff = Backoff(initial=1.0, maximum=5.0)
        assert [backoff.delay(n, lambda: 1.0) for n in (1, 2, 3, 4, 1000)] == [1, 2, 4, 5, 5]
        assert backoff.delay(3, lambda: 0.0) == 2


class TestShells:
    """Both clients do what the core says."""

    @staticmethod
    def flaky() -> tuple[list[httpx.Request], Callable[[httpx.Request], httpx.Response]]:
        seen: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            if len(seen) == 1:
                raise httpx.ConnectError("refused")
            if len(seen) == 2:
                return httpx.Response(503, headers={"Retry-After": "1"})
            return ok()

        return seen, answer

    @staticmethod
    def check(seen: list[httpx.Request], receipt: Receipt, waits: list[float]) -> None:
        assert receipt.notification_id == "n1"
        assert len(seen) == 3
        assert waits == [0.2, 1.2]
        assert {request.headers["X-API-Key"] for request in seen} == {"key"}
        assert {request.headers["X-Extra"] for request in seen} == {"1"}
        assert len({request.headers["Idempotency-Key"] for request in seen}) == 1

    def test_client(self) -> None:
        seen, answer = self.flaky()
        waits: list[float] = []
        with Client(
            "http://test",
            api_key="key",
            headers={"X-Extra": "1"},
            transport=httpx.MockTransport(answer),
            sleep=waits.append,
            random=lambda: 1.0,
        ) as client:
            receipt = assert_type(client.send(user="u", event="e"), Receipt)
        self.check(seen, receipt, waits)

    async def test_async_client(self) -> None:
        seen, answer = self.flaky()
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        async with AsyncClient(
            "http://test",
            api_key="key",
            headers={"X-Extra": "1"},
            transport=httpx.MockTransport(answer),
            sleep=sleep,
            random=lambda: 1.0,
        ) as client:
            sending = assert_type(client.send(user="u", event="e"), Coroutine[Any, Any, Receipt])
            self.check(seen, await sending, waits)

    def test_the_client_loads_nothing_of_the_server(self) -> None:
        program = (
            "import sys; from notifyd import AsyncClient, Client; "
            "print([m for m in sys.modules if m.startswith(('notifyd.', 'uvicorn', 'starlette'))"
            " and not m.startswith('notifyd.client')])"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "['notifyd.version']"


def text(type: str, **fields: Any) -> bytes:
    return json.dumps({"type": type, **fields}).encode()


def connected(expires_in: float | None = None, heartbeat: float = 30) -> bytes:
    session: dict[str, Any] = {"heartbeat_interval": heartbeat, "subscriptions": []}
    if expires_in is not None:
        session["expires_at"] = (NOW + timedelta(seconds=expires_in)).isoformat()
    return text("connected", connection_id="c1", user_id="u", session=session)


def notification(id: str, **metadata: Any) -> bytes:
    return text(
        "notification",
        id=id,
        occurred_at="2026-01-01T12:00:00.000Z",
        event_type="order.created",
        payload={"n": id},
        metadata={"source": "http-api", "audience": {"type": "All"}, **metadata},
    )


NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Life:
    """A Listening whose I/O is this test."""

    def __init__(
        self,
        *,
        channels: tuple[str, ...] = (),
        renewable: bool = True,
        policy: Reconnect | None = None,
    ) -> None:
        self.clock = Clock()
        self.listening = Listening(
            "ws://test/ws",
            Credentials(token=None if renewable else "fixed", renewable=renewable),
            channels=channels,
            policy=policy or Reconnect(backoff=Backoff(initial=1.0, maximum=16.0)),
            clock=self.clock,
            now=NOW.timestamp,
            random=lambda: 1.0,
        )
        self.steps = self.listening.steps()
        self.tokens = 0

    def go(self, reply: Reply = None) -> Step:
        """The next step that a test has an opinion about."""
        step = self.steps.send(reply)
        if isinstance(step, FetchToken):
            self.tokens += 1
            return self.go(f"token-{self.tokens}")
        if isinstance(step, Tell) and not isinstance(step.event, Disconnected):
            return self.go()
        return step

    def open(self, hello: bytes | None = None) -> Step:
        assert isinstance(self.go(), Connect)
        assert isinstance(self.go(Opened()), Receive)
        return self.go(hello or connected())

    def wait_after(self, ending: Reply) -> float | None:
        """How long it stays away after `ending`."""
        step = self.go(ending)
        assert isinstance(step, Tell)
        assert isinstance(step.event, Disconnected)
        if step.event.retry_in is not None:
            wait = self.go()
            assert isinstance(wait, Wait)
            assert wait.seconds == step.event.retry_in
        return step.event.retry_in


def sent(step: Step) -> Any:
    assert isinstance(step, Send), step
    return json.loads(step.data)


class TestListening:
    @pytest.mark.parametrize("code", [1000, 1001, 1006, 1009, 1011, 1012, 4008, 4012])
    def test_codes_to_come_back_after(self, code: int) -> None:
        life = Life()
        life.open()
        assert life.wait_after(Closed(code, "")) == 1.0
        again = life.go()
        assert again == Connect("ws://test/ws", "token-1")
        assert "token-1" not in repr(again)

    @pytest.mark.parametrize("code", [1002, 1007, 4003])
    def test_codes_to_stay_away_after(self, code: int) -> None:
        life = Life()
        life.open()
        assert life.wait_after(Closed(code, "why")) is None
        with pytest.raises(ConnectionClosed) as caught:
            life.go()
        assert (caught.value.code, caught.value.reason) == (code, "why")

    def test_given_up_for_a_newer_connection_is_an_end_without_an_error(self) -> None:
        life = Life()
        life.open()
        assert life.wait_after(Closed(4009, "")) is None
        with pytest.raises(StopIteration):
            life.go()

    @pytest.mark.parametrize("code", [4001, 4010])
    def test_codes_to_come_with_a_new_token_after(self, code: int) -> None:
        life = Life()
        life.open()
        life.wait_after(Closed(code, ""))
        assert life.go() == Connect("ws://test/ws", "token-2")

    def test_new_tokens_refused_one_after_the_other_are_bounded(self) -> None:
        life = Life(policy=Reconnect(tokens=2))
        life.open()
        for _ in range(2):
            assert life.wait_after(Closed(4001, "")) is not None
            assert isinstance(life.go(), Connect)
            assert isinstance(life.go(Opened()), Receive)
        assert life.wait_after(Closed(4001, "bad")) is None
        with pytest.raises(ConnectionClosed):
            life.go()

    def test_a_connection_that_stands_forgets_refused_tokens(self) -> None:
        life = Life(policy=Reconnect(tokens=1))
        life.open()
        for _ in range(3):
            assert life.wait_after(Closed(4010, "")) is not None
            life.open()
        assert life.tokens == 4

    def test_a_fixed_token_that_is_refused_ends_it(self) -> None:
        life = Life(renewable=False)
        life.open()
        assert life.wait_after(Closed(4010, "expired")) is None

    @pytest.mark.parametrize(
        ("status", "wait"),
        [(401, 1.0), (429, 8.0), (503, 8.0), (502, 8.0), (403, None), (404, None)],
    )
    def test_refused_handshakes(self, status: int, wait: float | None) -> None:
        life = Life()
        life.go()
        told = None if status == 401 else 7.0
        error = StatusError("no", status=status, code="X", retry_after=told)
        assert life.wait_after(Refused(error)) == wait
        if wait is None:
            with pytest.raises(StatusError):
                life.go()
        else:
            again = life.go()
            assert isinstance(again, Connect)
            assert again.token == ("token-2" if status == 401 else "token-1")

    def test_what_shutdown_says_counts_for_the_close_that_follows(self) -> None:
        life = Life()
        life.open()
        life.go(text("shutdown", reason="deploy", reconnect_after_seconds=7))
        assert life.wait_after(Closed(1001, "")) == 8.0
        life.open()
        assert life.wait_after(Closed(1001, "")) == 2.0

    def test_later_is_later(self) -> None:
        life = Life()
        life.open()
        assert life.wait_after(Closed(4029, "")) == 16.0
        life.open()
        life.go(text("error", code="RATE_LIMITED", message="", retry_after_seconds=40))
        assert life.wait_after(Closed(4029, "")) == 41.0
        life.open()
        life.go(text("error", code="RATE_LIMITED", message="", retry_after_seconds=86400))
        assert life.wait_after(Closed(4029, "")) == 300.0

    def test_the_wait_grows_until_a_connection_has_lasted(self) -> None:
        life = Life()
        waits = []
        for _ in range(3):
            life.open()
            waits.append(life.wait_after(Closed(1006, "")))
        life.open()
        life.clock.time += 16
        waits.append(life.wait_after(Closed(1006, "")))
        assert waits == [1.0, 2.0, 4.0, 1.0]

    def test_connections_that_fail_one_after_the_other_can_be_bounded(self) -> None:
        life = Life(policy=Reconnect(attempts=2))
        life.go()
        assert life.wait_after(Failed(OSError("refused"))) is not None
        life.go()
        assert life.wait_after(Failed(OSError("refused"))) is None
        with pytest.raises(ConnectError, match="refused"):
            life.go()

    def test_channels_are_asked_for_on_every_connection(self) -> None:
        life = Life(channels=("a", "b"))
        assert life.listening.subscribe(["c"]) == []  # not connected: it is asked for later
        ask = {"type": "Subscribe", "payload": {"channels": ["a", "b", "c"]}}
        assert sent(life.open()) == ask
        life.go()
        (now,) = life.listening.unsubscribe(["b"])
        assert json.loads(now) == {"type": "Unsubscribe", "payload": {"channels": ["b"]}}
        life.go(text("unsubscribed", payload=["c"]))  # by the server
        life.wait_after(Closed(1011, ""))
        assert sent(life.open())["payload"] == {"channels": ["a"]}

    def test_a_channel_left_and_asked_for_again_is_kept(self) -> None:
        life = Life(channels=("a", "b"))
        life.open()
        life.listening.unsubscribe(["a"])
        life.listening.subscribe(["a"])
        # Answered in their order, what was asked on connecting first.
        life.go()
        life.go(text("subscribed", payload=["a", "b"]))
        life.go(text("unsubscribed", payload=["a"]))
        life.go(text("subscribed", payload=["a"]))
        assert set(life.listening.channels) == {"a", "b"}
        life.go(text("unsubscribed", payload=["b"]))  # by the server
        life.wait_after(Closed(1011, ""))
        assert sent(life.open())["payload"] == {"channels": ["a"]}
        life.go()
        life.listening.unsubscribe(["a"])
        life.go(text("unsubscribed", payload=["a"]))
        life.listening.subscribe(["a"])
        life.go(text("subscribed", payload=["a"]))
        life.go(text("unsubscribed", payload=["a"]))  # by the server
        assert life.listening.channels == ()

    def test_one_id_is_delivered_once(self) -> None:
        life = Life(policy=Reconnect(remember=2))
        assert isinstance(life.open(), Receive)

        def delivered(id: str) -> bool:
            step = life.go(notification(id))
            if isinstance(step, Deliver):
                step = life.go()
                assert isinstance(step, Receive)
                return True
            return False

        assert [delivered(id) for id in ("1", "1", "2", "1", "3")] == [
            True,
            False,
            True,
            False,
            True,
        ]
        assert not delivered("1")  # heard of more lately than 2
        assert delivered("2")  # which is forgotten: no more than two are kept

    def test_an_ack_that_was_not_answered_is_repeated(self) -> None:
        life = Life()
        life.open()
        for id in ("1", "2"):
            life.go(notification(id))
            life.go()
        assert len(life.listening.ack(["1"])) == 1
        assert len(life.listening.ack(["2"])) == 1
        life.go(text("acked", notification_ids=["1"]))
        life.wait_after(Closed(1006, ""))
        assert life.listening.ack(["3"]) == []  # between two connections
        first = sent(life.open())
        assert first == {"type": "Ack", "payload": {"notification_ids": ["2", "3"]}}
        life.go()
        life.go(text("acked", notification_ids=["3"], refused=["2"]))
        # It was not settled after all, and the caller will not see it again.
        again = sent(life.go(notification("2", replayed=True)))
        assert again == {"type": "Ack", "payload": {"notification_ids": ["2"]}}

    def test_acks_go_in_portions(self) -> None:
        life = Life()
        life.open()
        portions = life.listening.ack([str(n) for n in range(250)])
        assert [len(json.loads(p)["payload"]["notification_ids"]) for p in portions] == [
            100,
            100,
            50,
        ]

    def test_silence_for_two_and_a_half_heartbeats_is_an_end(self) -> None:
        life = Life()
        step = life.open(connected(heartbeat=10))
        assert step == Receive(25.0)
        life.clock.time += 24
        assert life.go(text("heartbeat")) == Receive(25.0)
        life.clock.time += 25
        assert isinstance(life.go(Silence()), Close)
        assert life.wait_after(None) == 1.0

    def test_the_callers_own_time_is_not_silence(self) -> None:
        life = Life()
        life.open(connected(heartbeat=10))
        assert isinstance(life.go(notification("1")), Deliver)
        life.clock.time += 3600
        assert life.go() == Receive(25.0)

    def test_a_new_token_is_shown_before_the_old_one_expires(self) -> None:
        life = Life()
        assert life.open(connected(expires_in=100, heartbeat=60)) == Receive(80.0)
        life.clock.time += 80
        assert sent(life.go(Silence())) == {"type": "Auth", "payload": {"token": "token-2"}}
        assert life.go() == Receive(150.0)
        expires_at = (NOW + timedelta(seconds=1000)).isoformat()
        life.go(text("refreshed", expires_at=expires_at))
        life.clock.time += 940
        assert sent(life.go(text("heartbeat")))["payload"] == {"token": "token-3"}
        life.go()
        life.wait_after(Closed(1006, ""))
        assert life.go() == Connect("ws://test/ws", "token-3")

    def test_a_clock_that_is_wrong_does_not_ask_without_end(self) -> None:
        life = Life()
        assert life.open(connected(expires_in=-50)) == Receive(5.0)

    def test_a_token_that_cannot_be_fetched_is_tried_again(self) -> None:
        life = Life()
        assert isinstance(life.steps.send(None), FetchToken)
        assert life.wait_after(Failed(OSError("away"))) == 1.0
        assert isinstance(life.steps.send(None), FetchToken)

    def test_what_the_protocol_does_not_know_is_ignored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        life = Life()
        life.open()
        for odd in (b"{", b"[]", text("notification"), b'{"type":"pong","x":"\xff"}'):
            assert isinstance(life.go(odd), Receive)
        assert len(caplog.records) >= 3
        assert isinstance(life.go(text("from_a_newer_server")), Receive)

    def test_one_name_is_no_list(self) -> None:
        with pytest.raises(TypeError):
            Life(channels="orders")  # type: ignore[arg-type]  # the mistake it is about


Handler = Callable[[ServerConnection], Awaitable[None]]


class Peer:
    """A WebSocket server that treats each connection in turn as the test says."""

    def __init__(self, *handlers: Handler | int) -> None:
        self._handlers = list(handlers)
        self.requests: list[Request] = []
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self._server: Server | None = None

    async def __aenter__(self) -> Peer:
        self._server = await serve(self._handle, "127.0.0.1", 0, process_request=self._greet)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        assert self._server is not None
        (socket,) = self._server.sockets
        return f"http://127.0.0.1:{socket.getsockname()[1]}"

    def _greet(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        if isinstance(self._handlers[0], int):
            status = self._handlers.pop(0)
            assert isinstance(status, int)
            return connection.respond(status, '{"error":{"code":"UNAUTHORIZED","message":"no"}}')
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        handler = self._handlers.pop(0)
        assert not isinstance(handler, int)
        await connection.send(connected(), text=True)
        await handler(connection)

    async def hear(self, connection: ServerConnection) -> Any:
        """The next message of the client, kept for the test too."""
        message = json.loads(await connection.recv())
        self.heard.put_nowait(message)
        return message


@contextlib.asynccontextmanager
async def listener(url: str, **options: Any) -> AsyncIterator[AsyncStream]:
    async with AsyncClient(url, token=options.pop("token", "jwt")) as client:
        yield client.listen(reconnect=FAST, **options)


class TestStreams:
    async def test_notifications_come_over_as_many_connections_as_it_takes(self) -> None:
        tokens = iter(["old", "new"])

        async def fetch() -> str:
            return next(tokens)

        async def first(connection: ServerConnection) -> None:
            assert (await peer.hear(connection))["type"] == "Subscribe"
            await connection.send(text("subscribed", payload=["orders"]), text=True)
            await connection.send(notification("1"), text=True)
            await peer.hear(connection)  # the ack, which is left unanswered
            await connection.close(4010, "expired")

        async def second(connection: ServerConnection) -> None:
            assert (await peer.hear(connection))["type"] == "Ack"
            assert (await peer.hear(connection))["type"] == "Subscribe"
            await connection.send(notification("1", replayed=True), text=True)
            await connection.send(notification("2", replayed=True), text=True)
            await connection.wait_closed()

        events: list[Event] = []
        async with (
            Peer(first, second) as peer,
            listener(peer.url, channels=["orders"], token=fetch, on_event=events.append) as stream,
        ):
            one = await anext(stream)
            assert_type(one, Notification[Awaitable[None]])
            assert (one.id, one.event_type, one.payload) == ("1", "order.created", {"n": "1"})
            assert one.occurred_at == datetime(2026, 1, 1, 12, tzinfo=UTC)
            assert (one.metadata.source, one.replayed) == ("http-api", False)
            assert stream.connection_id == "c1"
            await one.ack()
            two = await anext(stream)
            assert (two.id, two.replayed) == ("2", True)
            assert [request.path for request in peer.requests] == ["/ws?acks=1"] * 2
            shown = [request.headers["Authorization"] for request in peer.requests]
            assert shown == ["Bearer old", "Bearer new"]
        kinds = [type(event).__name__ for event in events]
        assert kinds == ["Connected", "Subscribed", "Disconnected", "Connected"]

    async def test_a_close_that_forbids_to_come_back(self) -> None:
        async def forbidden(connection: ServerConnection) -> None:
            await connection.close(4003, "disconnected by an administrator")

        async with Peer(forbidden) as peer, listener(peer.url) as stream:
            with pytest.raises(ConnectionClosed) as caught:
                await anext(stream)
            assert caught.value.code == 4003
            assert stream.closed
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert len(peer.requests) == 1

    async def test_given_up_for_a_newer_connection(self) -> None:
        async def given_up(connection: ServerConnection) -> None:
            await connection.close(4009, "")

        async with Peer(given_up) as peer, listener(peer.url) as stream:
            assert [notification async for notification in stream] == []

    async def test_a_refused_handshake_carries_what_the_server_told(self) -> None:
        async with Peer(401) as peer, listener(peer.url) as stream:
            with pytest.raises(StatusError) as caught:
                await anext(stream)
        assert (caught.value.status, caught.value.code) == (401, "UNAUTHORIZED")

    async def test_a_server_that_is_not_there_yet(self) -> None:
        async def hello(connection: ServerConnection) -> None:
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()

        async with Peer(503, 502, hello) as peer, listener(peer.url) as stream:
            assert (await anext(stream)).id == "1"

    async def test_a_connection_that_is_reset(self) -> None:
        async def reset(connection: ServerConnection) -> None:
            connection.transport.abort()

        async def hello(connection: ServerConnection) -> None:
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()

        async with Peer(reset, hello) as peer, listener(peer.url) as stream:
            assert (await anext(stream)).id == "1"

    async def test_a_server_that_fell_silent(self) -> None:
        async def silent(connection: ServerConnection) -> None:
            await connection.send(connected(heartbeat=0.01), text=True)
            await connection.wait_closed()

        async def hello(connection: ServerConnection) -> None:
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()

        async with Peer(silent, hello) as peer, listener(peer.url) as stream:
            assert (await anext(stream)).id == "1"

    async def test_a_cancelled_wait_loses_nothing(self) -> None:
        release = asyncio.Event()

        async def slow(connection: ServerConnection) -> None:
            await release.wait()
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()

        arrived = asyncio.Event()

        def told(_: Event) -> None:
            arrived.set()

        async with Peer(slow) as peer, listener(peer.url, on_event=told) as stream:
            waiting = asyncio.ensure_future(anext(stream))
            await arrived.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            release.set()
            assert (await anext(stream)).id == "1"
            assert len(peer.requests) == 1

    async def test_closing_ends_another_tasks_iteration_and_says_goodbye(self) -> None:
        closed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

        async def wait(connection: ServerConnection) -> None:
            await peer.hear(connection)
            await connection.wait_closed()
            closed.set_result(connection.close_code)

        arrived = asyncio.Event()

        def told(_: Event) -> None:
            arrived.set()

        async with Peer(wait) as peer, listener(peer.url, on_event=told) as stream:

            async def collect() -> list[Notification[Awaitable[None]]]:
                return [notification async for notification in stream]

            collecting = asyncio.ensure_future(collect())
            await arrived.wait()
            await stream.subscribe("later")
            assert (await peer.heard.get())["payload"] == {"channels": ["later"]}
            await stream.aclose()
            assert await collecting == []
            assert await closed == 1000

    async def test_breaking_out_keeps_the_connection_until_the_client_ends(self) -> None:
        closed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

        async def hello(connection: ServerConnection) -> None:
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()
            closed.set_result(connection.close_code)

        async with Peer(hello) as peer:
            async with AsyncClient(peer.url, token="jwt") as client:
                async for one in client.listen():
                    assert one.id == "1"
                    break
                assert not closed.done()
            assert await closed == 1000

    async def test_closing_ends_a_wait_for_a_server_that_is_away(self) -> None:
        away = asyncio.Event()

        def told(event: Event) -> None:
            assert isinstance(event, Disconnected)
            away.set()

        slow = Reconnect(backoff=Backoff(initial=3600.0, maximum=3600.0))
        async with Peer(503) as peer, AsyncClient(peer.url, token="jwt") as client:
            stream = client.listen(on_event=told, reconnect=slow)
            waiting = asyncio.ensure_future(anext(stream, None))
            await away.wait()
            await stream.aclose()
            assert await waiting is None

    async def test_what_a_token_function_raises_comes_out(self) -> None:
        def broken() -> str:
            raise LookupError("no such session")

        async with AsyncClient("http://127.0.0.1:9", token=broken) as client:
            with pytest.raises(LookupError):
                await anext(client.listen())

    async def test_to_listen_is_to_be_a_user(self) -> None:
        async with AsyncClient("http://127.0.0.1:9", api_key="key") as client:
            with pytest.raises(ValueError, match="token"):
                client.listen()

    async def test_the_blocking_stream_does_the_same(self) -> None:
        async def first(connection: ServerConnection) -> None:
            await peer.hear(connection)
            await connection.send(text("error", code="SUBSCRIPTION_ERROR", message=""), text=True)
            await connection.send(notification("1"), text=True)
            await peer.hear(connection)
            await connection.close(1011)

        async def second(connection: ServerConnection) -> None:
            await peer.hear(connection)
            await connection.send(notification("2"), text=True)
            await connection.wait_closed()

        events: list[Event] = []

        def fetch() -> str:
            if not failures:
                failures.append("away")
                raise httpx.ConnectError("the place that gives tokens is away")
            return "jwt"

        failures: list[str] = []

        def listen(url: str) -> list[str]:
            ids = []
            with (
                Client(url, token=fetch) as client,
                client.listen(["orders"], on_event=events.append, reconnect=FAST) as stream,
            ):
                for notification in stream:
                    assert_type(notification, Notification[None])
                    ids.append(notification.id)
                    notification.ack()
                    if notification.id == "2":
                        break
            return ids

        async with Peer(503, first, second) as peer:
            assert await asyncio.to_thread(listen, peer.url) == ["1", "2"]
            assert peer.requests[0].headers["Authorization"] == "Bearer jwt"
        assert any(isinstance(event, Problem) for event in events)

    async def test_the_blocking_stream_ends_where_it_must_stay_away(self) -> None:
        async def forbidden(connection: ServerConnection) -> None:
            await connection.close(4003, "")

        def listen(url: str) -> None:
            with Client(url, token="jwt") as client:
                stream = client.listen()
                with pytest.raises(ConnectionClosed):
                    next(stream)
                assert stream.closed
                assert list(stream) == []

        async with Peer(forbidden) as peer:
            await asyncio.to_thread(listen, peer.url)

    async def test_a_blocking_subscription_changes_while_it_is_listened_to(self) -> None:
        async def wait(connection: ServerConnection) -> None:
            for _ in range(3):
                await peer.hear(connection)
            await connection.send(notification("1"), text=True)
            await connection.wait_closed()

        def listen(url: str) -> tuple[str, ...]:
            with Client(url, token="jwt") as client:
                stream: Stream

                def told(_: Event) -> None:
                    stream.subscribe("a", "b")
                    stream.unsubscribe("a")
                    stream.ack("n")

                stream = client.listen(on_event=told)
                assert next(stream).id == "1"
                assert stream.connection_id == "c1"
                return stream.channels

        async with Peer(wait) as peer:
            assert await asyncio.to_thread(listen, peer.url) == ("b",)
            kinds = [peer.heard.get_nowait()["type"] for _ in range(3)]
            assert kinds == ["Subscribe", "Unsubscribe", "Ack"]

    async def test_another_thread_may_close_the_blocking_stream(self) -> None:
        async def wait(connection: ServerConnection) -> None:
            await connection.wait_closed()

        connected = threading.Event()

        def told(_: Event) -> None:
            connected.set()

        async with Peer(wait) as peer:
            with Client(peer.url, token="jwt") as client:
                stream: Stream = client.listen(on_event=told)
                listening = asyncio.ensure_future(asyncio.to_thread(list, stream))
                await asyncio.to_thread(connected.wait)
                await asyncio.to_thread(stream.close)
                assert await listening == []
