"""What of notifyd.redis_client needs no real Redis; its faults stand in tests/adversity."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest
from structlog.testing import capture_logs

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.options import BreakerSettings
from notifyd.redis_client import REJECTED_PER_TURN, Redis, RedisAddress, Script
from notifyd.resilience import Backoff, BreakerState, CircuitBreaker
from tests.front_door import until
from tests.server.test_tls import make_certificate

Answer = Callable[[list[bytes]], bytes | None]

SCRIPT = Script("one", b"return 1")


class FakeRedis:
    """Answers commands one by one; None answers nothing. `chunks` has what arrived at once, after
    the handshake."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.port = 0
        self.connections = 0
        self.handshakes: list[list[bytes]] = []
        self.chunks: list[list[list[bytes]]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        parser = hiredis.Reader()
        try:
            while data := await reader.read(1 << 20):
                parser.feed(data)
                chunk = []
                while (command := parser.gets()) is not False:
                    chunk.append(command)
                    writer.write(self.respond(command))
                commands = [each for each in chunk if each[0] not in _HANDSHAKE]
                self.handshakes += [each for each in chunk if each[0] in _HANDSHAKE]
                if commands:
                    self.chunks.append(commands)
        finally:
            writer.close()

    def respond(self, command: list[bytes]) -> bytes:
        answer = self.answer(command)
        if answer is None and command[0] in _HANDSHAKE:
            return b"+OK\r\n"
        return answer or b""


_HANDSHAKE = (b"CLIENT", b"PING", b"AUTH", b"SELECT")


def echo(command: list[bytes]) -> bytes | None:
    if command[0] in _HANDSHAKE:
        return None
    return b"+%s\r\n" % command[-1]


@asynccontextmanager
async def faking(
    answer: Answer = echo, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FakeRedis]:
    fake = FakeRedis(answer)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0, ssl=tls)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        for writer in fake.writers:
            writer.close()
        await server.wait_closed()


@asynccontextmanager
async def connected(url: str, **given: Any) -> AsyncIterator[Redis]:
    redis = a_redis(url, **given)
    await redis.start()
    try:
        yield redis
    finally:
        await redis.aclose()


def state(redis: Redis) -> BreakerState:
    return redis.breaker.state


def a_redis(url: str, *, threshold: int = 5, **given: Any) -> Redis:
    settings = BreakerSettings(failure_threshold=threshold, backoff_initial_ms=1, backoff_max_ms=10)
    given.setdefault("backoff", Backoff(0.001, 0.01))
    return Redis(url, CircuitBreaker(settings), **given)


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "address"),
        [
            ("redis://localhost:6379", RedisAddress()),
            ("redis://", RedisAddress()),
            ("redis://h:7000/3", RedisAddress("h", 7000, database=3)),
            ("redis://h?db=2", RedisAddress("h", database=2)),
            ("redis://:p%40ss@h", RedisAddress("h", password="p@ss")),
            ("redis://ann:pw@[::1]:7/0", RedisAddress("::1", 7, username="ann", password="pw")),
            ("rediss://h", RedisAddress("h", tls=True)),
            ("rediss://h?ssl_ca_certs=/ca.pem", RedisAddress("h", tls=True, ca_file="/ca.pem")),
            ("unix:///run/redis.sock?db=1", RedisAddress(path="/run/redis.sock", database=1)),
            ("unix://u:p@/r.sock", RedisAddress(path="/r.sock", username="u", password="p")),
        ],
    )
    def test_of_urls(self, url: str, address: RedisAddress) -> None:
        assert RedisAddress.parse(url) == address

    @pytest.mark.parametrize(
        "url",
        [
            "http://:secret@h",
            "redis://:secret@h:port",
            "redis://:secret@h:99999",
            "redis://:secret@h/db",
            "redis://:secret@h?what=1",
            "redis://:secret@h?what",
            "unix://:secret@",
            "localhost:6379",
            "",
        ],
    )
    def test_what_is_none_is_refused_and_no_password_is_told(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            RedisAddress.parse(url)
        assert str(caught.value).startswith("redis.url: ")
        assert "secret" not in str(caught.value)


class TestCalls:
    async def test_of_one_turn_go_out_together_and_are_answered_in_order(self) -> None:
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            answers = await asyncio.gather(*[redis.command("ECHO", n) for n in range(100)])
            assert answers == [b"%d" % n for n in range(100)]
            assert [len(chunk) for chunk in fake.chunks] == [100]

    async def test_what_is_gathered_goes_out_with_them_also_what_that_gathers(self) -> None:
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            calls: list[asyncio.Future[Any]] = []

            def send(name: str) -> None:
                calls.append(redis.command("ECHO", name))

            def send_more() -> None:
                send("second")
                redis.gather(lambda: send("third"))

            redis.gather(send_more)
            send("first")
            await until(lambda: len(calls) == 3)
            assert await asyncio.gather(*calls) == [b"first", b"second", b"third"]
            assert [len(chunk) for chunk in fake.chunks] == [3]

    async def test_what_fails_in_gathering_costs_nobody_else_anything(self) -> None:
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            calls: list[asyncio.Future[Any]] = []

            def fail() -> None:
                raise ValueError("a fault of ours")

            with capture_logs() as log:
                redis.gather(fail)
                redis.gather(lambda: calls.append(redis.command("ECHO", 1)))
                await until(lambda: bool(calls))
            assert await calls[0] == b"1"
            assert [each["error"] for each in log] == ["a fault of ours"]
            assert await redis.command("ECHO", 2) == b"2"

    async def test_a_script_is_loaded_once_on_a_connection(self) -> None:
        def answer(command: list[bytes]) -> bytes | None:
            return None if command[0] in _HANDSHAKE else b":1\r\n"

        async with faking(answer) as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            for _ in range(2):
                await asyncio.gather(*[redis.run(SCRIPT, ("k",), (1, b"x")) for _ in range(2)])
            first, second = fake.chunks
            assert [command[0] for command in first] == [b"SCRIPT", b"EVALSHA", b"EVALSHA"]
            assert first[1] == [b"EVALSHA", SCRIPT.sha.encode(), b"1", b"k", b"1", b"x"]
            assert [command[0] for command in second] == [b"EVALSHA", b"EVALSHA"]

    async def test_the_converted_answer_is_the_callers(self) -> None:
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            assert await redis.command("ECHO", 20, convert=int) == 20
            with pytest.raises(ValueError, match="invalid literal"):
                await redis.command("ECHO", "x", convert=int)
            assert state(redis) is BreakerState.CLOSED

    async def test_one_that_nobody_awaits_is_made(self) -> None:
        done: list[bytes] = []
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            redis.command("ECHO", "a", convert=done.append)
            await redis.command("ECHO", "b")
            assert done == [b"a"]

    async def test_one_that_is_cancelled_before_it_is_sent_is_not(self) -> None:
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            redis.command("ECHO", "a").cancel()
            assert await redis.command("ECHO", "b") == b"b"
            assert fake.chunks == [[[b"ECHO", b"b"]]]

    async def test_one_that_is_cancelled_later_is_accounted_for_all_the_same(self) -> None:
        done: list[bytes] = []
        async with faking() as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            future = redis.command("ECHO", "a", convert=done.append)
            await asyncio.sleep(0)
            future.cancel()
            assert await redis.command("ECHO", "b") == b"b"
            assert done == [b"a"]
            assert state(redis) is BreakerState.CLOSED

    async def test_closing_waits_for_answers_and_takes_no_more(self) -> None:
        async with faking() as fake:
            redis = a_redis(f"redis://127.0.0.1:{fake.port}")
            await redis.start()
            future = redis.command("ECHO", "a")
            await redis.aclose()
            assert await future == b"a"
            assert not redis.up
            with pytest.raises(Unavailable):
                redis.command("ECHO", "b")


class TestConnecting:
    async def test_with_a_name_a_password_and_a_database(self) -> None:
        async with faking() as fake:
            async with connected(f"redis://ann:pw@127.0.0.1:{fake.port}/3"):
                pass
            assert fake.handshakes == [
                [b"AUTH", b"ann", b"pw"],
                [b"SELECT", b"3"],
                [b"CLIENT", b"SETNAME", b"notifyd"],
                [b"PING"],
            ]

    @pytest.mark.parametrize(
        "refusal",
        [b"-WRONGPASS invalid", b"-NOAUTH Authentication required.", b"-LOADING in progress"],
    )
    async def test_what_redis_refuses_is_told(self, refusal: bytes) -> None:
        async with faking(lambda command: b"%s\r\n" % refusal) as fake:
            redis = a_redis(f"redis://:pw@127.0.0.1:{fake.port}")
            with pytest.raises(ConfigurationError, match=refusal[1:8].decode()) as caught:
                await redis.start()
            assert "pw" not in str(caught.value)
            await redis.aclose()

    async def test_over_tls(self, tmp_path: Path) -> None:
        certificate, key = make_certificate(tmp_path)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        async with faking(tls=context) as fake:
            url = f"rediss://127.0.0.1:{fake.port}"
            async with connected(f"{url}?ssl_ca_certs={certificate}") as redis:
                assert await redis.command("ECHO", "a") == b"a"
            stranger = a_redis(url)
            with pytest.raises(ConfigurationError, match="certificate"):
                await stranger.start()
            await stranger.aclose()

    async def test_calls_wait_while_a_connection_is_made(self) -> None:
        async with faking() as fake:
            redis = a_redis(f"redis://127.0.0.1:{fake.port}")
            answers = await asyncio.gather(redis.command("ECHO", 1), redis.command("ECHO", 2))
            assert [*answers] == [b"1", b"2"]
            assert fake.connections == 1
            await redis.aclose()

    async def test_nobody_there(self) -> None:
        async with faking() as fake:
            port = fake.port
        ups: list[bool] = []
        redis = a_redis(f"redis://127.0.0.1:{port}", threshold=2, on_up=ups.append)
        with pytest.raises(ConfigurationError):
            await redis.start()
        answers = await asyncio.gather(
            redis.command("ECHO", 1), redis.command("ECHO", 2), return_exceptions=True
        )
        assert [type(each) for each in answers] == [Unavailable, Unavailable]
        assert state(redis) is BreakerState.OPEN
        with pytest.raises(Unavailable) as caught:
            redis.command("ECHO", 3)
        assert caught.value.retry_after == 1
        assert not any(ups)
        await redis.aclose()

    @pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+1\r\n+2\r\n"])
    async def test_what_is_no_answer_ends_the_connection(self, garbage: bytes) -> None:
        spoiled = False

        def answer(command: list[bytes]) -> bytes | None:
            nonlocal spoiled
            if command[0] in _HANDSHAKE or spoiled:
                return echo(command)
            spoiled = True
            return garbage

        reconnects: list[None] = []
        async with (
            faking(answer) as fake,
            connected(
                f"redis://127.0.0.1:{fake.port}", on_reconnect=lambda: reconnects.append(None)
            ) as redis,
        ):
            outcomes: list[object] = [
                *await asyncio.gather(redis.command("ECHO", 1), return_exceptions=True)
            ]
            assert isinstance(outcomes[0], Unavailable) or outcomes == [b"1"]
            assert await redis.command("ECHO", 2) == b"2"
            assert (fake.connections, len(reconnects)) == (2, 1)


class TestErrors:
    async def test_noscript_is_repeated_once_in_its_order(self) -> None:
        refused: set[bytes] = set()

        def answer(command: list[bytes]) -> bytes | None:
            if command[0] == b"EVALSHA" and command[-1] not in refused:
                refused.add(command[-1])
                return b"-NOSCRIPT No matching script\r\n"
            return echo(command)

        async with faking(answer) as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            calls = [redis.run(SCRIPT, (), (n,)) for n in range(3)]
            assert await asyncio.gather(*calls) == [b"0", b"1", b"2"]
            repeated = [command for chunk in fake.chunks[1:] for command in chunk]
            assert [command[-1] for command in repeated if command[0] == b"EVALSHA"] == [
                b"0",
                b"1",
                b"2",
            ]

    async def test_noscript_again_is_an_error(self) -> None:
        def answer(command: list[bytes]) -> bytes | None:
            return b"-NOSCRIPT gone\r\n" if command[0] == b"EVALSHA" else echo(command)

        async with faking(answer) as fake, connected(f"redis://127.0.0.1:{fake.port}") as redis:
            with pytest.raises(Unavailable):
                await redis.run(SCRIPT, (), ())
            assert len(fake.chunks) == 2

    async def test_an_error_about_one_call_is_no_failure_of_redis(self) -> None:
        def answer(command: list[bytes]) -> bytes | None:
            return b"-WRONGTYPE not that\r\n" if command[0] == b"EVALSHA" else echo(command)

        async with (
            faking(answer) as fake,
            connected(f"redis://127.0.0.1:{fake.port}", threshold=1) as redis,
        ):
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await redis.run(SCRIPT, (), ())
            assert state(redis) is BreakerState.CLOSED

    async def test_failures_in_a_row_open_the_breaker_and_an_answer_between_does_not(self) -> None:
        def answer(command: list[bytes]) -> bytes | None:
            if command[0] == b"SET":
                return b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
            return echo(command)

        async with (
            faking(answer) as fake,
            connected(f"redis://127.0.0.1:{fake.port}", threshold=3) as redis,
        ):
            mixed = [redis.command(name, 1) for name in ["SET", "SET", "ECHO"] * 3]
            await asyncio.gather(*mixed, return_exceptions=True)
            assert state(redis) is BreakerState.CLOSED
            await asyncio.gather(
                *[redis.command("SET", 1) for _ in range(3)], return_exceptions=True
            )
            assert state(redis) is BreakerState.OPEN

    async def test_who_else_has_work_is_let_in_while_thousands_are_told(self) -> None:
        """Of a Redis that hung: a few callers in each turn of the event loop, in order."""
        told: list[int] = []

        def answer(command: list[bytes]) -> bytes | None:
            if command[0] == b"CUT":
                fake.writers[-1].transport.abort()
            return None if command[0] in _HANDSHAKE else b""

        async with (
            faking(answer) as fake,
            connected(f"redis://127.0.0.1:{fake.port}") as redis,
        ):
            calls = [redis.command("ECHO", n) for n in range(3 * REJECTED_PER_TURN - 1)]
            calls.append(redis.command("CUT"))
            for number, call in enumerate(calls):
                call.add_done_callback(lambda _, number=number: told.append(number))  # type: ignore[misc]  # bound now
            counts = []
            while len(told) < len(calls):
                counts.append(len(told))
                await asyncio.sleep(0)
            assert told == list(range(len(calls)))
            assert {REJECTED_PER_TURN, 2 * REJECTED_PER_TURN} <= set(counts)
            for call in calls:
                with pytest.raises(Unavailable):
                    await call

    async def test_a_lost_connection_is_one_failure_for_all_who_were_on_it(self) -> None:
        def answer(command: list[bytes]) -> bytes | None:
            if command[0] in _HANDSHAKE:
                return None
            if command[0] == b"CUT":
                fake.writers[-1].transport.abort()
                return b""
            return b"+OK\r\n"

        async with (
            faking(answer) as fake,
            connected(f"redis://127.0.0.1:{fake.port}", threshold=2) as redis,
        ):
            calls = [redis.command("CUT") for _ in range(5)]
            outcomes: Sequence[object] = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(each) for each in outcomes} == {Unavailable}
            assert state(redis) is BreakerState.CLOSED
            assert await redis.command("GET", "x") == b"OK"

    async def test_while_it_does_not_read_calls_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("notifyd.redis_client.MAX_UNSENT_BYTES", 1000)
        stuck = asyncio.Event()

        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"PING\r\n")
            writer.write(b"+OK\r\n+PONG\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is one that reads
            await stuck.wait()
            writer.close()

        server = await asyncio.start_server(never, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        redis = a_redis(f"redis://127.0.0.1:{port}", timeout=0.5)
        await redis.start()
        sent: list[asyncio.Future[Any]] = []

        async def flood() -> None:
            while True:
                sent.append(redis.command("SET", b"x" * 1_000_000))
                await asyncio.sleep(0)

        with pytest.raises(Unavailable, match="keep up"):
            await flood()
        outcomes: Sequence[object] = await asyncio.gather(*sent, return_exceptions=True)
        assert {type(each) for each in outcomes} == {Unavailable}
        await redis.aclose()
        stuck.set()
        server.close()
        await server.wait_closed()

    async def test_what_was_given_up_does_not_arrive_later(self) -> None:
        read_on = asyncio.Event()
        ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

        async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"PING\r\n")
            writer.write(b"+OK\r\n+PONG\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is one that reads
            await read_on.wait()
            writer.transport.resume_reading()  # type: ignore[attr-defined]  # see above
            try:
                while await reader.read(1 << 20):
                    pass
            except ConnectionResetError as error:
                ended.set_result(error)
            else:
                ended.set_result(None)
            finally:
                writer.close()

        server = await asyncio.start_server(late, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        # More than the other side's system takes in, so that ours has some of it left.
        redis = a_redis(f"redis://127.0.0.1:{port}", timeout=0.05, threshold=1)
        await redis.start()
        with pytest.raises(Unavailable):
            await redis.command("SET", b"x" * 32_000_000)
        read_on.set()
        assert isinstance(await ended, ConnectionResetError)
        await redis.aclose()
        server.close()
        await server.wait_closed()

    @pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has none")
    async def test_the_system_gives_up_when_we_do(self) -> None:
        async with (
            faking() as fake,
            connected(f"redis://127.0.0.1:{fake.port}", timeout=1.5) as redis,
        ):
            assert redis._link is not None
            carrier = redis._link.transport.get_extra_info("socket")
            assert carrier.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
