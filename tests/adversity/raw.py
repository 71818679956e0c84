"""A client made of bytes: what it sends is what a test wrote, what it reads is told as it came."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

PATIENCE = 20.0
"""Seconds after which a test gives up waiting for bytes."""

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 0x1, 0x2, 0x0, 0x8, 0x9, 0xA


@dataclass(frozen=True)
class Response:
    """One HTTP response."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first header of that name, in lower case."""
        return next((value for known, value in self.headers if known == name), None)

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code."""
        return str(self.json["error"]["code"])


@dataclass(frozen=True)
class Frame:
    """One WebSocket frame of the server."""

    opcode: int
    payload: bytes
    fin: bool = True

    @property
    def close_code(self) -> int:
        """What a Close says; 1005 where it says nothing."""
        assert self.opcode == CLOSE, self
        return int.from_bytes(self.payload[:2], "big") if self.payload else 1005


class RawClient:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *data: bytes) -> None:
        """Write, and let the kernel have it."""
        async with asyncio.timeout(PATIENCE):
            self.writer.write(b"".join(data))
            await self.writer.drain()

    # --- HTTP ---

    async def response(self, *, head: bool = False) -> Response:
        """The next response; `head`: it answers a HEAD, and has no body."""
        async with asyncio.timeout(PATIENCE):
            raw = await self.reader.readuntil(b"\r\n\r\n")
            status_line, *lines = raw[:-4].decode("latin-1").split("\r\n")
            headers = tuple(
                (name.strip().lower(), value.strip())
                for name, _, value in (line.partition(":") for line in lines)
            )
            status = int(status_line.split(" ")[1])
            found = dict(headers)
            if head or status in (100, 101, 204):
                body = b""
            elif "content-length" in found:
                body = await self.reader.readexactly(int(found["content-length"]))
            elif found.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            else:
                body = b""
            return Response(status, headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return body

    async def response_head(self) -> Response:
        """The head of a response whose body is a stream."""
        return await self.response(head=True)

    async def rest(self) -> bytes:
        """What still comes until the server ends the connection."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
            return b""

    async def line(self) -> bytes:
        """One line, of an SSE stream."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(b"\n")

    async def event(self, name: str) -> list[bytes]:
        """The lines behind `event: name`, up to the empty one."""
        while await self.line() != b"event: " + name.encode() + b"\n":
            pass
        lines = []
        while (line := await self.line()) != b"\n":
            lines.append(line[:-1])
        return lines

    # --- WebSocket ---

    async def frame(self) -> Frame:
        """The next frame, Pings of heartbeats included."""
        async with asyncio.timeout(PATIENCE):
            first, second = await self.reader.readexactly(2)
            assert not second & 0x80, "a server does not mask"
            length = second
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            payload = await self.reader.readexactly(length)
            return Frame(first & 0x0F, payload, bool(first & 0x80))

    async def message(self, *types: str) -> dict[str, Any]:
        """The next text message, of one of these types where they are given."""
        while True:
            frame = await self.frame()
            if frame.opcode == PING:
                continue
            assert frame.opcode == TEXT, frame
            assert frame.fin
            assert b"\n" not in frame.payload
            message: dict[str, Any] = json.loads(frame.payload)
            if not types or message["type"] in types:
                return message

    async def close_code(self) -> int:
        """The server's close code; text messages before it are passed over."""
        while (frame := await self.frame()).opcode != CLOSE:
            pass
        return frame.close_code

    async def say(self, **message: Any) -> None:
        """Send one message."""
        await self.send(text(json.dumps(message)))

    async def pings(self) -> None:
        """Assert that the connection answers."""
        await self.send(text('{"type":"Ping"}'))
        await self.message("pong")


@contextlib.asynccontextmanager
async def connected(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
    """A TCP connection to the server; `receive_buffer` in bytes, for one that is soon full."""
    reader, writer = await _open(port, receive_buffer)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _open(
    port: int, receive_buffer: int | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if receive_buffer is None:
        return await asyncio.open_connection("127.0.0.1", port, limit=1 << 21)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=receive_buffer)


# --- bytes ---


def request(
    method: str,
    target: str,
    *headers: str,
    body: bytes | None = None,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request with a Host, and a Content-Length where it has a body."""
    lines = [f"{method} {target} {version}", "Host: test", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def handshake(target: str, *headers: str, key: bytes | None = None) -> bytes:
    """A WebSocket's opening handshake."""
    nonce = base64.b64encode(os.urandom(16) if key is None else key).decode()
    return request(
        "GET",
        target,
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {nonce}",
        *headers,
    )


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length: int | None = None,
    wide: bool = False,
) -> bytes:
    """A client's frame; `length` and `wide` make its head say something else than is right."""
    size = len(payload) if length is None else length
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if masked else 0
    if size < 126 and not wide:
        head = bytes([first, bit | size])
    elif size < 65536:
        head = bytes([first, bit | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([first, bit | 127]) + size.to_bytes(8, "big")
    if not masked:
        return head + payload
    mask = os.urandom(4)
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    data = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return head + mask + data.to_bytes(len(payload), "big")


def text(message: str | bytes) -> bytes:
    """A text message in one frame."""
    return frame(TEXT, message.encode() if isinstance(message, str) else message)
