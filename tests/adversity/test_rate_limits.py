"""Rates that nodes share, a Redis that is away, and callers from everywhere."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from notifyd import backends
from notifyd.identifiers import new_uuid
from notifyd.ratelimit.redis import PATIENCE_SECONDS, RedisLimit
from notifyd.resilience import BreakerState
from tests.adversity.hosting import Hosted
from tests.adversity.raw import connected, request
from tests.adversity.spawning import spawned
from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, PUBLISH_KEY, Host, StillClock, until, user
from tests.stores import RedisServer

PUBLISH = "/api/v1/notifications"
EVENT = {"target": user("u1"), "event_type": "a", "payload": 1}
KEYS = (
    {"name": "admin", "key": ADMIN_KEY, "scopes": ["admin"]},
    {"name": "shop", "key": PUBLISH_KEY, "scopes": ["publish"], "rate": "40/hour"},
)


async def ask(server: Hosted, until_then: float) -> tuple[int, int]:
    """One request after the other; how many were let through, how many were not."""
    statuses = {200: 0, 429: 0}
    asking = server.request("GET", "/api/v1/channels")
    async with server.connected() as client:
        while time.monotonic() < until_then:
            await client.send(asking)
            statuses[(await client.response()).status] += 1
    return statuses[200], statuses[429]


async def test_two_nodes_share_one_budget(redis_url: str, tmp_path: Path) -> None:
    rate, burst, seconds = 50, 100, 4.0
    environment = {
        "NOTIFYD_RATELIMIT__ENABLED": "true",
        "NOTIFYD_RATELIMIT__BACKEND": "redis",
        "NOTIFYD_RATELIMIT__HTTP_REQUESTS_PER_SECOND": str(rate),
        "NOTIFYD_RATELIMIT__HTTP_BURST": str(burst),
        "NOTIFYD_REDIS__URL": redis_url,
        "NOTIFYD_REDIS__KEY_PREFIX": f"test-{new_uuid()}",
    }
    directories = [tmp_path / "one", tmp_path / "other"]
    for directory in directories:
        directory.mkdir()
    async with (
        spawned("sockets", directories[0], **environment) as one,
        spawned("sockets", directories[1], **environment) as other,
    ):
        began = time.monotonic()
        asked = await asyncio.gather(
            *(ask(node, began + seconds) for node in (one, other) for _ in range(2))
        )
        took = time.monotonic() - began
    allowed, denied = sum(each[0] for each in asked), sum(each[1] for each in asked)
    assert denied > 0, "nobody asked for more than there was"
    assert allowed == pytest.approx(burst + rate * took, rel=0.02)
    # Each of them had its part of it.
    assert min(asked[0][0] + asked[1][0], asked[2][0] + asked[3][0]) > allowed // 10


def shared(redis_url: str, **given: Any) -> dict[str, Any]:
    """Sections of a node whose limits are in Redis."""
    ratelimit = {"enabled": True, "backend": "redis", **given.pop("ratelimit", {})}
    return {
        "ratelimit": ratelimit,
        "redis": {"url": redis_url, "key_prefix": "test", **given.pop("redis", {})},
        "auth": {"jwt_secret": "s" * 32, "api_keys": KEYS},
        **given,
    }


async def test_a_key_s_own_rate_and_an_address_are_the_same_at_every_node(
    start_on: StartServer, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing comes into a bucket while it is emptied, however long that takes.
    monkeypatch.setattr(backends, "RedisLimit", partial(RedisLimit, clock=StillClock()))
    given = shared(redis_server.url, ratelimit={"ws_connections_per_minute": 5})
    nodes = [await start_on(lane, **given) for lane in ("sockets", "asgi")]
    responses = await asyncio.gather(
        *(node.post(PUBLISH, EVENT, key=PUBLISH_KEY) for node in nodes for _ in range(30))
    )
    assert sorted(each.status_code for each in responses) == [200] * 40 + [429] * 20
    assert {int(each.headers["X-RateLimit-Remaining"]) for each in responses} == set(range(40))
    assert {each.headers["Retry-After"] for each in responses if each.status_code == 429} == {"90"}
    assert (await nodes[1].post(f"{PUBLISH}?x=1", EVENT, key=PUBLISH_KEY)).status_code == 429
    jwt = nodes[0].notifyd.verifier.mint("u1", ttl=60)[0]
    for node in (nodes[0], nodes[1], nodes[0], nodes[1], nodes[0]):
        await node.websocket(jwt=jwt)
    for node in nodes:
        stream = await node.sse(jwt=jwt, greeted=False)
        assert [each["code"] for each in await stream.rest()] == ["RATE_LIMITED"]


async def timed(host: Host, count: int) -> tuple[float, list[int]]:
    """How long so many requests take, one after the other, and their statuses."""
    began = time.perf_counter()
    statuses = [
        (await host.post(PUBLISH, EVENT, key=PUBLISH_KEY)).status_code for _ in range(count)
    ]
    return time.perf_counter() - began, statuses


@pytest.mark.parametrize("lane", ["sockets", "asgi"])
async def test_while_redis_hangs_each_node_counts_by_itself(
    start_on: StartServer, redis_server: RedisServer, lane: Any
) -> None:
    host = await start_on(
        lane,
        **shared(
            redis_server.url,
            redis={"command_timeout_seconds": 0.5},
            breaker={"failure_threshold": 3, "backoff_max_ms": 200},
        ),
    )
    redis = host.notifyd._backends.redis
    assert redis is not None
    _, statuses = await timed(host, 30)
    assert statuses == [200] * 30
    redis_server.stop()
    # No request waits for long, the first ones neither.
    responses = await asyncio.gather(*(host.post(PUBLISH, EVENT) for _ in range(10)))
    assert [each.status_code for each in responses] == [200] * 10
    await until(lambda: redis.breaker.state is not BreakerState.CLOSED, "an open breaker")
    seconds, statuses = await timed(host, 50)
    assert seconds < 50 * PATIENCE_SECONDS / 4
    # A bucket of this node's own, full at first.
    assert statuses == [200] * 40 + [429] * 10
    await host.websocket(jwt=host.notifyd.verifier.mint("u1", ttl=60)[0])
    redis_server.cont()
    await until(lambda: redis.breaker.state is BreakerState.CLOSED, "a closed breaker")
    _, statuses = await timed(host, 20)
    assert statuses == [200] * 10 + [429] * 10


async def test_a_redis_that_was_emptied(start_on: StartServer, redis_server: RedisServer) -> None:
    host = await start_on(**shared(redis_server.url))
    await timed(host, 40)
    assert (await timed(host, 1))[1] == [429]
    redis_server.command("FLUSHALL")
    redis_server.command("SCRIPT", "FLUSH")
    assert (await timed(host, 41))[1] == [200] * 40 + [429]


@pytest.mark.parametrize("lane", ["sockets", "asgi"])
async def test_callers_from_everywhere_take_no_more_than_their_place(
    start_on: StartServer, monkeypatch: pytest.MonkeyPatch, lane: Any
) -> None:
    monkeypatch.setattr(backends, "MAX_BUCKETS", 50)
    host = await start_on(
        lane,
        clock=StillClock(),
        ratelimit={"enabled": True, "http_requests_per_second": 1, "http_burst": 1},
    )
    limits = host.notifyd._backends._local_limits

    async def call(number: int) -> int:
        address = {"X-Forwarded-For": f"198.51.{number // 250}.{number % 250}"}
        return (await host.get("/openapi.json", key=None, headers=address)).status_code

    for first in range(0, 200, 50):
        statuses = await asyncio.gather(*(call(first + number) for number in range(50)))
        assert set(statuses) == {200}
        assert max(len(limit) for limit in limits) <= 50
    assert await call(199) == 429
    host.clock.advance(1)
    await host.notifyd._backends.sweep()
    assert max(len(limit) for limit in limits) == 0


async def test_a_stranger_whose_body_is_not_waited_for_counts_too(
    start_on: StartServer, redis_url: str
) -> None:
    host = await start_on(
        clock=StillClock(),
        **shared(
            redis_url,
            ratelimit={"http_requests_per_second": 1, "http_burst": 2},
            redis={"key_prefix": f"test-{new_uuid()}"},
        ),
    )
    head = request("POST", PUBLISH, "X-API-Key: a-stranger", "Content-Length: 900")
    async with connected(host.port) as client:
        await client.send(head)
        answer = await client.response()
        assert (answer.status, answer.header("connection")) == (401, "close")
        assert answer.header("x-ratelimit-remaining") == "1"
        assert await client.rest() == b""
