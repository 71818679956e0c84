"""No token and no key reaches a log, whatever they came with."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from tests.adversity.raw import CONTINUATION, TEXT, RawClient, frame, handshake, request, text
from tests.adversity.spawning import Spawned, spawned
from tests.adversity.test_bodies import GOOD, SEND
from tests.adversity.test_tokens import OTHER_SECRET
from tests.front_door import ADMIN_KEY, Lane, token

WRONG_KEY = "wrong-key-9876543210"


class Leaks:
    """Every secret that was used, to be looked for in the end."""

    def __init__(self) -> None:
        self.secrets: list[str] = [ADMIN_KEY, WRONG_KEY]
        self._count = 0

    def token(self, *, good: bool = True, expired: bool = False) -> str:
        """A token of its own."""
        self._count += 1
        made = token(
            f"leak-{self._count}",
            expires_in=-100 if expired else 3600,
            **({} if good else {"secret": OTHER_SECRET}),
        )
        _, claims, signature = made.split(".")
        # A part of one would be enough.
        self.secrets += [claims[:24], claims[-24:], signature[:24], signature[-24:]]
        return made

    def found_in(self, log: str) -> list[str]:
        """What stands in a log."""
        return [secret for secret in self.secrets if secret in log]


async def told(server: Spawned, data: bytes) -> bytes:
    """Send this, and take what comes until the server closes or is silent."""
    async with server.connected() as client:
        await client.send(data)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.15):
                return await client.reader.read()
        return b""


async def spoken(client: RawClient, *frames: bytes) -> None:
    """Send frames over a WebSocket, and see that they were read."""
    await client.send(*frames, frame(0x8, b"\x03\xe8"))
    await client.close_code()


@pytest.mark.parametrize("lane", ["sockets", "asgi"])
async def test_no_secret_reaches_a_log(lane: Lane, tmp_path: Path) -> None:
    leaks = Leaks()
    bearer = "Authorization: Bearer {}".format
    async with spawned(lane, tmp_path, NOTIFYD_LOG__LEVEL="debug") as server:
        said: list[bytes] = []

        def say(*data: bytes) -> None:
            said.append(b"".join(data))

        for prefix in ("", "/mounted") if lane == "asgi" else ("",):
            for state in ({}, {"good": False}, {"expired": True}):
                for path in ("/ws", "/sse"):
                    opening = handshake if path == "/ws" else lambda *a: request("GET", *a)
                    for target in (
                        f"?token={leaks.token(**state)}",
                        f"?acks=1&token={leaks.token(**state)}&x=1",
                        f"?token={leaks.token()}&token={leaks.token(**state)}",
                        f"?%74oken={leaks.token(**state)}",
                        f"?acks=7&token={leaks.token(**state)}",
                    ):
                        say(opening(prefix + path + target))
                    say(opening(prefix + path, bearer(leaks.token(**state))))
                say(
                    handshake("/ws", f"Sec-WebSocket-Protocol: bearer.{leaks.token(**state)}"),
                )
                ack = request("POST", "/api/v1/acks", bearer(leaks.token(**state)), body=b"{}")
                say(ack)
                auth = json.dumps({"type": "Auth", "payload": {"token": leaks.token(**state)}})
                half = len(auth) // 2
                say(handshake("/ws"), text(auth), text("{"))
                say(
                    handshake("/ws"),
                    frame(TEXT, auth[:half].encode(), fin=False),
                    frame(CONTINUATION, auth[half:].encode() + b"\xff"),
                )
            # paths that are none, requests that are none, keys
            say(request("GET", f"{prefix}/nowhere?token={leaks.token()}"))
            say(request("POST", f"{SEND}?token={leaks.token()}", body=GOOD))
            say(request("GET", f"/health?token={leaks.token()}"))
            say(request("GET", f"/ws?token={leaks.token()}"))
        say(f"GET /sse?token={leaks.token()} HTTP/9.9\r\n\r\n".encode())
        say(request("GET", "/sse", f"{bearer(leaks.token())}\0"))
        say(handshake(f"/elsewhere?token={leaks.token()}"))
        say(f"GET /sse?token={leaks.token()}".encode())
        say(request("POST", SEND, f"X-API-Key: {WRONG_KEY}", body=GOOD))
        say(request("POST", SEND, bearer(WRONG_KEY), body=GOOD))
        say(server.request("POST", SEND, body=b"{"))
        # As many at a time as may wait for their Auth.
        for start in range(0, len(said), 20):
            await asyncio.gather(*[told(server, data) for data in said[start : start + 20]])
        async with server.websocket("leak") as client:
            auth = json.dumps({"type": "Auth", "payload": {"token": leaks.token()}})
            await spoken(client, frame(TEXT, auth[:9].encode(), fin=False),
                         frame(CONTINUATION, auth[9:].encode()))  # fmt: skip
    log = server.log.read_text()
    if lane == "asgi":
        # It is the access log that stock uvicorn writes.
        assert '"GET /sse' in log
        assert '"WebSocket /ws' in log
    found = leaks.found_in(log)
    assert not found, [line for line in log.splitlines() if any(each in line for each in found)][:5]
    assert "Traceback" not in log, log
