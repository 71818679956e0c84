"""Two tenants with the same names for everything see nothing of one another.

They are played against one server, each call of one among those of the other, and then each of
them alone against a server of its own. What a tenant is told, by answers and by messages, must be
the same either way: whatever the other one does is without effect on him. What cannot be the same
(times, and ids that the server makes) is replaced by its place in what he was told.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from notifyd.identifiers import new_uuid
from tests.front_door import (
    Host,
    Lane,
    Listener,
    Transport,
    WebSocketListener,
    running,
    token,
    until,
)

TENANTS = ("acme", "acme.1")
KEYS = {name: f"key-of-{name}-0123456789" for name in TENANTS}
USERS = ("u1", "a|b:{c}", "acme")
CHANNELS = ("orders", "a:b")
TEMPLATES = ("welcome", "a:b")
IDS = ("0b9d3f6e-52a3-4c53-9a64-1f3c9f3f0d11", "0b9d3f6e-52a3-4c53-9a64-1f3c9f3f0d12")
IDEMPOTENCY_KEYS = (None, "key-1", "acme|key")
SYNC = "test.sync"

_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UPTIME = re.compile(r'"uptime_seconds":\d+')
_JWT = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+")

Step: TypeAlias = tuple[str, tuple[Any, ...]]
"""What a tenant does: the name of a method, and its arguments."""


class Player:
    """One tenant: what it does, and everything that it was told."""

    def __init__(
        self,
        host: Host,
        name: str,
        others: Callable[[], list[str]],
        *,
        names: tuple[str, str] = TENANTS,
        key: str | None = None,
    ) -> None:
        self.host = host
        self.name = name
        self.other = names[1 - names.index(name)]
        self.key = key or KEYS[name]
        self.secret = f"the secret of <{name}>"
        self.transcript: list[str] = []
        self.listeners: list[tuple[str, Listener]] = []
        # Issued once, so that a revocation holds for them in whichever second it comes.
        self.tokens = {user: token(user, tenant_id=name, roles=["r"]) for user in USERS}
        self._others = others
        self._excluded: str | None = None
        self._ids: dict[str, str] = {}
        self._synced = 0

    def told(self, what: str) -> None:
        """Remember an answer or a message, without what differs between two runs."""
        what = _UPTIME.sub('"uptime_seconds":0', _JWT.sub("<jwt>", _TIME.sub("<time>", what)))
        self.transcript.append(_ID.sub(self._id, what))

    def _id(self, match: re.Match[str]) -> str:
        id = match[0]
        return id if id in IDS else self._ids.setdefault(id, f"<id {len(self._ids)}>")

    @property
    def connection_ids(self) -> list[str]:
        return [str(each.connected["connection_id"]) for _, each in self.listeners]

    async def play(self, step: Step) -> None:
        """Do something, and hear what came of it."""
        name, arguments = step
        self.told(f"> {name} {arguments}")
        method: Callable[..., Awaitable[None]] = getattr(self, name)
        await method(*arguments)
        await self.hear()

    async def hear(self) -> None:
        """Everything that was sent to his connections up to now."""
        for user in USERS:
            mine = [each for whose, each in self.listeners if whose == user]
            if not mine:
                continue
            self._synced += 1
            await self.publish({"type": "user", "value": user}, self._synced)
            for listener in mine:
                await self._hear(user, listener, self._synced)

    async def publish(self, target: dict[str, Any], number: int) -> None:
        body = {"target": target, "event_type": SYNC, "payload": number, "ttl": 0}
        answer = await self.host.post("/api/v1/notifications", body, key=self.key)
        assert answer.status_code == 200

    async def _hear(self, user: str, listener: Listener, number: int) -> None:
        async with asyncio.timeout(10):
            while (message := await listener.next_message()) is not None:
                if message["type"] == "heartbeat":
                    continue
                if message.get("event_type") == SYNC:
                    if message["payload"] == number:
                        return
                    continue
                self.told(f"{user} < {message}")
        self.told(f"{user} < the end")
        self.listeners.remove((user, listener))

    # --- what a tenant can do ---

    async def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> None:
        given = {"X-API-Key": self.key}
        given |= {name.replace("_", "-"): text for name, text in headers.items() if text}
        answer = await self.host.http.request(method, path, content=body, headers=given)
        replayed = answer.headers.get("idempotent-replay", "")
        self.told(f"{answer.status_code} {replayed} {answer.text}")

    async def post(self, path: str, body: Any, **headers: str | None) -> None:
        await self.call("POST", path, msgspec.json.encode(body), **headers)

    async def connect(self, user: str, transport: Transport, acks: bool) -> None:
        if len(self.listeners) == 3:
            return
        jwt, query = self.tokens[user], "acks=1" if acks else ""
        listener: Listener
        try:
            if transport == "websocket":
                listener = await self.host.websocket(jwt=jwt, query=query)
            else:
                listener = await self.host.sse(jwt=jwt, query=f"{query}&channels={CHANNELS[0]}")
        except (InvalidStatus, AssertionError) as error:
            self.told(f"refused: {error}")
            return
        self.told(f"{listener.connected}")
        self.listeners.append((user, listener))

    async def leave(self, number: int) -> None:
        if self.listeners:
            _, listener = self.listeners.pop(number % len(self.listeners))
            await listener.close()
            await self.gone(listener)

    async def gone(self, listener: Listener) -> None:
        id = listener.connected["connection_id"]
        here = self.host.notifyd._registry.tenant(self.name).connections
        await until(lambda: id not in here)

    async def subscribe(self, number: int, channels: tuple[str, ...], away: bool) -> None:
        await self.say(number, "Unsubscribe" if away else "Subscribe", {"channels": channels})

    async def ack(self, number: int, ids: tuple[str, ...]) -> None:
        await self.say(number, "Ack", {"notification_ids": ids})

    async def say(self, number: int, type: str, payload: dict[str, Any]) -> None:
        able = [each for each in self.listeners if isinstance(each[1], WebSocketListener)]
        if able:
            user, listener = able[number % len(able)]
            assert isinstance(listener, WebSocketListener)
            await listener.send(type, payload)
            async with asyncio.timeout(10):
                while (message := await listener.next_message()) is not None:
                    if message.get("event_type") != SYNC:
                        self.told(f"{user} < {message}")
                    if message["type"] in {"subscribed", "unsubscribed", "acked", "error"}:
                        return

    async def ack_by_call(self, user: str, ids: tuple[str, ...]) -> None:
        bearer = {"Authorization": f"Bearer {self.tokens[user]}"}
        body = {"notification_ids": ids}
        answer = await self.host.post("/api/v1/acks", body, key=None, headers=bearer)
        self.told(f"{answer.status_code} {answer.text}")

    async def send(
        self,
        route: str,
        target: dict[str, Any],
        content: dict[str, Any],
        key: str | None,
        exclude: bool,
    ) -> None:
        body = {**target, **content}
        if "payload" in body:
            body["payload"] = {"of": self.secret}
        if "variables" in body:
            body["variables"] = {"name": self.secret}
        if exclude:
            # The same one each time, or a repeated call would have another body.
            self._excluded = self._excluded or self.foreign_connection()
            body["exclude_connection"] = self._excluded
        if route == "batch":
            body = {"notifications": [body, body], "options": {"deduplicate": True}}
        path = "/api/v1/notifications" if not route else f"/api/v1/notifications/{route}"
        await self.post(path, body, Idempotency_Key=key)

    def foreign_connection(self) -> str:
        """One of the other tenant's, which must be as good as none."""
        return next(iter(self._others()), new_uuid())

    async def acks_of(self, id: str) -> None:
        await self.call("GET", f"/api/v1/notifications/{id}/acks")

    async def look(self, path: str) -> None:
        await self.call("GET", path)

    async def look_at_user(self, user: str, what: str) -> None:
        await self.call("GET", f"/api/v1/users/{quote(user, safe='')}/{what}")

    async def change_user(
        self, user: str, what: Literal["subscribe", "unsubscribe"], channels: tuple[str, ...]
    ) -> None:
        path = f"/api/v1/users/{quote(user, safe='')}/{what}"
        await self.post(path, {"channels": channels})

    async def disconnect(self, user: str, revoke: bool) -> None:
        path = f"/api/v1/users/{quote(user, safe='')}/disconnect"
        await self.post(path, {"revoke": revoke, "reason": self.secret})

    async def disconnect_by_id(self) -> None:
        await self.call("DELETE", f"/api/v1/connections/{self.foreign_connection()}")

    async def presence(self) -> None:
        await self.post("/api/v1/presence", {"user_ids": USERS})

    async def make_token(self, user: str) -> None:
        await self.post("/api/v1/tokens", {"user_id": user, "ttl": 60})

    async def template(self, method: str, id: str) -> None:
        template = {
            "id": id,
            "name": self.secret,
            "event_type": "from.template",
            "payload_template": {"text": "{{name}}", "of": self.secret},
        }
        path = "/api/v1/templates" if method == "POST" else f"/api/v1/templates/{quote(id)}"
        body = msgspec.json.encode(template) if method in {"POST", "PUT"} else None
        await self.call(method, path, body)

    async def trespass(self, path: str) -> None:
        """Ask for the other one by name."""
        await self.call("GET", path.replace("{other}", self.other))
        await self.call("GET", "/api/v1/channels", X_Tenant_ID=self.other)


def picked(*of: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(of)


def a_step(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), st.tuples(*arguments))


users = st.sampled_from(USERS)
some_channels = st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=2, unique=True).map(tuple)
some_ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=2, unique=True).map(tuple)
targets = st.one_of(
    users.map(lambda name: ("", {"target": {"type": "user", "value": name}})),
    users.map(lambda name: ("send", {"target_user_id": name})),
    st.just(("send-to-users", {"target_user_ids": list(USERS)})),
    picked(*CHANNELS).map(lambda name: ("channel", {"channel": name})),
    st.just(("channels", {"channels": list(CHANNELS)})),
    st.just(("broadcast", {})),
    users.map(lambda name: ("batch", {"target": {"type": "user", "value": name}})),
    st.just(("batch", {"target": {"type": "broadcast"}})),
)
audiences = picked(
    {},
    {"audience": {"type": "Users", "value": ["u1"]}},
    {"audience": {"type": "Roles", "value": ["r"]}},
    {"audience": {"type": "Channels", "value": ["orders"]}},
)
contents = st.one_of(
    st.just({"event_type": "test.event", "payload": None}),
    picked(*IDS).map(lambda id: {"event_type": "test.event", "payload": None, "id": id}),
    picked(*IDS).map(
        lambda id: {"event_type": "test.event", "payload": None, "id": id, "require_ack": True}
    ),
    picked(*TEMPLATES).map(lambda id: {"template_id": id, "variables": {}}),
)
sendings = st.builds(
    lambda target, content, audience, key, exclude: (
        "send",
        (target[0], target[1], {**content, **audience}, key, exclude),
    ),
    targets,
    contents,
    audiences,
    picked(*IDEMPOTENCY_KEYS),
    st.booleans(),
)
steps: st.SearchStrategy[Step] = st.one_of(
    sendings,
    sendings,
    a_step("connect", users, picked("websocket", "sse"), st.booleans()),
    a_step("connect", users, picked("websocket", "sse"), st.booleans()),
    a_step("leave", st.integers(0, 2)),
    a_step("subscribe", st.integers(0, 2), some_channels, st.booleans()),
    a_step("ack", st.integers(0, 2), some_ids),
    a_step("ack_by_call", users, some_ids),
    a_step("acks_of", picked(*IDS)),
    a_step(
        "look",
        picked(
            "/stats",
            "/api/v1/stats",
            "/api/v1/stats/acks",
            "/api/v1/channels",
            "/api/v1/channels/orders",
            "/api/v1/templates",
            "/api/v1/tenants",
            "/health",
        ),
    ),
    a_step("look_at_user", users, picked("subscriptions", "connections")),
    a_step("change_user", users, picked("subscribe", "unsubscribe"), some_channels),
    a_step("disconnect", users, st.booleans()),
    a_step("disconnect_by_id"),
    a_step("presence"),
    a_step("make_token", users),
    a_step("template", picked("POST", "GET", "PUT", "DELETE"), picked(*TEMPLATES)),
    a_step("trespass", picked("/api/v1/tenants/{other}", "/api/v1/users/{other}/connections")),
)
plays = st.lists(st.tuples(st.integers(0, 1), steps), min_size=2, max_size=24)
"""Whose turn it is, and what he does."""


async def transcripts(
    lane: Lane, play: list[tuple[int, Step]], only: int | None = None, **given: Any
) -> list[list[str]]:
    """What each tenant was told; with `only` one of them there is no other."""
    keys = [
        {"name": f"backend {index}", "key": key, "scopes": ["admin"], "tenant_id": name}
        for index, (name, key) in enumerate(KEYS.items())
    ]
    async with running(lane, tenant={"enabled": True}, auth={"api_keys": keys}, **given) as host:
        players: list[Player] = []
        for index, name in enumerate(TENANTS):
            players.append(
                Player(host, name, lambda index=index: players[1 - index].connection_ids)  # type: ignore[misc]  # bound now
            )
        for whose, step in play:
            if only in {None, whose}:
                await players[whose].play(step)
        for index, player in enumerate(players):
            if only in {None, index}:
                await player.hear()
        return [player.transcript for player in players]


async def compared(lane: Lane, play: list[tuple[int, Step]], store: Callable[[], Any]) -> None:
    together = await transcripts(lane, play, **store())
    for index, name in enumerate(TENANTS):
        alone = await transcripts(lane, play, index, **store())
        assert together[index] == alone[index], name
        told = "\n".join(together[index])
        assert f"<{TENANTS[1 - index]}>" not in told, f"{name} was told a secret"


def in_memory() -> dict[str, Any]:
    return {}


SETTINGS = settings(
    max_examples=24,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class TestNothingCrosses:
    @SETTINGS
    @given(play=plays)
    def test_in_memory(self, lane: Lane, play: list[tuple[int, Step]]) -> None:
        asyncio.run(compared(lane, play, in_memory))

    @SETTINGS
    @given(play=plays)
    def test_in_redis(self, redis_url: str, play: list[tuple[int, Step]]) -> None:
        def store() -> dict[str, Any]:
            chosen = {"backend": "redis"}
            redis = {"url": redis_url, "key_prefix": f"test-{new_uuid()}"}
            return {"queue": chosen, "ack": chosen, "redis": redis}

        asyncio.run(compared("sockets", play, store))

    @pytest.mark.parametrize("steps_of_both", [1, 2])
    def test_a_play_by_hand_hears_something(self, lane: Lane, steps_of_both: int) -> None:
        """So that the plays above are not silently empty."""
        everyone: list[Step] = [
            ("template", ("POST", "welcome")),
            ("connect", ("u1", "websocket", True)),
            ("connect", ("u1", "sse", False)),
            ("subscribe", (0, ("orders", "a:b"), False)),
            ("send", ("broadcast", {}, {"event_type": "e", "payload": None}, None, False)),
            (
                "send",
                (
                    "channel",
                    {"channel": "orders"},
                    {"template_id": "welcome", "variables": {}, "id": IDS[0]},
                    "key-1",
                    True,
                ),
            ),
            ("ack", (0, (IDS[0],))),
            ("acks_of", (IDS[0],)),
            ("disconnect_by_id", ()),
            ("look", ("/stats",)),
            ("disconnect", ("u1", True)),
            ("connect", ("u1", "websocket", True)),
        ]
        play = [
            (whose, step) for step in everyone for whose in range(2) for _ in range(steps_of_both)
        ]
        told = asyncio.run(transcripts(lane, play))
        for name, transcript in zip(TENANTS, told, strict=True):
            text = "\n".join(transcript)
            assert text.count(f"'of': 'the secret of <{name}>'") >= 4
            assert "refused: " in text
            assert "404 " in text
        asyncio.run(compared(lane, play, in_memory))
