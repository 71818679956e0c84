"""A socket's descriptor, for writing past its transport what goes to a thousand sockets."""

from __future__ import annotations

import asyncio
import os


def unbuffered(transport: asyncio.Transport) -> int:
    """The descriptor to which bytes may be written past this transport while it is not paused.

    From here on the transport keeps nothing back without pausing its protocol at once, so that
    nothing can overtake what it still has; and it calls `connection_lost` before it closes the
    socket, in asyncio and in uvloop, so that no other socket is written to. -1 where the bytes on
    the wire are not the protocol's (TLS), or something waits to be written already.
    """
    socket = transport.get_extra_info("socket")
    if (
        socket is None
        or os.name != "posix"
        or transport.get_extra_info("sslcontext") is not None
        or transport.get_write_buffer_size()
    ):
        return -1
    transport.set_write_buffer_limits(high=0)
    descriptor: int = socket.fileno()
    return descriptor
