"""What a page learns when it is refused or sent away, with neither status nor body to look at."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from playwright.async_api import Page

from notifyd.connections import lifecycle
from notifyd.options import ChannelRule
from tests.conftest import StartServer
from tests.front_door import Host, token, until

_WEBSOCKET = """
    ([url, protocols]) => new Promise((resolve) => {
        const told = [];
        const socket = new WebSocket(url, protocols);
        socket.onmessage = ({data}) => told.push(JSON.parse(data));
        socket.onclose = ({code}) => resolve({code, told});
        window.socket = socket;
    })
"""

_EVENT_SOURCE = """
    (url) => {
        const seen = window.seen = {errors: [], broken: 0, connected: 0};
        const source = window.source = new EventSource(url);
        source.addEventListener("connected", () => seen.connected++);
        source.addEventListener("error", ({data}) => {
            if (data === undefined) seen.broken++;
            else seen.errors.push(JSON.parse(data).code);
        });
    }
"""


async def websocket(page: Page, host: Host, query: str = "", *protocols: str) -> dict[str, Any]:
    """Open a WebSocket and wait for its end: the code, and what was told before."""
    arguments = [f"{host.ws_url}?{query}", list(protocols)]
    ended: dict[str, Any] = await page.evaluate(_WEBSOCKET, arguments)
    return ended


async def told_by(page: Page, host: Host, query: str) -> tuple[int, str]:
    """The close code of a WebSocket that is refused, and the code of the error before it."""
    ended = await websocket(page, host, query)
    assert [message["type"] for message in ended["told"]] == ["error"]
    return ended["code"], ended["told"][0]["code"]


async def test_a_bad_token(script: Page, start_on: StartServer) -> None:
    host = await start_on()
    await script.goto(f"{host.url}/health/live")
    assert await told_by(script, host, "token=nonsense") == (4001, "UNAUTHORIZED")
    expired = token("u1", expires_in=-3600)
    assert await told_by(script, host, f"token={expired}") == (4001, "TOKEN_EXPIRED")
    ended = await websocket(script, host, "", "notifyd.v1", f"bearer.{expired}")
    assert ended["code"] == 4001


async def test_limits(script: Page, start_on: StartServer) -> None:
    host = await start_on(
        websocket={"max_connections": 2, "max_connections_per_user": 1, "on_user_limit": "refuse"}
    )
    await script.goto(f"{host.url}/health/live")
    await host.websocket("u1")
    assert await told_by(script, host, f"token={token('u1')}") == (4009, "CONNECTION_LIMIT")
    await host.websocket("u2")
    assert await told_by(script, host, f"token={token('u3')}") == (4029, "CONNECTION_LIMIT")


async def test_shutting_down(script: Page, start_on: StartServer) -> None:
    host = await start_on()
    await script.goto(f"{host.url}/health/live")
    await host.notifyd.drain()
    assert await told_by(script, host, f"token={token('u1')}") == (1001, "UNAVAILABLE")


async def test_a_token_that_is_offered_alone_is_echoed(script: Page, start_on: StartServer) -> None:
    host = await start_on()
    await script.goto(f"{host.url}/health/live")
    ending = asyncio.create_task(websocket(script, host, "", f"bearer.{token('u1')}"))
    await until(lambda: host.notifyd.lifecycle.registry.users == 1, "the connection")
    await host.post("/api/v1/users/u1/disconnect", {})
    ended = await ending
    assert ended["code"] == 4003
    assert ended["told"][0]["type"] == "connected"


async def test_a_foreign_page_learns_nothing(script: Page, start_on: StartServer) -> None:
    host = await start_on(
        server={"mode": "production", "port": 0},
        channels={"rules": {"*": ChannelRule(subscribe="any")}},
    )
    await script.goto(f"{host.url}/health/live")
    ended = await websocket(script, host, f"token={token('u1')}")
    assert ended == {"code": 1006, "told": []}


async def test_an_event_source_comes_back_when_there_is_room(
    script: Page, start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LIMIT_RETRY_AFTER", 1)  # instead of half a minute
    host = await start_on(websocket={"max_connections": 1})
    await script.goto(f"{host.url}/health/live")
    first = await host.websocket("u1")
    await script.evaluate(_EVENT_SOURCE, f"{host.url}/sse?token={token('u2')}")
    await script.wait_for_function("seen.broken >= 2")
    seen = await script.evaluate("seen")
    assert set(seen["errors"]) == {"CONNECTION_LIMIT"}
    assert await script.evaluate("source.readyState") == 0

    await first.close()
    await script.wait_for_function("seen.connected === 1")
    assert await script.evaluate("source.readyState") == 1


async def test_an_event_source_gives_up_on_a_bad_token(script: Page, start_on: StartServer) -> None:
    host = await start_on()
    await script.goto(f"{host.url}/health/live")
    await script.evaluate(_EVENT_SOURCE, f"{host.url}/sse?token=nonsense")
    await script.wait_for_function("source.readyState === 2")
    assert (await script.evaluate("seen"))["errors"] == []
