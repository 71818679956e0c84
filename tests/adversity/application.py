"""An application that embeds notifyd, for a stock uvicorn in a process of its own."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Mount

from notifyd.app import Notifyd
from tests.adversity.hosting import open_settings


def make() -> Starlette:
    """notifyd at the root, and mounted once more under /mounted."""
    notifyd = Notifyd(open_settings())
    return Starlette(
        routes=[Mount("/mounted", notifyd.app), Mount("/", notifyd.app)], lifespan=notifyd.lifespan
    )
