"""notifyd.redis_subscriber with a Redis by hand; real ones stand in tests/adversity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
from structlog.testing import capture_logs

from notifyd import redis_subscriber
from notifyd.options import BreakerSettings
from notifyd.redis_client import Redis
from notifyd.redis_subscriber import RedisSubscriber
from notifyd.resilience import Backoff, CircuitBreaker
from tests.front_door import until


def packed(*words: Any) -> bytes:
    data: bytes = hiredis.pack_command(words)
    return data


def message(pattern: str, channel: str, data: bytes) -> bytes:
    return packed("pmessage", pattern, channel, data)


class HandRedis:
    """Takes subscriptions and answers them, and publishes what a test says. `deaf`: what is
    published comes to nobody."""

    def __init__(self) -> None:
        self.port = 0
        self.subscribed: list[list[bytes]] = []
        self.subscribers: list[asyncio.StreamWriter] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.probes = 0
        self.deaf = False
        self.refusal = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        parser = hiredis.Reader()
        try:
            while data := await reader.read(65536):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    self.answer(command, writer)
        except ConnectionError:
            pass  # the client's part of the test
        finally:
            writer.close()

    def answer(self, command: list[bytes], writer: asyncio.StreamWriter) -> None:
        name = command[0].upper()
        if name in {b"SUBSCRIBE", b"PSUBSCRIBE"}:
            self.subscribed.append(command)
            if self.refusal:
                writer.write(self.refusal)
                return
            if name == b"SUBSCRIBE":
                self.subscribers.append(writer)
            for channel in command[1:]:
                writer.write(packed(name.lower(), channel, 1))
        elif name == b"PUBLISH":
            self.probes += 1
            writer.write(b":1\r\n")
            if not self.deaf:
                for each in self.subscribers:
                    each.write(packed("message", command[1], command[2]))
        else:
            writer.write(b"+OK\r\n")

    def publish(self, data: bytes) -> None:
        self.subscribers[-1].write(data)


@asynccontextmanager
async def by_hand() -> AsyncIterator[HandRedis]:
    hand = HandRedis()
    server = await asyncio.start_server(hand.serve, "127.0.0.1", 0)
    hand.port = server.sockets[0].getsockname()[1]
    try:
        yield hand
    finally:
        server.close()
        for writer in hand.writers:
            writer.close()
        await server.wait_closed()


class Received:
    """What a subscriber handed on; `most` at a time."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.most = 1 << 30
        self.lost: list[str] = []

    def receive(self, pattern: bytes, channel: bytes, data: bytes) -> bool:
        self.data.append(data)
        return len(self.data) % self.most != 0


@asynccontextmanager
async def subscribing(
    hand: HandRedis, received: Received, wait: bool = True, **given: Any
) -> AsyncIterator[RedisSubscriber]:
    redis = Redis(f"redis://127.0.0.1:{hand.port}", CircuitBreaker(BreakerSettings()))
    await redis.start()
    given = {"patterns": ("p:*",), "backoff": Backoff(0.001, 0.01), **given}
    subscriber = RedisSubscriber(
        redis, received.receive, probe_prefix="probe", on_lost=received.lost.append, **given
    )
    running = asyncio.ensure_future(subscriber.run())
    try:
        if wait:
            await until(lambda: subscriber.up)
        yield subscriber
    finally:
        running.cancel()
        await asyncio.wait([running])
        await redis.aclose()
    assert not subscriber.up


async def test_messages_come_in_order_whole_or_in_pieces() -> None:
    received = Received()
    async with by_hand() as hand, subscribing(hand, received, channels=("c",)):
        assert hand.subscribed[0][2:] == [b"c"]
        assert hand.subscribed[1] == [b"PSUBSCRIBE", b"p:*"]
        whole = b"".join(message("p:*", "p:1", b"%d" % n) for n in range(1000))
        hand.publish(whole)
        await until(lambda: len(received.data) == 1000)
        for at in range(60):
            hand.publish(message("p:*", "p:1", b"piece")[:at])
            await asyncio.sleep(0)
            hand.publish(message("p:*", "p:1", b"piece")[at:])
        hand.publish(packed("message", "c", "last"))
        await until(lambda: received.data[-1] == b"last")
        assert received.data == [b"%d" % n for n in range(1000)] + [b"piece"] * 60 + [b"last"]


async def test_nothing_comes_until_it_is_resumed() -> None:
    received = Received()
    received.most = 10
    async with by_hand() as hand, subscribing(hand, received, silence=0.01) as subscriber:
        hand.publish(b"".join(message("p:*", "p:1", b"x" * 1000) for _ in range(5000)))
        await until(lambda: len(received.data) == 10)
        await asyncio.sleep(0.05)
        # Redis was not read to the end either: what is not wanted stays there.
        assert len(received.data) == 10
        for turn in range(2, 501):
            subscriber.resume()
            await until(lambda turn=turn: len(received.data) == 10 * turn)  # type: ignore[misc]
        assert received.lost == []


async def test_it_is_probed_when_it_is_silent_and_made_anew_when_it_is_deaf() -> None:
    received = Received()
    async with (
        by_hand() as hand,
        subscribing(hand, received, silence=0.02, probe_timeout=0.05) as subscriber,
    ):
        await until(lambda: hand.probes >= 3)
        assert len(hand.subscribers) == 1
        assert received.data == []
        hand.deaf = True
        await until(lambda: len(hand.subscribers) == 2)
        assert received.lost == ["its own message did not come back"]
        hand.deaf = False
        await until(lambda: subscriber.up)
        hand.publish(message("p:*", "p:1", b"heard"))
        await until(lambda: received.data == [b"heard"])


@pytest.mark.parametrize(
    ("junk", "reason"),
    [
        (b"what?\r\n", "not an answer of Redis"),
        (b"*1\r\n$8\r\npmessage\r\n", "not an answer of Redis"),
        (b"*0\r\n", "not an answer of Redis"),
        (b"-ERR no more\r\n", "ERR no more"),
        (b"$9000000\r\n" + b"x" * 8_500_000, "longer than any may be"),
    ],
)
async def test_what_is_no_message_ends_the_connection(junk: bytes, reason: str) -> None:
    received = Received()
    async with by_hand() as hand, subscribing(hand, received):
        hand.publish(junk)
        await until(lambda: len(hand.subscribers) == 2)
        assert reason in received.lost[0]
        await until(lambda: len(hand.subscribed) == 4)
        hand.publish(message("p:*", "p:1", b"heard"))
        await until(lambda: received.data == [b"heard"])


async def test_a_refusal_is_told_and_tried_again() -> None:
    received = Received()
    async with by_hand() as hand:
        hand.refusal = b"-NOPERM this user has no permissions\r\n"
        with capture_logs() as logs:
            async with subscribing(hand, received, wait=False) as subscriber:
                await until(lambda: len(hand.subscribed) >= 2)
                hand.refusal = b""
                await until(lambda: subscriber.up)
        assert received.lost[0].startswith("NOPERM")
        assert len(logs) >= 1


async def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    received = Received()
    answer: Callable[..., None] = HandRedis.answer
    async with by_hand() as hand:
        with monkeypatch.context() as patched:
            patched.setattr(
                hand,
                "answer",
                lambda command, writer: (
                    None if b"SUBSCRIBE" in command[0] else answer(hand, command, writer)
                ),
            )
            async with subscribing(hand, received, wait=False, connect_timeout=0.05) as subscriber:
                await until(lambda: bool(received.lost))
                patched.undo()
                await until(lambda: subscriber.up)


def test_a_message_may_be_as_long_as_http_allows_one() -> None:
    assert redis_subscriber.MAX_MESSAGE_BYTES > 2 * 4_194_304 - 1
