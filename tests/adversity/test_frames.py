"""WebSocket frames that RFC 6455 forbids, or that come in odd pieces, on our own sockets."""

from __future__ import annotations

import asyncio
import json
import os
import time

import pytest

from tests.adversity.hosting import Hosted
from tests.adversity.raw import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    RawClient,
    frame,
    handshake,
    text,
)
from tests.front_door import ORIGIN, token

PING_MESSAGE = b'{"type":"Ping"}'
MAX = 65_536


async def failed(client: RawClient, code: int) -> None:
    """Assert the close code, and that the server ends the connection by itself."""
    assert await client.close_code() == code
    if code == 1007:
        # The frame was right, its message is not: the closing handshake is kept.
        await client.send(frame(CLOSE, code.to_bytes(2, "big")))
    assert await client.rest() == b""


BROKEN = [
    pytest.param(frame(TEXT, PING_MESSAGE, masked=False), 1002, id="unmasked"),
    pytest.param(frame(PING, masked=False), 1002, id="unmasked Ping"),
    pytest.param(frame(CLOSE, b"\x03\xe8", masked=False), 1002, id="unmasked Close"),
    *[
        pytest.param(frame(TEXT, PING_MESSAGE, rsv=bits), 1002, id=f"reserved bits {bits}")
        for bits in range(1, 8)
    ],
    *[
        pytest.param(frame(opcode, b"x"), 1002, id=f"opcode {opcode}")
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    ],
    pytest.param(frame(CONTINUATION, PING_MESSAGE), 1002, id="continuation of nothing"),
    pytest.param(
        frame(TEXT, b"{", fin=False) + frame(TEXT, PING_MESSAGE), 1002, id="text within text"
    ),
    pytest.param(
        frame(BINARY, b"{", fin=False) + frame(TEXT, PING_MESSAGE), 1002, id="text within binary"
    ),
    pytest.param(frame(PING, b"x" * 126), 1002, id="Ping of 126 bytes"),
    pytest.param(frame(PONG, b"x" * 126), 1002, id="Pong of 126 bytes"),
    pytest.param(frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002, id="Close of 126 bytes"),
    pytest.param(frame(PING, b"x" * 126, wide=True), 1002, id="Ping with a wide length"),
    pytest.param(frame(PING, b"x", fin=False), 1002, id="fragmented Ping"),
    pytest.param(frame(CLOSE, b"\x03\xe8", fin=False), 1002, id="fragmented Close"),
    pytest.param(frame(CLOSE, b"\x03"), 1002, id="Close of one byte"),
    *[
        pytest.param(frame(CLOSE, code.to_bytes(2, "big")), 1002, id=f"close code {code}")
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)
    ],
    pytest.param(frame(CLOSE, b"\x03\xe8\xff\xfe"), 1007, id="close reason not UTF-8"),
    pytest.param(text(b"\xff"), 1007, id="not UTF-8"),
    pytest.param(text(b'{"type":"Ping","x":"\xed\xa0\x80"}'), 1007, id="a surrogate as UTF-8"),
    pytest.param(text(b"\xc0\x80"), 1007, id="overlong NUL"),
    pytest.param(text(b"\xf4\x90\x80\x80"), 1007, id="beyond U+10FFFF"),
    pytest.param(text(b'{"type":"Ping"}\xc3'), 1007, id="UTF-8 without its end"),
    pytest.param(
        frame(TEXT, b'{"x":"\xce', fin=False) + frame(CONTINUATION, b'\xff"}'),
        1007,
        id="not UTF-8 across fragments",
    ),
    pytest.param(text(b"x" * (MAX + 1)), 1009, id="64 KiB + 1"),
    pytest.param(frame(BINARY, b"x" * (MAX + 1)), 1009, id="64 KiB + 1 in binary"),
    pytest.param(
        frame(TEXT, b"x" * MAX, fin=False) + frame(CONTINUATION, b"x"),
        1009,
        id="64 KiB + 1 in fragments",
    ),
    pytest.param(frame(TEXT, length=1 << 40), 1009, id="a terabyte is told"),
    pytest.param(frame(TEXT, length=(1 << 63) - 1), 1009, id="2^63 - 1 is told"),
]


@pytest.mark.parametrize(("data", "code"), BROKEN)
async def test_what_breaks_the_protocol_closes_as_the_rfc_says(
    sockets: Hosted, data: bytes, code: int
) -> None:
    async with sockets.websocket() as client:
        await client.pings()
        await client.send(data)
        if code == 1007 and data[0] & 0x0F == CLOSE:
            # RFC 6455, section 7.1.6: the reason is no UTF-8; 1002 is as good.
            assert await client.close_code() in (1002, 1007)
            return
        await failed(client, code)


@pytest.mark.parametrize(("data", "code"), BROKEN[:3] + BROKEN[-6:])
async def test_the_same_in_single_bytes_and_behind_good_messages(
    sockets: Hosted, data: bytes, code: int
) -> None:
    async with sockets.websocket() as client:
        await client.send(text(PING_MESSAGE) * 3)
        for byte in data[:32]:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await client.send(data[32:])
        for _ in range(3):
            await client.message("pong")
        await failed(client, code)


async def test_a_length_with_its_highest_bit_set(sockets: Hosted) -> None:
    async with sockets.websocket() as client:
        await client.send(b"\x81\xff" + b"\xff" * 8 + b"mask")
        assert await client.close_code() in (1002, 1009)


async def test_what_follows_a_failure_is_not_read(sockets: Hosted) -> None:
    async with sockets.websocket() as client:
        subscribe = text('{"type":"Subscribe","payload":{"channels":["late"]}}')
        await client.send(frame(TEXT, b"x", rsv=1), subscribe * 100)
        assert await client.close_code() == 1002
        assert await client.rest() == b""
    answer = await sockets.call("GET", "/api/v1/channels/late")
    assert answer.status == 404


async def test_64_kib_are_read(sockets: Hosted) -> None:
    message = json.dumps({"type": "Ping", "x": "y" * (MAX - 30)})
    whole = message.encode().ljust(MAX)
    async with sockets.websocket() as client:
        await client.send(text(whole))
        await client.message("pong")
        await client.send(frame(TEXT, whole[:1000], fin=False), frame(CONTINUATION, whole[1000:]))
        await client.message("pong")


async def test_fragments_with_control_frames_in_between(sockets: Hosted) -> None:
    async with sockets.websocket() as client:
        await client.send(
            frame(TEXT, b'{"ty', fin=False),
            frame(PING, b"between"),
            frame(CONTINUATION, b'pe":"P', fin=False),
            frame(PONG, b"unasked"),
            frame(CONTINUATION, b"", fin=False),
            frame(CONTINUATION, b'ing"}'),
        )
        told = [await client.frame(), await client.frame()]
        assert Frame(PONG, b"between") in told
        assert Frame(TEXT, b'{"type":"pong"}') in told
        # … and read one by one: each Ping is answered before more is sent.
        for piece, ping in (
            (frame(TEXT, b"", fin=False), b""),
            (frame(CONTINUATION, PING_MESSAGE[:3], fin=False), b"x" * 125),
            (frame(CONTINUATION, b"", fin=False), b"y"),
        ):
            await client.send(piece, frame(PING, ping))
            assert await client.frame() == Frame(PONG, ping)
        await client.send(frame(CONTINUATION, PING_MESSAGE[3:]))
        assert (await client.message())["type"] == "pong"
        await client.pings()


async def test_a_character_split_across_fragments(sockets: Hosted) -> None:
    message = '{"type":"Ping","x":"äöü€😀"}'.encode()
    async with sockets.websocket() as client:
        for at in range(len(message)):
            await client.send(
                frame(TEXT, message[:at], fin=False), frame(CONTINUATION, message[at:])
            )
            await client.message("pong")


async def test_lengths_wider_than_they_must_be(sockets: Hosted) -> None:
    """RFC 6455, section 5.2, wants the shortest; reading the others does no harm."""
    async with sockets.websocket() as client:
        await client.send(frame(TEXT, PING_MESSAGE, wide=True))
        answer = await client.frame()
        assert answer.opcode == TEXT or answer.close_code == 1002


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 3000, 4999])
async def test_a_close_is_answered_with_its_code(sockets: Hosted, code: int) -> None:
    async with sockets.websocket() as client:
        await client.send(frame(CLOSE, code.to_bytes(2, "big") + "bye ü".encode()))
        assert await client.close_code() == code
        assert await client.rest() == b""


async def test_a_close_without_a_code(sockets: Hosted) -> None:
    async with sockets.websocket() as client:
        await client.send(frame(CLOSE))
        assert await client.close_code() in (1000, 1005)
        assert await client.rest() == b""


async def test_what_comes_behind_a_close_is_ignored(sockets: Hosted) -> None:
    async with sockets.websocket() as client:
        await client.send(frame(CLOSE, b"\x03\xe8"), text(PING_MESSAGE) * 50, b"garbage")
        assert await client.close_code() == 1000
        assert await client.rest() == b""


# --- behind the handshake ---


async def test_frames_in_the_segment_of_the_handshake(sockets: Hosted) -> None:
    subscribe = text('{"type":"Subscribe","payload":{"channels":["early"]}}')
    async with sockets.websocket(early=subscribe + text(PING_MESSAGE)) as client:
        assert (await client.message("subscribed"))["payload"] == ["early"]
        await client.message("pong")


async def test_half_a_frame_in_the_segment_of_the_handshake(sockets: Hosted) -> None:
    data = text(PING_MESSAGE)
    async with sockets.websocket(early=data[:5]) as client:
        await client.send(data[5:])
        await client.message("pong")


async def test_a_token_as_the_first_message_in_the_segment_of_the_handshake(
    sockets: Hosted,
) -> None:
    auth = {"type": "Auth", "payload": {"token": token("early")}}
    async with sockets.connected() as client:
        await client.send(handshake("/ws"), text(json.dumps(auth)), text(PING_MESSAGE))
        assert (await client.response()).status == 101
        assert (await client.message("connected"))["user_id"] == "early"
        await client.message("pong")


async def test_a_broken_frame_in_the_segment_of_the_handshake(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(handshake(f"/ws?token={token()}"), frame(TEXT, b"x", masked=False))
        assert (await client.response()).status == 101
        assert await client.close_code() == 1002


@pytest.mark.parametrize(
    "headers",
    [
        ["Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="],
        ["Sec-WebSocket-Version: 13"],
        ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: short"],
        ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAAAAAAAA"],
        ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: \xff\xfeAAAAAAAAAAAAAAAAAAAA=="],
        ["Sec-WebSocket-Version: 13"] + ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="] * 2,
    ],
)
async def test_handshakes_that_are_none(sockets: Hosted, headers: list[str]) -> None:
    async with sockets.connected() as client:
        await client.send(
            sockets.request(
                "GET", f"/ws?token={token()}", "Connection: Upgrade", "Upgrade: websocket", *headers
            )
        )
        answer = await client.response()
        assert (answer.status, answer.code) == (400, "BAD_REQUEST")
        assert await client.rest() == b""


async def test_what_a_page_asks_wrongly_is_told_where_it_can_be_read(server: Hosted) -> None:
    """A browser's WebSocket reads no status."""
    wrong = f"/ws?token={token()}&acks=2"
    async with server.connected() as client:
        await client.send(handshake(wrong, f"Origin: {ORIGIN}"))
        assert (await client.response()).status == 101
        told = await client.message("error")
        assert (told["code"], told["message"]) == ("BAD_REQUEST", "acks is 0 or 1.")
        assert await client.close_code() == 1002
    async with server.connected() as client:
        await client.send(handshake(wrong))
        assert (await client.response()).status == 400


async def test_an_upgrade_elsewhere_or_by_post_or_pipelined(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(handshake("/elsewhere"))
        assert (await client.response()).status == 404
        assert await client.rest() == b""
    async with sockets.connected() as client:
        await client.send(handshake(f"/ws?token={token()}").replace(b"GET", b"POST", 1))
        assert (await client.response()).status == 400
    async with sockets.connected() as client:
        await client.send(
            sockets.request("GET", "/health"), handshake(f"/ws?token={token()}"), text(PING_MESSAGE)
        )
        assert b" 101 " not in await client.rest()


# --- time ---


async def closed_in_time(client: RawClient, code: int) -> None:
    began = time.monotonic()
    assert await client.close_code() == code
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(text(PING_MESSAGE)[:-1], id="half a frame"),
        pytest.param(text(PING_MESSAGE)[:1], id="half a head"),
        pytest.param(frame(TEXT, b"{", fin=False), id="half a message"),
        pytest.param(frame(TEXT, b"", fin=False), id="the empty half of a message"),
        pytest.param(frame(TEXT, length=60_000) + b"mask", id="a body that does not come"),
    ],
)
async def test_what_is_begun_and_not_finished_closes_4012(hasty: Hosted, data: bytes) -> None:
    async with hasty.websocket() as client:
        await client.send(data)
        await closed_in_time(client, 4012)
        # Half a frame is no answer to a Close: it is not waited for without end.
        assert await client.rest() == b""


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["empty", "one byte"])
async def test_fragments_without_end_close_4012(hasty: Hosted, piece: bytes) -> None:
    async with hasty.websocket() as client:
        await client.send(frame(TEXT, piece, fin=False))

        async def more() -> None:
            while True:
                await client.send(frame(CONTINUATION, piece, fin=False), frame(PING))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(more())
        try:
            await closed_in_time(client, 4012)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_message_finished_in_time_stops_the_clock(hasty: Hosted) -> None:
    async with hasty.websocket() as client:
        await client.send(frame(TEXT, PING_MESSAGE[:4], fin=False))
        await client.send(frame(CONTINUATION, PING_MESSAGE[4:]))
        await client.message("pong")
        # One that is begun after it is closed in time; here nothing is begun, so nothing ends.
        async with hasty.websocket("slow") as other:
            await other.send(frame(TEXT, PING_MESSAGE[:4], fin=False))
            await closed_in_time(other, 4012)
        await client.pings()


async def test_who_does_not_answer_a_close_is_dropped(hasty: Hosted) -> None:
    async with hasty.websocket("dropped") as client:
        await hasty.call("POST", "/api/v1/users/dropped/disconnect", b"{}")
        await closed_in_time(client, 4003)
        assert await client.rest() == b""


async def test_who_speaks_on_instead_of_answering_a_close_is_dropped(hasty: Hosted) -> None:
    async with hasty.websocket("rambling") as client:

        async def ramble() -> None:
            while True:
                await client.send(text(PING_MESSAGE))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(ramble())
        try:
            await hasty.call("POST", "/api/v1/users/rambling/disconnect", b"{}")
            await closed_in_time(client, 4003)
            assert await client.rest() == b""
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_socket_that_is_reset_in_the_middle(sockets: Hosted) -> None:
    for cut in range(1, 20):
        async with sockets.websocket("reset") as client:
            await client.send((text(os.urandom(4).hex()) * 3)[:cut])
    async with asyncio.timeout(10):
        while (await sockets.call("GET", "/api/v1/users/reset/subscriptions")).status != 404:
            pass
