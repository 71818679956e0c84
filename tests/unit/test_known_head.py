"""A head that came before is known again, and nothing else is taken for it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notifyd.api.guard import Endpoint
from notifyd.app import Notifyd, sockets_of
from notifyd.server.http import MAX_NEW_HEADS, HttpProtocol
from notifyd.server.known_head import KnownHead
from notifyd.server.serve import make_server
from tests.front_door import ADMIN_KEY, settings_of, until

PATH = "/api/v1/notifications/send"
BODY = b'{"target_user_id": "u", "event_type": "e", "payload": 1}'
OTHER_BODY = b'{"target_user_id": "other", "event_type": "e", "payload": {"long": "er"}}'


def post(
    body: bytes, *headers: str, length: str | None = None, name: str = "Content-Length"
) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: h", f"X-API-Key: {ADMIN_KEY}"]
    lines += [f"{name}: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class FakeEndpoint:
    max_body = 100


ENDPOINT = cast(Endpoint, FakeEndpoint())
HEADERS = [(b"host", b"h"), (b"x-api-key", ADMIN_KEY.encode()), (b"content-length", b"56")]


def known(data: bytes) -> KnownHead | None:
    return KnownHead.of(data, HEADERS, ENDPOINT, forwarded=False)


class TestKnownHead:
    def test_it_finds_the_body_whatever_its_length(self) -> None:
        head = known(post(BODY))
        assert head is not None
        for body in (BODY, OTHER_BODY, b"", b"x" * 100):
            assert head.body_of(post(body)) == body
            assert (b"content-length", b"%d" % len(body)) in head.headers_of(body)
            assert head.headers_of(body)[:2] == HEADERS[:2]

    @pytest.mark.parametrize(
        "other",
        [
            post(BODY, "X-More: 1"),
            post(BODY).replace(b"Host: h", b"Host: g"),
            post(BODY).replace(b"POST", b"PUT"),
            post(BODY, name="content-length"),
            post(BODY, length="+56"),
            post(BODY, length="5_6"),
            post(BODY, length=" 56"),
            post(BODY, length="56 "),
            post(BODY, length="0x38"),
            post(BODY, length="\u0665\u0666"),
            post(BODY, length=""),
            post(BODY, length="000000056"),
            post(BODY, length="55"),
            post(BODY, length="57"),
            post(BODY) + post(BODY),
            post(b"x" * 101),
            post(BODY)[:-1],
            post(BODY)[: len(post(BODY)) - len(BODY) - 3],
            post(BODY)[:20],
            b"",
        ],
    )
    def test_it_is_not_taken_for_another(self, other: bytes) -> None:
        head = known(post(BODY))
        assert head is not None
        assert head.body_of(other) is None

    @pytest.mark.parametrize(
        "data",
        [
            post(BODY) + b"P",
            post(BODY) + post(BODY),
            post(BODY)[:-1],
            post(BODY).replace(b"Content-Length", b"Content-Size"),
            post(BODY).replace(b"\r\n", b"\n"),
        ],
    )
    def test_what_is_not_one_whole_request_is_not_learned(self, data: bytes) -> None:
        assert known(data) is None


class Transport:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.protocol: Any = None

    def get_extra_info(self, name: str, default: object = None) -> object:
        addresses = {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 9999)}
        return addresses.get(name, default)

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_write_buffer_limits(self, **_: int) -> None:
        pass


@asynccontextmanager
async def sockets() -> AsyncIterator[Callable[[], Transport]]:
    """A server without sockets; what is called makes one of its clients."""
    notifyd = Notifyd(settings_of())
    await notifyd.start()
    server = make_server(sockets_of(notifyd), notifyd.settings.server, announce=lambda: None)
    server.config.load()
    loop = asyncio.get_running_loop()

    def connect() -> Transport:
        transport = Transport()
        transport.protocol = server.make_protocol(server.config, server.server_state, {}, loop)
        transport.protocol.connection_made(transport)
        return transport

    try:
        yield connect
    finally:
        if server.door is not None:
            server.door.stop()
        await notifyd.stop()


REQUESTS = [
    post(BODY),
    post(BODY),
    post(OTHER_BODY),
    post(b"{}"),
    post(b""),
    post(BODY, "X-More: 1"),
    post(BODY, name="content-length"),
    b"tail" + post(BODY),
    post(BODY, length="+56"),
    post(BODY, "Content-Length: 56"),
    post(BODY, "Transfer-Encoding: chunked"),
    b"\r\n" + post(BODY),
]


async def answers(connect: Callable[[], Transport], chunks: Sequence[bytes]) -> tuple[bytes, bool]:
    """What is answered, without what no two answers share, and whether that was the end."""
    transport = connect()
    for chunk in chunks:
        if not transport.closed:
            transport.protocol.data_received(chunk)
            await asyncio.sleep(0)
    text = re.sub(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", b"ID", transport.written)
    text = re.sub(rb"\d{4}-\d\d-\d\dT[0-9:.]+Z|content-length: \d+|date: [^\r]+", b"", text)
    return text, transport.closed


@given(
    requests=st.lists(st.sampled_from(REQUESTS), min_size=2, max_size=8),
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
    whole=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chunks_change_nothing(requests: list[bytes], cuts: list[int], whole: bool) -> None:
    """`whole`: chunks end where requests do, too."""
    data = b"".join(requests)
    places = {cut % (len(data) + 1) for cut in cuts}
    if whole:
        places |= {len(b"".join(requests[:count])) for count in range(len(requests))}
    edges = [0, *sorted(places), len(data)]
    chunks = [data[start:end] for start, end in pairwise(edges) if start < end]

    async def both() -> None:
        async with sockets() as connect:
            in_chunks = await answers(connect, chunks)
            bytewise = await answers(connect, [data[n : n + 1] for n in range(len(data))])
            assert in_chunks == bytewise

    asyncio.run(both())


async def test_what_follows_a_body_s_end_in_its_chunk_is_not_known_with_it() -> None:
    async with sockets() as connect:
        transport = connect()
        first = post(BODY)
        for chunk in (post(BODY), first[:-5], first[-5:] + post(BODY), first[-5:] + post(BODY)):
            transport.protocol.data_received(chunk)
        assert transport.written.count(b"HTTP/1.1 200") == 3
        assert transport.written.count(b"HTTP/1.1 400") == 1
        assert transport.closed


async def test_who_sends_another_head_each_time_is_not_looked_at_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = []
    of = KnownHead.of

    def counted(*args: Any, **kwargs: Any) -> KnownHead | None:
        learned.append(args)
        return of(*args, **kwargs)

    monkeypatch.setattr(KnownHead, "of", counted)
    async with sockets() as connect:
        transport = connect()
        for number in range(20):
            transport.protocol.data_received(post(BODY, f"X-Trace: {number}"))
        assert len(learned) == MAX_NEW_HEADS
        protocol = transport.protocol
        assert isinstance(protocol, HttpProtocol)
        assert protocol._known is None
        assert transport.written.count(b"HTTP/1.1 200") == 20


async def test_a_body_that_looks_like_a_known_request_is_a_body() -> None:
    async with sockets() as connect:
        transport = connect()
        inner = post(BODY)
        outer = post(inner)
        for chunk in (inner, inner, outer[: -len(inner)], inner):
            transport.protocol.data_received(chunk)
        assert transport.written.count(b"HTTP/1.1 200") == 2
        assert transport.written.count(b"HTTP/1.1 400") == 1
        transport.protocol.data_received(inner)
        assert transport.written.count(b"HTTP/1.1 200") == 3


async def test_a_known_request_waits_while_its_client_does_not_read() -> None:
    async with sockets() as connect:
        transport = connect()
        for _ in range(2):
            transport.protocol.data_received(post(BODY))
        before = transport.written
        transport.protocol.pause_writing()
        transport.protocol.data_received(post(BODY))
        for _ in range(10):
            await asyncio.sleep(0)
        assert transport.written == before
        transport.protocol.resume_writing()
        await until(lambda: transport.written.count(b"HTTP/1.1 200") == 3)
