"""The one place that knows asyncpg: a pool behind a breaker, migrations, named queries, and calls
gathered into batches.

Nothing here needs a session of its own on the server: every statement runs inside a transaction,
settings are local to it and locks end with it, so that a transaction pooler may stand in between
(`statement_cache_size` 0 there, because it loses prepared statements).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.resources.abc import Traversable
from typing import Any, Generic, NoReturn, Protocol, TypeAlias, TypeVar

import asyncpg
import msgspec
import structlog

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.resilience import BreakerState, CircuitBreaker, Guarded

T = TypeVar("T")

OLDEST_VERSION = 13
MIGRATION_SECONDS = 60.0
"""How long migrating may take, waiting for another process that does the same included."""

_MIGRATION_LOCK = 0x6E6F7469667964  # "notifyd"
_MIGRATION_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_QUERY_NAME = re.compile(r"^-- name: ([a-z_]+)$", re.MULTILINE)
_LOG_SECONDS = 60.0
_LATE_SECONDS = 0.1
CLOSE_SECONDS = 2.0
"""How long the end of the server waits for answers that nobody else waits for."""

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""What may wait in one line for a transaction, as `Answerable.weight` counts it; beyond, calls are
refused."""

_DRIVER_FAILURES: tuple[type[Exception], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_FAILURES: tuple[type[Exception], ...] = (*_DRIVER_FAILURES, OSError, TimeoutError)
# What ends a connection and says nothing of the server behind it.
_LOST: tuple[type[Exception], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InterfaceError,
    ConnectionError,
)
_CANNOT_START: tuple[type[Exception], ...] = (*_FAILURES, ValueError)

Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy"


class Migration(msgspec.Struct, frozen=True):
    """One step of the schema; `name` is its file's name, and they are applied by number."""

    number: int
    name: str
    sql: str


def load_migrations(directory: Traversable) -> Sequence[Migration]:
    """The `0001_….sql` files of a directory, in order."""
    found = []
    for file in directory.iterdir():
        if (match := _MIGRATION_NAME.fullmatch(file.name)) is not None:
            found.append(Migration(int(match[1]), file.name, file.read_text("utf-8")))
    return sorted(found, key=lambda migration: migration.number)


def load_queries(file: Traversable) -> Mapping[str, str]:
    """The queries of a file by the name in the line `-- name: …` above each."""
    _, *parts = _QUERY_NAME.split(file.read_text("utf-8"))
    names, texts = parts[::2], parts[1::2]
    return {
        name: "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip()
        for name, text in zip(names, texts, strict=True)
    }


class _Connection(asyncpg.Connection):
    """A connection that keeps no state between transactions, so that nothing needs a reset."""

    def get_reset_query(self) -> str:
        return ""


class Postgres:
    """A pool of connections to one database. `breaker` decides whether it is asked at all.

    `command_timeout_seconds` bounds each transaction as a whole, waiting for a connection included.
    """

    def __init__(
        self,
        url: str,
        breaker: CircuitBreaker,
        *,
        migrations: Sequence[Migration],
        pool_min: int = 1,
        pool_max: int = 10,
        command_timeout_seconds: float = 5,
        statement_cache_size: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.breaker = breaker
        self.up = False
        """Whether the last transaction was answered."""
        self._url = url
        self._migrations = migrations
        self._pool_min = pool_min
        self._pool_max = pool_max
        self._timeout = command_timeout_seconds
        self._statement_cache_size = statement_cache_size
        self._clock = clock
        self._logged_at = -_LOG_SECONDS
        self._silent = False
        self._log = structlog.get_logger("notifyd")
        self._guarded = Guarded(
            breaker,
            "PostgreSQL",
            failures=_DRIVER_FAILURES,
            on_failure=self._failed,
        )
        self._pool: asyncpg.Pool | None = None
        milliseconds = max(1, int(command_timeout_seconds * 1000))
        # Seeking by index is never wrong here, while a plan that was made when a table was empty
        # would go on reading all of it when it is full. The server gives up by itself what we no
        # longer wait for, and the locks of one of us that was frozen.
        self._begin = (
            "BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL jit = off; "
            f"SET LOCAL statement_timeout = {milliseconds}; "
            f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}"
        )

    # --- from start to end ---

    async def start(self) -> None:
        """Connect. Raises ConfigurationError, naming what is wrong, where that cannot be done."""
        try:
            async with asyncio.timeout(self._timeout):
                self._pool = await self._make_pool()
                async with self._pool.acquire() as connection:
                    await self._look_at(connection)
        except _CANNOT_START as error:
            await self.aclose()
            raise ConfigurationError(
                f"postgres.url: the database cannot be used: {_text(error)}."
            ) from error
        except BaseException:
            await self.aclose()
            raise
        self.up = True

    def _make_pool(self) -> asyncpg.Pool:
        return asyncpg.create_pool(
            self._url,
            min_size=self._pool_min,
            max_size=max(self._pool_min, self._pool_max),
            timeout=self._timeout,
            statement_cache_size=self._statement_cache_size,
            max_cached_statement_lifetime=0,
            connection_class=_Connection,
        )

    async def _look_at(self, connection: Connection) -> None:
        version = connection.get_server_version()
        if version.major < OLDEST_VERSION:
            raise ConfigurationError(
                f"postgres.url: PostgreSQL {OLDEST_VERSION} or newer is needed, and this is"
                f" {version.major}."
            )
        await connection.execute("BEGIN")
        commit = await connection.fetchval("SHOW synchronous_commit")
        await connection.execute("COMMIT")
        if commit in ("off", "local"):
            # What we answered for must not be lost with the server's memory.
            self._begin += "; SET LOCAL synchronous_commit = on"

    async def aclose(self) -> None:
        """Close the connections, those that are still at work after two seconds too."""
        pool, self._pool = self._pool, None
        self.up = False
        if pool is not None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    async def watch(self) -> NoReturn:
        """Look whether the database is back while the breaker is not closed, until cancelled."""
        await self._guarded.watch(self._ping, self._timeout)

    async def _ping(self) -> None:
        async def ask(connection: Connection) -> None:
            if await connection.fetchval("SHOW transaction_read_only") == "on":
                raise asyncpg.ReadOnlySQLTransactionError("the server takes no writes")

        await self._run(ask)

    # --- transactions ---

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, calls: int = 1) -> T:
        """Do `work` in one transaction and return what it returned once that is committed.

        `calls` says how many calls it answers: so often the breaker counts a failure, but for the
        loss of the connection they were on, which is one. Raises Unavailable where the database
        does not answer in time, refuses, or the breaker is open; the connection is closed then and
        not used again. Cancelled, the same.
        """
        breaker = self.breaker
        period = breaker.period
        asked = begun = False

        async def run() -> T:
            nonlocal asked
            asked = True
            return await self._run(begin)

        async def begin(connection: Connection) -> T:
            nonlocal begun
            begun = True
            return await work(connection)

        try:
            return await self._guarded.call(run, self._timeout)
        except Unavailable as error:
            if asked and not (begun and isinstance(error.__cause__, _LOST)):
                self._count_failures(calls - 1, period)
            raise

    def _count_failures(self, calls: int, period: int) -> None:
        breaker = self.breaker
        for _ in range(calls):
            if breaker.period != period:
                break
            breaker.failed(period)

    def _hung(self, calls: int) -> None:
        """So many more calls failed because of one that was not answered in time."""
        if self.breaker.state is BreakerState.CLOSED:
            self._count_failures(calls, self.breaker.period)

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        pool = self._pool
        if pool is None:
            raise Unavailable("PostgreSQL is not connected.", retry_after=1)
        connection = await self._begun(pool)
        try:
            answer = await work(connection)
            await connection.execute("COMMIT")
        except BaseException as error:
            # Whatever it was, nobody knows what the connection is in the middle of.
            _terminate(connection)
            if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                # The others lead to the same server, which is a primary no longer.
                await pool.expire_connections()
            raise
        finally:
            await pool.release(connection)
        self.up = True
        return answer

    async def _begun(self, pool: asyncpg.Pool) -> Connection:
        """A connection with a transaction begun. One that was lost while it was idle shows only
        now, when nothing was done with it yet: once, a new one takes its place."""
        if self._silent:
            # One was not answered in time. Where the network forgot it, it forgot the others too,
            # and each of them would be found out only by another timeout.
            self._silent = False
            await pool.expire_connections()
        try:
            return await self._begun_on(await pool.acquire(), pool)
        except _LOST:
            # The others may be as dead.
            await pool.expire_connections()
        return await self._begun_on(await pool.acquire(), pool)

    async def _begun_on(self, connection: Connection, pool: asyncpg.Pool) -> Connection:
        try:
            await connection.execute(self._begin)
        except BaseException:
            _terminate(connection)
            await pool.release(connection)
            raise
        return connection

    def turn(
        self,
        answer: Callable[[Sequence[C]], Awaitable[None]],
        *,
        take: Callable[[deque[C]], Sequence[C]],
        at_once: int = 1,
    ) -> Turn[C]:
        """A line of calls that `answer` answers in transactions here; see `Turn`."""
        return Turn(
            answer,
            take=take,
            # One that hangs is found out before those behind it give up.
            timeout=self._timeout + _LATE_SECONDS,
            at_once=at_once,
            on_hung=self._hung,
        )

    def _failed(self, error: Exception) -> None:
        self.up = False
        self._silent = self._silent or isinstance(error, TimeoutError)
        now = self._clock()
        if now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            self._log.warning("PostgreSQL does not answer", error=_text(error))

    # --- migrations ---

    async def check(self) -> Sequence[str]:
        """The names of migrations that were not applied; nothing is changed.

        Raises ConfigurationError where the database cannot be asked.
        """

        async def missing(connection: Connection) -> Sequence[str]:
            applied = await self._applied(connection)
            return [each.name for each in self._migrations if each.number not in applied]

        return await self._administer(missing)

    async def migrate(self) -> Sequence[str]:
        """Apply what is missing, in order and all or nothing; returns the names of what was.

        Of processes that start at once, one migrates and the others wait for it. Raises
        ConfigurationError where it cannot be done.
        """

        async def apply(connection: Connection) -> Sequence[str]:
            await connection.execute(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS notifyd_migrations (number integer PRIMARY KEY,"
                " name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            applied = await self._applied(connection)
            missing = [each for each in self._migrations if each.number not in applied]
            for migration in missing:
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO notifyd_migrations (number, name) VALUES ($1, $2)",
                    migration.number,
                    migration.name,
                )
            return [each.name for each in missing]

        if not await self.check():
            # So that an account that may not create tables can start.
            return []
        return await self._administer(apply)

    async def _applied(self, connection: Connection) -> Collection[int]:
        if await connection.fetchval("SELECT to_regclass('notifyd_migrations')") is None:
            return ()
        rows = await connection.fetch("SELECT number FROM notifyd_migrations")
        return {row["number"] for row in rows}

    async def _administer(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """In a transaction without the timeouts of everyday's."""
        if self._pool is None:
            raise ConfigurationError("postgres.url: not connected.")
        try:
            async with asyncio.timeout(MIGRATION_SECONDS), self._pool.acquire() as connection:
                try:
                    await connection.execute("BEGIN")
                    answer = await work(connection)
                    await connection.execute("COMMIT")
                except BaseException:
                    _terminate(connection)
                    raise
        except _FAILURES as error:
            raise ConfigurationError(
                f"postgres: the schema cannot be read or migrated: {_text(error)}."
            ) from error
        return answer


def _terminate(connection: Connection) -> None:
    # The pool has taken back one that was lost; that is not what anybody wants to be told.
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


def _text(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__


# --- calls gathered into batches ------------------------------------------------------------------


class Answerable(Protocol):
    """A call whose answer somebody may wait for."""

    deadline: float
    """When it is given up where it waits still, on the clock of the event loop."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """Where the answer goes."""
        ...

    @property
    def weight(self) -> int:
        """What it takes of memory, in bytes, about."""
        ...


C = TypeVar("C", bound=Answerable)


class Turn(Generic[C]):
    """Gathers calls of one turn of the event loop, and of the time that a batch before them takes.

    `answer` answers a batch by setting the results of its futures; `at_once` batches are at work
    at a time, each with what `take` takes off the waiting calls (at least one). With one at a time
    calls are answered in their order, as far as `take` keeps it. A call waits `timeout` seconds at
    most, and then fails with Unavailable. When the store hangs, those that waited behind the batch
    that timed out fail with it; `on_hung` is told how many.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[C]], Awaitable[None]],
        *,
        take: Callable[[deque[C]], Sequence[C]],
        timeout: float,
        at_once: int = 1,
        on_hung: Callable[[int], None] = lambda calls: None,
    ) -> None:
        self.weight = 0
        """Of all calls that wait, in bytes."""
        self._answer = answer
        self._take = take
        self._timeout = timeout
        self._at_once = at_once
        self._on_hung = on_hung
        self._waiting: deque[C] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled = False
        self._at_work: dict[asyncio.Task[None], Sequence[C]] = {}

    def add(self, call: C, *, most: int = MAX_WAITING_BYTES) -> None:
        """Let a call take part in the next batch.

        Raises Unavailable where those that wait are `most` bytes with it; one alone has room.
        """
        weight = call.weight
        if self._waiting and self.weight + weight > most:
            raise _too_slow()
        loop = asyncio.get_running_loop()
        call.deadline = loop.time() + self._timeout
        self.weight += weight
        self._waiting.append(call)
        if self._timer is None:
            self._timer = loop.call_at(call.deadline, self._look_at_the_time)
        if not self._scheduled and len(self._at_work) < self._at_once:
            self._scheduled = True
            loop.call_soon(self._begin)

    def _look_at_the_time(self) -> None:
        """Give up those that have waited too long."""
        self._timer = None
        waiting, loop = self._waiting, asyncio.get_running_loop()
        # With those that came at the same moment, so that what was to be stored in a row does not
        # lose one in its middle.
        late = []
        while waiting and waiting[0].deadline <= loop.time() + _LATE_SECONDS:
            late.append(waiting.popleft())
        self._left(late)
        _fail(late, _too_slow())
        if waiting:
            self._timer = loop.call_at(waiting[0].deadline, self._look_at_the_time)

    def _left(self, calls: Iterable[C]) -> None:
        self.weight -= sum(call.weight for call in calls)

    def _take_all(self) -> Sequence[C]:
        waiting = list(self._waiting)
        self._waiting.clear()
        self.weight = 0
        return waiting

    def _begin(self) -> None:
        self._scheduled = False
        while self._waiting and len(self._at_work) < self._at_once:
            batch = self._take(self._waiting)
            self._left(batch)
            task = asyncio.get_running_loop().create_task(self._work(batch))
            self._at_work[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        batch = self._at_work.pop(task)
        if task.cancelled():
            # Here and not in the task, which may never have begun.
            _fail(batch, Unavailable("The server is about to stop.", retry_after=1))
        self._begin()

    async def _work(self, batch: Sequence[C]) -> None:
        try:
            await self._answer(batch)
        except Unavailable as error:
            _fail(batch, error)
            if isinstance(error.__cause__, TimeoutError):
                waiting = self._take_all()
                self._on_hung(len(waiting))
                _fail(waiting, error)
        except Exception as error:  # noqa: BLE001  # goes to those who called
            _fail(batch, error)

    async def aclose(self, seconds: float = 0) -> None:
        """Give what is at work and what waits so many seconds; then cancel the one and fail the
        other."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (self._waiting or self._at_work) and (left := deadline - loop.time()) > 0:
            if self._at_work:
                await asyncio.wait(self._at_work, timeout=left)
            else:
                await asyncio.sleep(0)  # What waits begins at the end of this turn.
        _fail(self._take_all(), Unavailable("The server is about to stop.", retry_after=1))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tasks = list(self._at_work)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _too_slow() -> Unavailable:
    return Unavailable("PostgreSQL does not keep up.", retry_after=1)


def _fail(calls: Iterable[Answerable], error: Exception) -> None:
    for call in calls:
        if not call.future.done():
            # To each his own: raising one adds to its traceback.
            call.future.set_exception(error.again() if isinstance(error, Unavailable) else error)
