"""Random bytes and random segments on a WebSocket.

A valid stream gives the same answers however it is cut; whatever else comes, the socket is closed
with a code that says so, and the server serves the others.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adversity.hosting import Hosted, hosted
from tests.adversity.raw import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    RawClient,
    connected,
    frame,
    handshake,
    text,
)
from tests.front_door import token

LIMITED = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def target() -> Iterator[Hosted]:
    """A server that this module alone throws things at."""
    with hosted("sockets") as server:
        yield server
        assert server.failures == []


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Frames of a client that keeps to the protocol, and what must come back, by kind."""
    data = b""
    expected: list[tuple[int, bytes]] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["text", "fragments", "ping", "pong", "binary", "error"]))
        if kind == "ping":
            payload = draw(st.binary(max_size=125))
            data += frame(PING, payload)
            expected.append((PONG, payload))
        elif kind == "pong":
            data += frame(PONG, draw(st.binary(max_size=125)))
        elif kind == "binary":
            data += frame(BINARY, draw(st.binary(max_size=300)))
            expected.append((TEXT, b"UNSUPPORTED_FORMAT"))
        elif kind == "error":
            data += text(draw(st.text(max_size=100)) + "]")
            expected.append((TEXT, b"INVALID_MESSAGE"))
        else:
            message = json.dumps(
                {"type": "Ping", "x": draw(st.text(max_size=draw(st.sampled_from([5, 500]))))},
                ensure_ascii=False,
            ).encode("utf-8", "replace")
            expected.append((TEXT, b'"pong"'))
            if kind == "text":
                data += frame(TEXT, message, wide=draw(st.booleans()) and len(message) > 125)
                continue
            cuts = sorted(draw(st.lists(st.integers(0, len(message)), max_size=4)))
            pieces = [
                message[start:stop]
                for start, stop in zip([0, *cuts], [*cuts, len(message)], strict=True)
            ]
            for index, piece in enumerate(pieces):
                data += frame(
                    TEXT if index == 0 else CONTINUATION, piece, fin=index == len(pieces) - 1
                )
                if index < len(pieces) - 1 and draw(st.booleans()):
                    data += frame(PING, b"between")
                    # Control frames are answered at once, the message when it is whole.
                    expected.insert(len(expected) - 1, (PONG, b"between"))
    return data, expected


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in the segments that these positions make."""
    positions = sorted({position % (len(data) + 1) for position in cuts})
    return [
        data[start:stop]
        for start, stop in zip([0, *positions], [*positions, len(data)], strict=True)
        if stop > start
    ]


async def answers(port: int, segments: list[bytes], early: bytes) -> list[tuple[int, bytes]]:
    """What the server sends back until it answers the Close, but the greeting."""
    async with connected(port) as client:
        await client.send(handshake(f"/ws?token={token('fuzz')}"), early)
        assert (await client.response()).status == 101
        await client.message("connected")
        for segment in segments:
            await client.send(segment)
            await asyncio.sleep(0.0003)
        await client.send(frame(CLOSE, b"\x03\xe8"))
        told: list[tuple[int, bytes]] = []
        while (received := await client.frame()).opcode != CLOSE:
            told.append((received.opcode, received.payload))
        assert received.close_code == 1000
        return told


@LIMITED
@given(stream=streams(), cuts=st.lists(st.integers(0, 1 << 16), max_size=40), early=st.booleans())
async def test_a_valid_stream_is_read_the_same_however_it_is_cut(
    target: Hosted, stream: tuple[bytes, list[tuple[int, bytes]]], cuts: list[int], early: bool
) -> None:
    data, expected = stream
    segments = cut(data, cuts)
    first = segments.pop(0) if early else b""
    told = await answers(target.port, segments, first)
    # A Pong may come before or behind the answer to a message of the same segment.
    for kind in (PONG, TEXT):
        received = [payload for opcode, payload in told if opcode == kind]
        wanted = [payload for opcode, payload in expected if opcode == kind]
        assert len(received) == len(wanted)
        if kind == PONG:
            assert received == wanted
        else:
            assert all(want in got for want, got in zip(wanted, received, strict=True))


async def _until_closed(client: RawClient) -> Frame | None:
    try:
        while (received := await client.frame()).opcode != CLOSE:
            pass
    except asyncio.IncompleteReadError:
        return None
    return received


@LIMITED
@given(
    garbage=st.one_of(
        st.binary(min_size=1, max_size=400),
        st.lists(
            st.builds(
                frame,
                st.integers(0, 15),
                st.binary(max_size=140),
                fin=st.booleans(),
                rsv=st.sampled_from([0, 0, 0, 1, 4]),
                masked=st.sampled_from([True, True, True, False]),
            ),
            min_size=1,
            max_size=8,
        ).map(b"".join),
    ),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
async def test_garbage_closes_with_a_code_that_says_so(
    target: Hosted, garbage: bytes, cuts: list[int]
) -> None:
    async with connected(target.port) as client:
        await client.send(handshake(f"/ws?token={token('fuzz')}"))
        assert (await client.response()).status == 101
        for segment in cut(garbage, cuts):
            await client.send(segment)
        # Whatever that was: what follows ends it at the latest.
        await client.send(b"\xff" * 100_000)
        closed = await _until_closed(client)
        assert closed is not None
        # … unless the garbage was a Close, which is answered with its own code.
        assert closed.close_code in {1002, 1007, 1009} or CLOSE in {byte & 15 for byte in garbage}
    await target.serves()


@LIMITED
@given(garbage=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
async def test_garbage_instead_of_a_request_is_refused(
    target: Hosted, garbage: bytes, cuts: list[int]
) -> None:
    async with connected(target.port) as client:
        for segment in cut(garbage, cuts):
            await client.send(segment)
        await client.send(b"\x00" * 1000)
        told = await client.rest()
        assert told.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or told == b""


async def test_ten_thousand_random_frames_at_once(target: Hosted) -> None:
    async with target.websocket("fuzz") as client:
        rubbish = b"".join(frame(TEXT, os.urandom(3).hex().encode() + b"]") for _ in range(10_000))
        writing = asyncio.create_task(client.send(rubbish))
        for _ in range(10_000):
            assert (await client.message())["code"] == "INVALID_MESSAGE"
        await writing
    await target.serves()
