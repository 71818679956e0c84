"""Two tenants with the same names for everything, on two nodes of a cluster and in Redis, see
nothing of one another.

As in tests/server/test_isolation.py each is played among the other's calls, and then alone, and
must be told the same. The nodes go on from play to play, and each play has tenants of its own. A
user has a node of his own in each play, so that there is one order in which things happen; he is
spoken to, looked for and changed by either. All the while a third tenant, `default`, has users of
the same names connected to both nodes, and hears nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import msgspec
import pytest
import redis.asyncio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from notifyd.cluster import bus, router
from tests.cluster.conftest import cluster_of, knowing_each_other, node_settings
from tests.front_door import (
    Host,
    Listener,
    Transport,
    WebSocketListener,
    running,
    settings_of,
    until,
)
from tests.server.test_isolation import (
    CHANNELS,
    IDS,
    SYNC,
    USERS,
    Player,
    Step,
    a_step,
    contents,
    picked,
    steps,
)

OPERATOR = "operator-key-0123456789"
PLAYS = 60
"""So many tenants' names there are keys for."""

_NODE = re.compile(r"~[0-9a-f]{8}")
NOT_OF_A_TENANT = {
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/demo",
    "/demo/demo.css",
    "/demo/demo.js",
    "/demo/session",
}
"""Endpoints that say nothing of any tenant; /demo makes users of its own."""


def key_of(tenant: str) -> str:
    return f"key-of-{tenant}-0123456789"


def names_of(play: int) -> tuple[str, str]:
    return f"acme-{play:03}", f"acme-{play:03}.1"


class Nodes:
    """Two nodes, what speaks to them through Redis, and who hears what is nobody's business."""

    def __init__(self, hosts: list[Host], client: redis.asyncio.Redis, prefix: str) -> None:
        self.hosts = hosts
        self.client = client
        self.prefix = prefix
        self.witnesses: list[WebSocketListener] = []
        self.plays = iter(range(PLAYS))
        self._barriers = 0

    async def start(self) -> None:
        """Connect the witnesses, and wait for who takes what comes in Redis."""
        active = [host.notifyd.metrics.redis_trigger_active for host in self.hosts]
        await until(lambda: any(each.value for each in active), "the subscription")
        for host in self.hosts:
            for user in USERS:
                witness = await host.websocket(user)
                await witness.subscribe(*CHANNELS)
                self.witnesses.append(witness)

    async def publish(self, message: dict[str, Any]) -> None:
        """Through a channel of Redis, until all is done that comes of it."""
        await self._publish(message)
        self._barriers += 1
        event = {"event_type": SYNC, "payload": self._barriers}
        await self._publish({"type": "broadcast", "tenant_id": "default", "event": event})
        for witness in self.witnesses:
            assert (await witness.expect("notification"))["payload"] == self._barriers
        sources = [host.notifyd._sources for host in self.hosts]
        triggers = [each.trigger for each in sources if each is not None and each.trigger]
        await until(lambda: not any(each.under_way for each in triggers), "the dispatching")

    async def _publish(self, message: dict[str, Any]) -> None:
        await self.client.publish(f"{self.prefix}:broadcast", msgspec.json.encode(message))

    async def add(self, message: dict[str, Any]) -> None:
        """To the stream, until it is acknowledged."""
        stream = f"{self.prefix}:stream"
        id: Any = await self.client.xadd(stream, {"data": msgspec.json.encode(message)})
        async with asyncio.timeout(10):
            while True:
                groups: Any = await self.client.xinfo_groups(stream)
                if groups and (groups[0]["last-delivered-id"], groups[0]["pending"]) == (id, 0):
                    return

    async def nothing_was_heard(self) -> None:
        """By the witnesses."""
        for witness in self.witnesses:
            await witness.nothing_came()


class ClusterPlayer(Player):
    """A tenant whose users are each on a node of their own, and who calls either."""

    def __init__(
        self, nodes: Nodes, names: tuple[str, str], index: int, homes: tuple[int, ...]
    ) -> None:
        name = names[index]
        super().__init__(nodes.hosts[0], name, list, names=names, key=key_of(name))
        self.nodes = nodes
        self.homes = dict(zip(USERS, homes, strict=True))
        self.called: set[tuple[str, str]] = set()
        self._turn = index
        # The longer one first, for the other is in it.
        self._names = sorted(
            ((self.name, "me"), (self.other, "other")), key=lambda each: -len(each[0])
        )

    def told(self, what: str) -> None:
        assert f"<{self.other}>" not in what, f"{self.name} was told a secret: {what}"
        for name, role in self._names:
            what = what.replace(name, role)
        super().told(_NODE.sub("~", what))

    async def play(self, step: Step) -> None:
        self._next()
        await super().play(step)

    def _next(self) -> None:
        self._turn += 1
        self.host = self.nodes.hosts[self._turn % 2]

    async def hear(self) -> None:
        await self.settle()
        self._next()
        await super().hear()

    async def settle(self) -> None:
        """Wait until the nodes know what each of them has of this tenant."""
        hosts = self.nodes.hosts
        here = {cluster_of(host).id: host.notifyd._registry.tenant(self.name) for host in hosts}
        has: dict[str, dict[str, int]] = {}
        for user in USERS:
            for id, tenant in here.items():
                if connections := len(tenant.of_user(user)):
                    has.setdefault(user, {})[id] = connections
        async with asyncio.timeout(10):
            while await cluster_of(hosts[0]).find(self.name, USERS) != has:
                pass
        for host, other in zip(hosts, reversed(hosts), strict=True):
            known, there = cluster_of(host).occupancy, other.notifyd._registry
            await until(
                lambda known=known, there=there: (  # type: ignore[misc]  # bound now
                    known.elsewhere(self.name) == len(there.tenant(self.name).connections)
                ),
                "the count of connections",
            )

    async def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> None:
        self.called.add((method, path))
        await super().call(method, path, body, **headers)

    async def publish(self, target: dict[str, Any], number: int) -> None:
        self.called.add(("POST", "/api/v1/notifications"))
        await super().publish(target, number)

    async def connect(self, user: str, transport: Transport, acks: bool) -> None:
        self.host = self.nodes.hosts[self.homes[user]]
        await super().connect(user, transport, acks)
        await self.settle()

    async def gone(self, listener: Listener) -> None:
        for host in self.nodes.hosts:
            self.host = host
            await super().gone(listener)

    async def ack_by_call(self, user: str, ids: tuple[str, ...]) -> None:
        self.called.add(("POST", "/api/v1/acks"))
        await super().ack_by_call(user, ids)

    async def in_redis(self, way: str, target: tuple[str, Any], content: dict[str, Any]) -> None:
        """As a service does that speaks for any tenant."""
        event = {**content}
        if "payload" in event:
            event["payload"] = {"of": self.secret}
        if "variables" in event:
            event["variables"] = {"name": self.secret}
        type, names = target
        message = {"type": type, "tenant_id": self.name, "event": event}
        if names is not None:
            message["target"] = names
        await (self.nodes.publish if way == "channel" else self.nodes.add)(message)

    async def limit(self, most: int) -> None:
        """As the operator does; at the other node it holds some seconds later."""
        path, body = f"/api/v1/tenants/{self.name}/limits", {"max_connections": most}
        await self.call("PUT", path, msgspec.json.encode(body))
        content = msgspec.json.encode(body)
        answer = await self.host.request("PUT", path, key=OPERATOR, content=content)
        self.told(f"{answer.status_code} {answer.text}")
        await self.sync()

    async def sync(self) -> None:
        """What each node does every five seconds."""
        for host in self.nodes.hosts:
            await host.notifyd.tenants.sync()

    async def move(self, user: str, home: int) -> None:
        self.homes[user] = home

    async def look_at_tenant(self) -> None:
        await self.sync()
        await self.call("GET", f"/api/v1/tenants/{self.name}")

    async def leave_all(self) -> None:
        while self.listeners:
            await self.leave(0)
        await self.settle()


redis_targets = st.one_of(
    picked(*USERS).map(lambda name: ("user", name)),
    st.just(("users", list(USERS))),
    picked(*CHANNELS).map(lambda name: ("channel", name)),
    st.just(("channels", list(CHANNELS))),
    st.just(("broadcast", None)),
)
cluster_steps: st.SearchStrategy[Step] = st.one_of(
    steps,
    steps,
    a_step("in_redis", picked("channel", "stream"), redis_targets, contents),
    a_step("look", picked("/api/v1/cluster/status", "/stats", "/api/v1/channels")),
    a_step(
        "look", picked(*USERS).map(lambda name: f"/api/v1/cluster/users/{quote(name, safe='')}")
    ),
    a_step("limit", st.integers(1, 3)),
    a_step("look_at_tenant"),
)
homes = st.tuples(*[st.integers(0, 1)] * len(USERS))
plays = st.lists(st.tuples(st.integers(0, 1), cluster_steps), min_size=6, max_size=20)


async def transcripts(
    nodes: Nodes,
    play: list[tuple[int, Step]],
    where: tuple[tuple[int, ...], tuple[int, ...]],
    only: int | None = None,
) -> list[ClusterPlayer]:
    """What each tenant was told; with `only` one of them there is no other."""
    names = names_of(next(nodes.plays))
    players = [ClusterPlayer(nodes, names, index, where[index]) for index in range(2)]
    for index, player in enumerate(players):
        player._others = lambda index=index: players[1 - index].connection_ids  # type: ignore[misc]  # bound now
    for whose, step in play:
        if only in {None, whose}:
            await players[whose].play(step)
    for index, player in enumerate(players):
        if only in {None, index}:
            await player.hear()
        await player.leave_all()
    await nodes.nothing_was_heard()
    return players


async def compared(
    nodes: Nodes, play: list[tuple[int, Step]], where: tuple[tuple[int, ...], tuple[int, ...]]
) -> list[ClusterPlayer]:
    together = await transcripts(nodes, play, where)
    for index in range(2):
        alone = await transcripts(nodes, play, where, index)
        assert together[index].transcript == alone[index].transcript
    return together


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all plays of a test, as they have the same servers."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def nodes(
    runner: asyncio.Runner, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nodes]:
    """Two of them, for all plays of a test."""
    # Who answers late is left out of an answer, which then is another one.
    monkeypatch.setattr(bus, "ANSWER_SECONDS", 10.0)
    monkeypatch.setattr(bus.Bus.add, "__defaults__", (10.0,))
    defaults = bus.Bus.await_answers.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "seconds", 10.0)
    monkeypatch.setattr(router, "ASK_SECONDS", 10.1)
    stack = AsyncExitStack()
    yield runner.run(started_on(stack, redis_url))
    runner.run(stack.aclose())


async def started_on(stack: AsyncExitStack, redis_url: str) -> Nodes:
    prefix = f"test-{uuid4().hex}"
    keys = [{"name": "operator", "key": OPERATOR, "scopes": ["admin"]}]
    keys += [
        {"name": name, "key": key_of(name), "scopes": ["admin"], "tenant_id": name}
        for play in range(PLAYS)
        for name in names_of(play)
    ]
    sections: dict[str, dict[str, Any]] = {
        "redis": {
            "trigger_enabled": True,
            "trigger_patterns": (f"{prefix}:broadcast",),
            "stream_key": f"{prefix}:stream",
        },
        "cluster": {"presence_ttl_seconds": 60},
        "websocket": {"heartbeat_interval": 30},
        "tenant": {"enabled": True},
        "auth": {"api_keys": keys},
    }
    hosts = []
    for _ in range(2):
        node = running(
            "sockets", settings=settings_of(**node_settings(redis_url, prefix, **sections))
        )
        hosts.append(await stack.enter_async_context(node))
    await knowing_each_other(hosts)
    client = await stack.enter_async_context(redis.asyncio.Redis.from_url(redis_url))
    nodes = Nodes(hosts, client, prefix)
    await nodes.start()
    return nodes


@settings(
    max_examples=8,
    deadline=None,
    # What failed on servers that go on is not found again by trying parts of it.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(play=plays, where=st.tuples(homes, homes))
def test_nothing_crosses(
    runner: asyncio.Runner,
    nodes: Nodes,
    play: list[tuple[int, Step]],
    where: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    runner.run(compared(nodes, play, where))


CONTENT: dict[str, Any] = {"event_type": "test.event", "payload": None}
TO_U1: list[tuple[str, dict[str, Any]]] = [
    ("", {"target": {"type": "user", "value": "u1"}}),
    ("send", {"target_user_id": "u1"}),
    ("send-to-users", {"target_user_ids": list(USERS)}),
    ("channel", {"channel": "orders"}),
    ("channels", {"channels": list(CHANNELS)}),
    ("broadcast", {}),
    ("batch", {"target": {"type": "user", "value": "u1"}}),
]
REDIS_TO_U1: list[tuple[str, Any]] = [
    ("user", "u1"),
    ("users", list(USERS)),
    ("channel", "orders"),
    ("channels", list(CHANNELS)),
    ("broadcast", None),
]


def by_hand() -> list[Step]:
    """Every endpoint that tells of a tenant, or changes something of his; u1 is on both nodes."""
    return [
        ("connect", ("u1", "websocket", True)),
        ("subscribe", (0, CHANNELS, False)),
        ("move", ("u1", 1)),
        ("connect", ("u1", "sse", False)),
        *(("send", (route, target, CONTENT, None, False)) for route, target in TO_U1),
        *(
            ("in_redis", (way, target, CONTENT))
            for way in ("channel", "stream")
            for target in REDIS_TO_U1
        ),
        *(("template", (method, "welcome")) for method in ("POST", "PUT", "GET")),
        ("look", ("/api/v1/templates",)),
        (
            "send",
            ("send", TO_U1[1][1], {"template_id": "welcome", "variables": {}}, "key-1", False),
        ),
        ("send", ("broadcast", {}, {**CONTENT, "id": IDS[0], "require_ack": True}, None, False)),
        ("ack", (0, (IDS[0],))),
        ("ack_by_call", ("u1", (IDS[0],))),
        ("acks_of", (IDS[0],)),
        ("change_user", ("u1", "subscribe", CHANNELS)),
        ("change_user", ("u1", "unsubscribe", CHANNELS[1:])),
        ("look_at_user", ("u1", "subscriptions")),
        ("look_at_user", ("u1", "connections")),
        ("presence", ()),
        ("look", ("/api/v1/channels",)),
        ("look", ("/api/v1/channels/orders",)),
        ("look", ("/stats",)),
        ("look", ("/api/v1/stats",)),
        ("look", ("/api/v1/stats/acks",)),
        ("look", ("/api/v1/tenants",)),
        ("look", ("/api/v1/cluster/status",)),
        ("look", ("/api/v1/cluster/users/u1",)),
        ("look_at_tenant", ()),
        ("limit", (2,)),
        ("connect", ("a|b:{c}", "websocket", False)),
        ("make_token", ("u1",)),
        ("template", ("DELETE", "welcome")),
        ("disconnect_by_id", ()),
        ("disconnect", ("u1", True)),
        ("connect", ("u1", "websocket", False)),
    ]


def test_a_play_by_hand_calls_every_endpoint_and_reaches_both_nodes(
    runner: asyncio.Runner, nodes: Nodes
) -> None:
    play = [(whose, step) for step in by_hand() for whose in range(2)]
    players = runner.run(transcripts(nodes, play, ((0, 0, 0), (0, 1, 0))))
    for player in players:
        text = "\n".join(player.transcript)
        sent = len(TO_U1) + 2 * len(REDIS_TO_U1) + 2
        assert text.count("u1 < {'type': 'notification'") == 2 * sent
        assert text.count("'of': 'the secret of <me>'") == 2 * sent
        assert '{"user_id":"u1","connections":2' in text
        assert text.count("refused: ") == 2
    for endpoint in nodes.hosts[0].notifyd.endpoints:
        if endpoint.path in NOT_OF_A_TENANT:
            continue
        path = re.compile(re.sub(r"\{\w+\}", "[^/]+", endpoint.path))
        for player in players:
            assert any(
                method == endpoint.method and path.fullmatch(called)
                for method, called in player.called
            ), f"{endpoint.method} {endpoint.path} is not played"
