"""Keys from an issuer: fetched from a real HTTP server, cached, and away now and then."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from websockets.exceptions import InvalidStatus

from tests.conftest import StartServer
from tests.front_door import ORIGIN, Host, Transport, token, until, user


class Issuer:
    """Signs tokens, and serves its public keys; `away` answers 500, `late` waits to be let go."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.fetched = 0
        self.away = False
        self.late: asyncio.Event | None = None
        self.url = ""

    def add_key(self, kid: str) -> None:
        """A new key under this id."""
        self.keys[kid] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(self, user_id: str, kid: str, **claims: Any) -> str:
        """A token of an hour, signed with this key."""
        all_claims = {"sub": user_id, "exp": int(time.time()) + 3600, **claims}
        return jwt.encode(all_claims, self.keys[kid], algorithm="RS256", headers={"kid": kid})

    def document(self) -> bytes:
        """The JWK Set (RFC 7517)."""
        keys = []
        for kid, key in self.keys.items():
            jwk = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
            keys.append({**jwk, "kid": kid, "use": "sig", "alg": "RS256"})
        return json.dumps({"keys": keys}).encode()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        await reader.readuntil(b"\r\n\r\n")
        self.fetched += 1
        if self.late is not None:
            await self.late.wait()
        status, body = ("500 Oops", b"") if self.away else ("200 OK", self.document())
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """An issuer with one key, `first`."""
    issuer = Issuer()
    issuer.add_key("first")
    server = await asyncio.start_server(issuer.answer, "127.0.0.1", 0)
    issuer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    async with server:
        yield issuer


async def start_with(start: StartServer, issuer: Issuer) -> Host:
    """A server that believes this issuer alone."""
    return await start(
        auth={"jwks_url": issuer.url, "jwt_secret": None, "jwt_algorithms": ["RS256"]}
    )


async def test_tokens_of_the_issuer_are_believed(
    start: StartServer, issuer: Issuer, transport: Transport
) -> None:
    host = await start_with(start, issuer)
    listener = await host.listen(transport, jwt=issuer.token("ada", "first"))
    assert listener.connected["user_id"] == "ada"
    await host.publish(user("ada"))
    await listener.expect("notification")
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(jwt=token("ada"))
    assert refused.value.response.status_code == 401


async def test_a_new_key_is_fetched_when_it_is_seen(start: StartServer, issuer: Issuer) -> None:
    host = await start_with(start, issuer)
    await host.websocket(jwt=issuer.token("ada", "first"))
    fetched = issuer.fetched
    issuer.add_key("second")
    host.clock.advance(31)
    await host.websocket(jwt=issuer.token("bob", "second"))
    await host.sse(jwt=issuer.token("bob", "second", jti="other"))
    assert issuer.fetched == fetched + 1


async def test_while_a_key_is_fetched_everybody_waits_in_order(
    start: StartServer, issuer: Issuer
) -> None:
    host = await start_with(start, issuer)
    await host.websocket(jwt=issuer.token("ada", "first"))
    issuer.add_key("second")
    host.clock.advance(31)
    issuer.late = asyncio.Event()
    waiting = asyncio.create_task(host.websocket(jwt=issuer.token("bob", "second")))
    first_message = await host.websocket(None, greeted=False)
    await first_message.send("Auth", {"token": issuer.token("cleo", "second")})
    await first_message.send("Subscribe", {"channels": ["orders"]})
    await first_message.send("Ping")
    await until(lambda: len(host.notifyd.lifecycle._verifying) == 1, "the message")
    issuer.late.set()
    assert (await waiting).connected["user_id"] == "bob"
    assert (await first_message.expect("connected"))["user_id"] == "cleo"
    assert (await first_message.expect("subscribed"))["payload"] == ["orders"]
    await first_message.expect("pong")


async def test_keys_that_cannot_be_had_are_no_verdict(start: StartServer, issuer: Issuer) -> None:
    issuer.away = True
    host = await start_with(start, issuer)
    jwt = issuer.token("ada", "first")
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(jwt=jwt)
    assert refused.value.response.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) > 0
    browser = await host.websocket(jwt=jwt, origin=ORIGIN, greeted=False)
    code, told = await browser.closed()
    assert (code, told[0]["code"]) == (1011, "UNAVAILABLE")
    late = await host.websocket(None, greeted=False)
    await late.send("Auth", {"token": jwt})
    assert (await late.closed())[0] == 1011
    stream = await host.sse(jwt=jwt, greeted=False)
    assert [message["code"] for message in await stream.rest()] == ["UNAVAILABLE"]
    assert stream.retry is not None
    headers = {"Authorization": f"Bearer {jwt}"}
    body = {"notification_id": "6f9619ff-8b86-d011-b42d-00c04fc964ff"}
    response = await host.post("/api/v1/acks", body, key=None, headers=headers)
    assert response.status_code == 503
    issuer.away = False
    host.clock.advance(31)
    await host.websocket(jwt=jwt)


async def test_keys_that_cannot_be_had_take_no_connection_away(
    start: StartServer, issuer: Issuer
) -> None:
    host = await start_with(start, issuer)
    websocket = await host.websocket(jwt=issuer.token("ada", "first"))
    issuer.add_key("second")
    issuer.away = True
    host.clock.advance(31)
    await websocket.send("Auth", {"token": issuer.token("ada", "second")})
    error = await websocket.expect("error")
    assert error["code"] in {"UNAVAILABLE", "UNAUTHORIZED"}
    await websocket.nothing_came()
    issuer.away = False
    host.clock.advance(31)
    await websocket.send("Auth", {"token": issuer.token("ada", "second")})
    await websocket.expect("refreshed")
    issuer.add_key("third")
    host.clock.advance(31)
    await websocket.send("Auth", {"token": issuer.token("bob", "third")})
    assert (await websocket.closed())[0] == 4003
