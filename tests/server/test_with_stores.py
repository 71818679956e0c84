"""A server that keeps things in a real Redis or PostgreSQL: how it starts, what it leaves behind
when it ends, and what it does with entries that it cannot read."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio
from structlog.testing import capture_logs

from notifyd.app import Notifyd
from notifyd.errors import ConfigurationError
from notifyd.queue.postgres import MIGRATIONS
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from tests.conftest import StartServer
from tests.front_door import WAIT, Host, settings_of, user
from tests.server.test_command import run
from tests.stores import RedisServer, StoreServer, free_port

Sections = dict[str, dict[str, Any]]

URLS = {
    "redis": "redis://:hunter2@127.0.0.1:{port}/0",
    "postgres": "postgresql://notifyd:hunter2@127.0.0.1:{port}/notifyd",
}


# --- starting ---


async def test_a_store_that_is_not_there_stops_the_start(store: str, tmp_path: Path) -> None:
    environ = {
        "NOTIFYD_QUEUE__BACKEND": store,
        f"NOTIFYD_{store.upper()}__URL": URLS[store].format(port=free_port()),
    }
    code, out, err = await run(tmp_path, "serve", "--port", "0", **environ)
    assert (code, out) == (2, "")
    assert f"{store}.url: " in err
    assert "refused" in err or "Connect call failed" in err
    assert "hunter2" not in err
    assert "Traceback" not in err


async def test_a_store_that_hangs_stops_the_start(
    store: str, kept: Sections, request: pytest.FixtureRequest
) -> None:
    server: StoreServer = request.getfixturevalue(f"{store}_server")
    kept[store] |= {"url": server.url, "command_timeout_seconds": 0.2}
    server.stop()
    async with asyncio.timeout(WAIT):
        with pytest.raises(ConfigurationError, match=rf"^{store}\.url: "):
            await Notifyd(settings_of(**kept)).start()


async def test_a_redis_that_would_give_up_what_it_keeps_is_warned_of(
    redis_server: RedisServer, start_on: StartServer
) -> None:
    async def warned(url: str, backend: str = "redis") -> list[str]:
        rates = {"enabled": True, "backend": "redis"}
        with capture_logs() as log:
            await start_on(queue={"backend": backend}, redis={"url": url}, ratelimit=rates)
        return [each["maxmemory_policy"] for each in log if "maxmemory_policy" in each]

    narrow = redis_server.url.replace("redis://", "redis://narrow:secret@")
    redis_server.command("ACL", "SETUSER", "narrow", "on", ">secret", "~*", "+@all", "-info")
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        assert await warned(redis_server.url) == []
        redis_server.command("CONFIG", "SET", "maxmemory", "1gb")
        assert await warned(redis_server.url) == ["allkeys-lru"]
        # Where it keeps nothing but counts of requests, it may.
        assert await warned(redis_server.url, "memory") == []
        assert await warned(narrow) == []
    finally:
        redis_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        redis_server.command("ACL", "DELUSER", "narrow")


async def test_the_pool_of_postgres_is_as_it_was_set(
    postgres_url: str, start_on: StartServer
) -> None:
    host = await start_on(
        queue={"backend": "postgres"},
        postgres={"url": postgres_url, "pool_max": 3, "statement_cache_size": 0},
    )
    await host.publish(user("away"))
    postgres = host.notifyd._backends.postgres
    assert postgres is not None
    pool = postgres._pool
    assert pool is not None
    assert pool.get_max_size() == 3
    async with pool.acquire() as connection:
        # Behind a transaction pooler it would be another session's.
        assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0


async def test_a_schema_that_lacks_migrations_stops_the_start(
    postgres_url: str, start_on: StartServer, tmp_path: Path
) -> None:
    kept: Sections = {
        "queue": {"backend": "postgres"},
        "postgres": {"url": postgres_url, "migrate_on_start": False},
    }
    with pytest.raises(ConfigurationError) as refused:
        await Notifyd(settings_of(**kept)).start()
    for told in (*(each.name for each in MIGRATIONS), "notifyd migrate"):
        assert told in str(refused.value)
    environ = {"DATABASE_URL": postgres_url}
    names = [each.name for each in MIGRATIONS]
    missing = "".join(f"missing: {name}\n" for name in names)
    assert await run(tmp_path, "migrate", "--check", **environ) == (1, missing, "")
    code, out, err = await run(tmp_path, "migrate", **environ)
    assert (code, err) == (0, "")
    assert out == "".join(f"applied: {name}\n" for name in names) + "The schema is up to date.\n"
    for again in (("migrate", "--check"), ("migrate",)):
        assert await run(tmp_path, *again, **environ) == (0, "The schema is up to date.\n", "")
    host = await start_on("sockets", **kept)
    assert (await host.publish(user("ada")))["outcome"] == "queued"


async def test_migrating_where_there_is_no_database(tmp_path: Path) -> None:
    code, out, err = await run(tmp_path, "migrate")
    assert (code, out) == (2, "")
    assert "postgres.url" in err
    url = URLS["postgres"].format(port=free_port())
    code, out, err = await run(tmp_path, "migrate", "--check", NOTIFYD_POSTGRES__URL=url)
    assert (code, out) == (2, "")
    assert "postgres.url" in err
    assert "hunter2" not in err


async def test_of_ten_that_migrate_at_once_one_does(postgres_url: str, tmp_path: Path) -> None:
    ten = [run(tmp_path, "migrate", DATABASE_URL=postgres_url) for _ in range(10)]
    told = await asyncio.gather(*ten)
    assert [(code, err) for code, _, err in told] == [(0, "")] * 10
    applied = re.findall("^applied: (.+)$", "".join(out for _, out, _ in told), re.MULTILINE)
    assert applied == [each.name for each in MIGRATIONS]


# --- ending ---


async def replayed(host: Host, user_id: str) -> list[Any]:
    """The payloads that come to a user who connects, up to `caught_up`."""
    websocket = await host.websocket(user_id)
    messages = [await websocket.receive()]
    while messages[-1]["type"] != "caught_up":
        messages.append(await websocket.receive())
    assert {each["type"] for each in messages[:-1]} == {"notification"}
    assert messages[-1]["replayed"] == len(messages) - 1
    return [each["payload"] for each in messages[:-1]]


async def test_what_clients_had_not_confirmed_is_stored_before_the_end(
    kept: Sections, start_on: StartServer
) -> None:
    first = await start_on("sockets", **kept)
    ada = await first.websocket("ada", query="acks=1")
    bob = await first.sse("bob")
    for n in range(5):
        await first.publish(user("ada"), payload=n)
        sent = await first.publish({"type": "users", "value": ["bob", "cleo"]}, payload=n)
    acked = (await ada.notifications(5))[2]
    assert (await ada.ack(acked["id"]))["type"] == "acked"
    await bob.notifications(5)
    await first.shut_down()
    assert (await ada.rest())[-1]["type"] == "shutdown"
    second = await start_on("sockets", **kept)
    assert await second.metric("queue_messages") == 14
    report = await second.get(f"/api/v1/notifications/{sent['notification_id']}/acks")
    states = {each["user_id"]: each["state"] for each in report.json()["recipients"]}
    assert states == {"bob": "queued", "cleo": "queued"}
    assert await replayed(second, "ada") == [0, 1, 3, 4]
    assert await replayed(second, "bob") == list(range(5))
    assert await replayed(second, "cleo") == list(range(5))


# --- what cannot be read ---

BAD = {
    "not_json": b'{"v":1,',
    "shape": b'{"v":1,"id":7}',
    "version": b'{"v":0,"message":"an older one"}',
}


async def spoil(store: str, kept: Sections, bodies: dict[str, bytes]) -> None:
    """Write something else where these notifications of ada are stored."""
    if store == "redis":
        keys = RedisKeys(kept["redis"]["key_prefix"])
        name = member("default", "ada")
        log, _ = keys.buckets[bucket_of(name)].of(name)
        async with redis.asyncio.Redis.from_url(kept["redis"]["url"]) as client:
            for id, body in bodies.items():
                # In front of the entry are its expiry and what it counts.
                stored = await client.hget(log, id)
                assert isinstance(stored, bytes)
                assert await client.hset(log, id, stored[:21] + body) == 0
        return
    connection = await asyncpg.connect(kept["postgres"]["url"])
    for id, body in bodies.items():
        done = await connection.execute(
            "UPDATE notifyd_entries SET body = $2 WHERE notification_id = $1", id, body
        )
        assert done == "UPDATE 1"
    await connection.close()


async def test_an_entry_that_cannot_be_read_stops_no_replay(
    store: str, kept: Sections, start_on: StartServer
) -> None:
    host = await start_on("sockets", **kept)
    ids = [(await host.publish(user("ada"), payload=n))["notification_id"] for n in range(6)]
    await spoil(store, kept, dict(zip(ids[1::2], BAD.values(), strict=True)))
    with capture_logs() as log:
        ada = await host.websocket("ada", query="acks=1")
        messages = await ada.notifications(3)
        assert [each["payload"] for each in messages] == [0, 2, 4]
        assert (await ada.expect("caught_up"))["replayed"] == 3
    for reason in BAD:
        assert await host.metric("queue_corrupt_total", reason=reason) == 1
    said = [each for each in log if "cannot be read" in each["event"]]
    assert said
    assert all(each["log_level"] in {"warning", "error"} for each in said)
    # They were set aside: they are neither counted any more nor come up again.
    assert await host.metric("queue_messages") == 3
    await ada.ack(*(each["id"] for each in messages))
    assert await host.metric("queue_messages") == 0
    again = await host.websocket("ada")
    await again.nothing_came()
    assert await host.metric("queue_corrupt_total", reason="shape") == 1
