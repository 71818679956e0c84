"""The embedded server on stock uvicorn: `Notifyd(settings).app`, settings from NOTIFYD_CONFIG.

Only the lifespan is added, beside the app and not around it, so that no request pays for it.
"""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from notifyd import Notifyd
from notifyd.settings import load_settings


def build() -> ASGIApp:
    """The app that uvicorn's `--factory` asks for."""
    notifyd = Notifyd(load_settings(os.environ["NOTIFYD_CONFIG"], {}))
    lifespan = Starlette(lifespan=notifyd.lifespan)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (lifespan if scope["type"] == "lifespan" else notifyd.app)(scope, receive, send)

    return app
