"""notifyd: real-time notifications over WebSocket and Server-Sent Events.

`Client` and `AsyncClient` talk to a server; `Notifyd` is the server inside one's own ASGI app. Each
is imported when first asked for, so that a client does not load the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from notifyd.version import __version__

if TYPE_CHECKING:
    from notifyd.app import Notifyd
    from notifyd.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Notifyd", "__version__"]


def __getattr__(name: str) -> object:
    if name in {"Client", "AsyncClient"}:
        from notifyd import client

        return getattr(client, name)
    if name == "Notifyd":
        from notifyd.app import Notifyd

        return Notifyd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
