"""PostgreSQL that is frozen, killed, full, read-only or slow, and what is asked of it meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import Any

import asyncpg
import pytest

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.options import BreakerSettings
from notifyd.postgres import Migration, Postgres
from notifyd.queue.postgres import MIGRATIONS, PostgresUserLogs
from notifyd.queue.postgres.logs import EMPTY_LOG_SECONDS
from notifyd.resilience import BreakerState, CircuitBreaker
from tests.contract.backends import a_notification
from tests.stores import PostgresServer, Proxy, TransactionPooler, proxy, schema

TIMEOUT = 0.5
PATIENCE = 10.0
"""Seconds within which a busy machine too comes to give up a call; without a timeout, none does."""


@asynccontextmanager
async def store(url: str, **options: Any) -> AsyncIterator[Postgres]:
    """One that gives up soon and tries again soon."""
    settings = BreakerSettings(backoff_initial_ms=20, backoff_max_ms=100)
    made = Postgres(
        url,
        CircuitBreaker(settings),
        **{"migrations": MIGRATIONS, "command_timeout_seconds": TIMEOUT, **options},
    )
    await made.start()
    try:
        await made.migrate()
        yield made
    finally:
        await made.aclose()


def user_logs(postgres: Postgres) -> PostgresUserLogs:
    return PostgresUserLogs(
        postgres,
        max_size_per_user=100,
        max_messages=None,
        message_ttl_seconds=1000,
        clock=lambda: 1_800_000_000.0,
        on_dropped=lambda: None,
        on_corrupt=lambda reason: None,
    )


async def until_it_answers(logs: PostgresUserLogs) -> None:
    """Whoever calls again and again is served as soon as the breaker lets a probe through."""
    async with asyncio.timeout(20):
        while True:
            try:
                await logs.enqueue("acme", ("ann",), a_notification())
            except Unavailable:
                await asyncio.sleep(0.02)
            else:
                return


async def fails(logs: PostgresUserLogs) -> float:
    """Seconds until it was refused."""
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await logs.enqueue("acme", ("ann",), a_notification())
    return time.monotonic() - started


@pytest.fixture
async def url(postgres_server: PostgresServer) -> AsyncIterator[str]:
    async with schema(postgres_server.url) as its_own:
        yield its_own
        # What the test broke must be well again before its schema can go.
        await asyncio.to_thread(postgres_server.recover)


async def test_a_frozen_server_is_given_up_in_time_and_its_connection_with_it(
    postgres_server: PostgresServer, url: str
) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        before = await backend_pid(postgres)
        postgres_server.stop()
        assert TIMEOUT <= await fails(logs) < PATIENCE
        assert not postgres.up
        postgres_server.cont()
        await until_it_answers(logs)
        assert await backend_pid(postgres) != before


async def backend_pid(postgres: Postgres) -> int:
    async def ask(connection: Any) -> int:
        pid: int = await connection.fetchval("SELECT pg_backend_pid()")
        return pid

    return await postgres.transaction(ask)


async def test_calls_that_hang_together_open_the_breaker_and_then_nobody_waits(
    postgres_server: PostgresServer, url: str
) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        watching = asyncio.ensure_future(postgres.watch())
        await asyncio.sleep(0)
        postgres_server.stop()
        outcomes = await asyncio.gather(
            *(logs.enqueue("acme", ("ann",), a_notification()) for _ in range(5)),
            return_exceptions=True,
        )
        assert [type(each) for each in outcomes] == [Unavailable] * 5
        assert postgres.breaker.state is not BreakerState.CLOSED
        assert median([await fails(logs) for _ in range(9)]) < 0.05
        postgres_server.cont()
        await until_closed(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def until_closed(postgres: Postgres) -> None:
    closed = asyncio.Event()
    postgres.breaker.subscribe(lambda state: closed.set() if state is BreakerState.CLOSED else None)
    if postgres.breaker.state is not BreakerState.CLOSED:
        async with asyncio.timeout(20):
            await closed.wait()


async def test_who_waits_behind_a_hanging_batch_waits_no_longer_than_it(
    postgres_server: PostgresServer, url: str
) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        postgres_server.stop()
        started = time.monotonic()
        calls = []
        for _ in range(10):
            calls.append(logs.enqueue("acme", ("ann",), a_notification()))
            await asyncio.sleep(0.01)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * 10
        # One after the other would be ten times as long.
        assert time.monotonic() - started < 8 * TIMEOUT


async def test_what_was_answered_outlives_a_kill_and_a_restart(
    postgres_server: PostgresServer, url: str
) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        kept = a_notification()
        await logs.enqueue("acme", ("ann",), kept)
        await asyncio.to_thread(postgres_server.kill)
        assert await fails(logs) < TIMEOUT
        await asyncio.to_thread(postgres_server.start)
        await until_it_answers(logs)
        page = await logs.read("acme", "ann")
        assert page.entries[0].notification == kept


async def test_connections_that_are_cut_are_made_anew(
    postgres_server: PostgresServer, url: str
) -> None:
    async with proxy(postgres_server.port) as between:
        through = url.replace(str(postgres_server.port), str(between.port), 1)
        async with store(through) as postgres:
            logs = user_logs(postgres)
            await logs.enqueue("acme", ("ann",), a_notification())
            between.cut()
            await until_it_answers(logs)
            between.hold()
            assert await fails(logs) < PATIENCE
            between.release()
            await until_it_answers(logs)


@asynccontextmanager
async def through_a_proxy(url: str, port: int) -> AsyncIterator[tuple[Proxy, str]]:
    """The network before a server, and the URL that leads through it."""
    async with proxy(port) as between:
        yield between, url.replace(str(port), str(between.port), 1)


async def test_connections_lost_while_idle_are_replaced_and_nobody_notices(
    postgres_server: PostgresServer, url: str
) -> None:
    async with (
        through_a_proxy(url, postgres_server.port) as (between, through),
        store(through, pool_min=4, pool_max=4) as postgres,
    ):
        for _ in range(2):
            between.cut()
            # Before this process can hear of it.
            assert len(await asyncio.gather(*(backend_pid(postgres) for _ in range(8)))) == 8
        assert postgres.breaker._failures == 0


async def test_connections_that_the_network_forgot_cost_one_timeout_and_not_one_each(
    postgres_server: PostgresServer, url: str
) -> None:
    async with (
        through_a_proxy(url, postgres_server.port) as (between, through),
        store(through, pool_min=4, pool_max=4) as postgres,
    ):
        assert len(await asyncio.gather(*(backend_pid(postgres) for _ in range(8)))) == 8
        between.forget()
        with pytest.raises(Unavailable):
            await backend_pid(postgres)
        assert len(await asyncio.gather(*(backend_pid(postgres) for _ in range(8)))) == 8


async def test_a_connection_lost_on_the_way_is_one_failure_and_keeps_its_reason(
    postgres_server: PostgresServer, url: str
) -> None:
    async with (
        through_a_proxy(url, postgres_server.port) as (between, through),
        store(through) as postgres,
    ):

        async def lose(connection: Any) -> None:
            between.cut()
            await connection.execute("SELECT 1")

        with pytest.raises(Unavailable) as caught:
            await postgres.transaction(lose, calls=100)
        assert isinstance(
            caught.value.__cause__, asyncpg.ConnectionDoesNotExistError | ConnectionError
        )
        assert postgres.breaker.state is BreakerState.CLOSED
        assert postgres.breaker._failures == 1


async def test_calls_that_hang_one_behind_the_other_open_the_breaker(
    postgres_server: PostgresServer, url: str
) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        postgres_server.stop()
        calls = []
        for _ in range(BreakerSettings().failure_threshold):
            calls.append(logs.enqueue("acme", ("ann",), a_notification()))
            # Each is too late for the batch before it.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * len(calls)
        assert postgres.breaker.state is not BreakerState.CLOSED


async def test_too_many_connections(postgres_server: PostgresServer, url: str) -> None:
    owner = await asyncpg.connect(postgres_server.url)
    await owner.execute("DROP ROLE IF EXISTS narrow")
    await owner.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 1 IN ROLE pg_write_all_data")
    await owner.execute("GRANT pg_read_all_data TO narrow")
    name = url.rpartition("=")[2]
    await owner.execute(f"GRANT USAGE ON SCHEMA {name} TO narrow")
    try:
        async with store(url):
            pass
        async with store(url.replace("notifyd@", "narrow@"), pool_min=1, pool_max=4) as postgres:
            logs = user_logs(postgres)
            entered = asyncio.Event()
            leave = asyncio.Event()

            async def stay(connection: Any) -> None:
                entered.set()
                await leave.wait()

            staying = asyncio.ensure_future(postgres.transaction(stay))
            await entered.wait()
            assert await fails(logs) < TIMEOUT
            leave.set()
            await staying
            await until_it_answers(logs)
    finally:
        await owner.execute("DROP OWNED BY narrow")
        await owner.execute("DROP ROLE narrow")
        await owner.close()


async def test_an_exhausted_pool_is_waited_for_no_longer_than_the_timeout(url: str) -> None:
    async with store(url, pool_max=2) as postgres:
        logs = user_logs(postgres)
        assert postgres._pool is not None
        async with postgres._pool.acquire(), postgres._pool.acquire():
            assert TIMEOUT <= await fails(logs) < PATIENCE
        await until_it_answers(logs)


async def test_a_server_that_takes_no_writes_is_left_and_found_again(
    postgres_server: PostgresServer, url: str
) -> None:
    owner = await asyncpg.connect(postgres_server.url)
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        before = await backend_pid(postgres)
        await read_only(owner, "on")
        try:
            # As connections are after a failover: they lead to what is a replica now.
            error = await first_failure(logs)
            assert isinstance(error.__cause__, asyncpg.ReadOnlySQLTransactionError)
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await postgres._ping()
        finally:
            await read_only(owner, "off")
        await until_it_answers(logs)
        assert await backend_pid(postgres) != before
    await owner.close()


async def first_failure(logs: PostgresUserLogs) -> Unavailable:
    """The server reads its settings anew in its own time."""
    async with asyncio.timeout(10):
        while True:
            try:
                await logs.enqueue("acme", ("ann",), a_notification())
            except Unavailable as error:
                return error


async def read_only(owner: asyncpg.Connection, state: str) -> None:
    await owner.execute(f"ALTER SYSTEM SET default_transaction_read_only = {state}")
    await owner.execute("SELECT pg_reload_conf()")


async def test_a_statement_that_waits_for_a_lock_is_given_up_by_the_server_too(
    postgres_server: PostgresServer, url: str
) -> None:
    other = await asyncpg.connect(url)
    async with store(url) as postgres:
        logs = user_logs(postgres)
        await logs.enqueue("acme", ("ann",), a_notification())
        async with other.transaction():
            await other.execute("SELECT FROM notifyd_logs FOR UPDATE")
            assert await fails(logs) < PATIENCE
            # Nobody of ours still waits for the lock there.
            async with asyncio.timeout(10):
                while await other.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                ):
                    await other.execute("SELECT pg_sleep(0.02)")
        await until_it_answers(logs)
    await other.close()


async def test_a_transaction_of_a_process_that_was_frozen_ends_by_itself(url: str) -> None:
    other = await asyncpg.connect(url)
    async with store(url) as postgres:
        await user_logs(postgres).enqueue("acme", ("ann",), a_notification())
        # What one of us does, up to the moment in which it is frozen.
        await other.execute(postgres._begin)
        await other.execute("SELECT FROM notifyd_logs FOR UPDATE")
        await until_it_answers(user_logs(postgres))
    other.terminate()


async def test_a_caller_who_gives_up_blames_nobody(url: str) -> None:
    async with store(url) as postgres:
        logs = user_logs(postgres)
        for _ in range(10):
            call = asyncio.ensure_future(logs.enqueue("acme", ("ann",), a_notification()))
            await asyncio.sleep(0)
            call.cancel()
        await logs.enqueue("acme", ("ann",), a_notification())
        assert postgres.breaker.state is BreakerState.CLOSED
        assert postgres.up


# --- the schema ---


class TestMigrations:
    async def test_ten_processes_at_once_migrate_once(self, url: str) -> None:
        stores = [
            Postgres(url, CircuitBreaker(BreakerSettings()), migrations=MIGRATIONS)
            for _ in range(10)
        ]
        try:
            await asyncio.gather(*(each.start() for each in stores))
            applied = await asyncio.gather(*(each.migrate() for each in stores))
            assert sorted(map(len, applied)) == [0] * 9 + [len(MIGRATIONS)]
            assert [await each.check() for each in stores] == [[]] * 10
        finally:
            await asyncio.gather(*(each.aclose() for each in stores))

    async def test_check_says_what_is_missing_and_changes_nothing(self, url: str) -> None:
        later = Migration(len(MIGRATIONS) + 1, "later.sql", "CREATE TABLE later (n integer)")
        async with store(url, migrations=[]) as postgres:
            for _ in range(2):
                postgres._migrations = MIGRATIONS
                assert await postgres.check() == [each.name for each in MIGRATIONS]
            await postgres.migrate()
            postgres._migrations = [*MIGRATIONS, later]
            assert await postgres.check() == ["later.sql"]
            assert await postgres.migrate() == ["later.sql"]
            assert await postgres.check() == []

    async def test_one_that_fails_leaves_nothing_behind(self, url: str) -> None:
        broken = Migration(2, "broken.sql", "CREATE TABLE half (n integer); SELECT nonsense")
        async with store(url, migrations=[]) as postgres:
            postgres._migrations = [*MIGRATIONS[:1], broken]
            with pytest.raises(ConfigurationError, match="nonsense"):
                await postgres.migrate()
            assert await postgres.check() == [MIGRATIONS[0].name, "broken.sql"]

    async def test_an_account_that_may_not_create_can_use_what_is_there(
        self, postgres_server: PostgresServer, url: str
    ) -> None:
        owner = await asyncpg.connect(postgres_server.url)
        name = url.rpartition("=")[2]
        await owner.execute("DROP ROLE IF EXISTS plain")
        await owner.execute("CREATE ROLE plain LOGIN IN ROLE pg_write_all_data, pg_read_all_data")
        await owner.execute(f"GRANT USAGE ON SCHEMA {name} TO plain")
        try:
            async with store(url):
                pass
            async with store(url.replace("notifyd@", "plain@")) as postgres:
                await user_logs(postgres).enqueue("acme", ("ann",), a_notification())
        finally:
            await owner.execute("DROP OWNED BY plain")
            await owner.execute("DROP ROLE plain")
            await owner.close()


async def test_where_commits_do_not_wait_for_the_disk_ours_do(
    postgres_server: PostgresServer, url: str
) -> None:
    async def commits(postgres: Postgres) -> str:
        async def ask(connection: Any) -> str:
            setting: str = await connection.fetchval("SHOW synchronous_commit")
            return setting

        return await postgres.transaction(ask)

    for given, ours in (("off", "on"), ("on", "on"), ("remote_apply", "remote_apply")):
        async with store(f"{url}&synchronous_commit={given}") as postgres:
            assert await commits(postgres) == ours


async def test_behind_a_transaction_pooler_statements_must_not_be_kept(
    postgres_server: PostgresServer, url: str
) -> None:
    """What tests/contract runs behind such a pooler, runs behind one that is as they are."""
    async with TransactionPooler(postgres_server.port) as pooler:
        through = url.replace(str(postgres_server.port), str(pooler.port), 1)
        async with store(through, statement_cache_size=0, pool_max=1) as postgres:
            assert len({await backend_pid(postgres) for _ in range(4)}) == 2
        async with store(through, statement_cache_size=100, pool_max=1) as postgres:
            with pytest.raises(Unavailable) as caught:
                await asyncio.gather(*(backend_pid(postgres) for _ in range(3)))
            assert isinstance(caught.value.__cause__, asyncpg.InvalidSQLStatementNameError)


# --- several processes at one database ---


async def test_many_writers_at_once_neither_block_each_other_nor_miscount(url: str) -> None:
    """Batches over the same few users, in different orders, from several processes' stores."""
    users = [f"user-{n}" for n in range(20)]
    async with (
        store(url, command_timeout_seconds=20) as one,
        store(url, command_timeout_seconds=20) as other,
        store(url, command_timeout_seconds=20) as third,
    ):
        writers = [user_logs(each) for each in (one, other, third)]

        async def write(logs: PostgresUserLogs, step: int) -> None:
            for turn in range(15):
                order = users[turn % 20 :] + users[: turn % 20]
                notifications = [a_notification() for _ in range(5)]
                await asyncio.gather(
                    *(
                        logs.enqueue("acme", order[::step], notification)
                        for notification in notifications
                    ),
                    *(
                        logs.settle("acme", user, [notification.id for notification in found])
                        for user, found in [(order[3], notifications[:2]), (order[0], [])]
                    ),
                    logs.expire(),
                )

        await asyncio.gather(
            *(write(logs, step) for logs, step in zip(writers, (1, -1, 2), strict=True))
        )
        connection = await asyncpg.connect(url)
        counted = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM notifyd_entries),"
            " (SELECT sum(pending) FROM notifyd_logs),"
            " (SELECT sum(pending) FROM notifyd_log_totals)"
        )
        await connection.close()
        assert counted is not None
        assert counted[0] == counted[1] == counted[2] == await writers[0].depth()


async def test_each_users_order_is_that_of_the_calls(url: str) -> None:
    async with store(url, command_timeout_seconds=20) as postgres:
        logs = user_logs(postgres)
        notifications = [a_notification() for _ in range(90)]
        calls = []
        for number, notification in enumerate(notifications):
            calls.append(logs.enqueue("acme", ("ann", f"other-{number}"), notification))
            if number % 7 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*calls)
        page = await logs.read("acme", "ann")
        assert [entry.notification for entry in page.entries] == notifications


async def test_what_cannot_be_read_is_set_aside_and_the_rest_is_read(url: str) -> None:
    reasons: list[str] = []
    async with store(url) as postgres:
        logs = user_logs(postgres)
        logs._corrupt._on_corrupt = reasons.append
        notifications = [a_notification() for _ in range(5)]
        for each in notifications:
            await logs.enqueue("acme", ("ann",), each)
        connection = await asyncpg.connect(url)
        offsets = [
            row[0]
            for row in await connection.fetch(
                "SELECT entry_offset FROM notifyd_entries ORDER BY entry_offset"
            )
        ]
        for offset, body in (
            (offsets[1], b"\x00nonsense"),
            (offsets[3], b'{"v":99}'),
            (offsets[4], b'{"v":1}'),
        ):
            await connection.execute(
                "UPDATE notifyd_entries SET body = $2 WHERE entry_offset = $1", offset, body
            )
        for _ in range(2):
            page = await logs.read("acme", "ann")
            assert [entry.notification for entry in page.entries] == [
                notifications[0],
                notifications[2],
            ]
        assert reasons == ["not_json", "version", "shape"]
        assert await logs.depth() == 2
        # Sent again, it is stored again, and the broken one stays for somebody to look at.
        await logs.enqueue("acme", ("ann",), notifications[1])
        assert len((await logs.read("acme", "ann")).entries) == 3
        aside = await connection.fetch(
            "SELECT corrupt FROM notifyd_entries WHERE corrupt IS NOT NULL"
        )
        assert len(aside) == 3
        await connection.close()


async def test_what_was_set_aside_goes_with_its_time_though_its_log_is_long_empty(url: str) -> None:
    now = 1_800_000_000.0
    async with store(url) as postgres:
        logs = PostgresUserLogs(
            postgres,
            max_size_per_user=100,
            max_messages=None,
            message_ttl_seconds=10 * EMPTY_LOG_SECONDS,
            clock=lambda: now,
            on_dropped=lambda: None,
            on_corrupt=lambda reason: None,
        )
        await logs.enqueue("acme", ("ann",), a_notification())
        connection = await asyncpg.connect(url)
        await connection.execute("UPDATE notifyd_entries SET body = 'nonsense'")
        assert (await logs.read("acme", "ann")).entries == []
        now += 2 * EMPTY_LOG_SECONDS
        assert await logs.expire() == 0
        now += 10 * EMPTY_LOG_SECONDS
        for _ in range(2):
            assert await logs.expire() == 0
        assert await connection.fetchval("SELECT count(*) FROM notifyd_entries") == 0
        assert await connection.fetchval("SELECT count(*) FROM notifyd_logs") == 0
        await connection.close()
