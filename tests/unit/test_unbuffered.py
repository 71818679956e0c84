"""What writing past a transport rests on, in both event loops."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from notifyd.server.unbuffered import unbuffered

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)


class Pausable(asyncio.Protocol):
    """Notes what its transport tells it, and whether the descriptor was open when it ended."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.paused = False
        self.lost: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.descriptor = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        os.fstat(self.descriptor)
        self.lost.set_result(True)


async def connected() -> tuple[Pausable, socket.socket]:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = await loop.sock_accept(listener)
    _, protocol = await loop.connect_accepted_socket(Pausable, ours)
    return protocol, theirs


@pytest.mark.parametrize("new_loop", LOOPS)
def test_the_transport_pauses_before_it_keeps_anything_back(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run() -> None:
        protocol, theirs = await connected()
        transport = protocol.transport
        descriptor = unbuffered(transport)
        assert descriptor >= 0
        sent = b""
        number = 0
        while not protocol.paused:
            number += 1
            data = b"%07d\n" % number * 4096
            sent += data
            if number % 2:
                transport.write(data)
                assert protocol.paused is (transport.get_write_buffer_size() > 0)
                continue
            try:
                written = os.write(descriptor, data)
            except BlockingIOError:
                written = 0
            if written < len(data):
                transport.write(data[written:])
                assert protocol.paused
        transport.close()
        received = await asyncio.to_thread(
            lambda: b"".join(iter(lambda: theirs.recv(1 << 20), b""))
        )
        assert received == sent
        theirs.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("ended", ["close", "abort", "reset"])
@pytest.mark.parametrize("new_loop", LOOPS)
def test_the_protocol_knows_before_the_descriptor_is_another_sockets(
    new_loop: Callable[[], asyncio.AbstractEventLoop], ended: str
) -> None:
    async def run() -> None:
        protocol, theirs = await connected()
        protocol.descriptor = unbuffered(protocol.transport)
        if ended == "reset":
            theirs.close()
        else:
            getattr(protocol.transport, ended)()
        async with asyncio.timeout(10):
            assert await protocol.lost
        theirs.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


class FakeTransport:
    """A transport with these facts."""

    def __init__(self, waiting: int = 0, **facts: object) -> None:
        self._waiting = waiting
        self._facts = facts

    def get_extra_info(self, name: str) -> Any:
        return self._facts.get(name)

    def get_write_buffer_size(self) -> int:
        return self._waiting


def test_not_where_something_is_between_the_protocol_and_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for transport in (
            FakeTransport(),
            FakeTransport(socket=ours, sslcontext=object()),
            FakeTransport(waiting=1, socket=ours),
        ):
            assert unbuffered(cast(asyncio.Transport, transport)) == -1
