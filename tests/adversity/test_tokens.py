"""Tokens that must not be believed, through every door of both servers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.adversity.hosting import Hosted, hosted, open_settings
from tests.adversity.raw import handshake, request
from tests.front_door import SECRET, Lane, token

OTHER_SECRET = "another secret of more than thirty-two bytes"


def encoded(part: object) -> str:
    """A part of a JWT."""
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def handmade(header: object, claims: object, secret: str | bytes = SECRET) -> str:
    """A JWT with this very header and these very claims, signed with HMAC-SHA256."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    key = secret if isinstance(secret, bytes) else secret.encode()
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


HS256 = {"alg": "HS256", "typ": "JWT"}
SOON = int(time.time()) + 3600
GOOD = {"sub": "u1", "exp": SOON}

BAD = {
    "empty": "",
    "not a token": "hello",
    "dots": "..",
    "four parts": token() + ".x",
    "expired": token(expires_in=-60),
    "not yet": token(nbf=int(time.time()) + 600),
    "another secret": token(secret=OTHER_SECRET),
    "signature cut": token()[:-4],
    "signature of another": token("u2").rpartition(".")[0] + "." + token().rpartition(".")[2],
    "alg none": f"{encoded({'alg': 'none'})}.{encoded(GOOD)}.",
    "alg None": f"{encoded({'alg': 'None'})}.{encoded(GOOD)}.",
    "alg nOnE with a signature": handmade({"alg": "nOnE"}, GOOD),
    "alg absent": handmade({"typ": "JWT"}, GOOD),
    "alg of another kind": handmade({"alg": ["HS256"]}, GOOD),
    "alg HS512": jwt.encode(GOOD, SECRET * 2, algorithm="HS512"),
    "alg RS256": handmade({"alg": "RS256"}, GOOD),
    "jku": handmade({**HS256, "jku": "https://evil.example/jwks"}, GOOD),
    "x5u": handmade({**HS256, "x5u": "https://evil.example/x5u"}, GOOD),
    "crit": handmade({**HS256, "crit": ["exp"]}, GOOD),
    "header no object": handmade([], GOOD),
    "header no JSON": handmade(b"{", GOOD),
    "claims no object": handmade(HS256, []),
    "claims no JSON": handmade(HS256, b"{"),
    "claims not UTF-8": handmade(HS256, b'{"sub":"\xff"}'),
    "claims nested": handmade(HS256, b'{"sub":"u1","x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "no sub": handmade(HS256, {"exp": SOON}),
    "sub empty": handmade(HS256, {**GOOD, "sub": ""}),
    "sub null": handmade(HS256, {**GOOD, "sub": None}),
    "sub a list": handmade(HS256, {**GOOD, "sub": ["u1"]}),
    "sub true": handmade(HS256, {**GOOD, "sub": True}),
    "sub with NUL": handmade(HS256, {**GOOD, "sub": "u\0"}),
    "sub with half a pair": handmade(HS256, b'{"sub":"\\ud800","exp":%d}' % SOON),
    "sub of 300": handmade(HS256, {**GOOD, "sub": "u" * 300}),
    "no exp": handmade(HS256, {"sub": "u1"}),
    "exp a text": handmade(HS256, {"sub": "u1", "exp": str(SOON)}),
    "exp NaN": handmade(HS256, b'{"sub":"u1","exp":NaN}'),
    "exp beyond floats": handmade(HS256, b'{"sub":"u1","exp":1e999}'),
    "another tenant": handmade(HS256, {**GOOD, "tenant_id": "acme"}),
    "channels a number": handmade(HS256, {**GOOD, "channels": 7}),
    "subscribe with NUL": handmade(HS256, {**GOOD, "subscribe": ["a\0"]}),
    "a huge claim": handmade(HS256, {**GOOD, "x": "y" * 9000}) + "z" * 1500,
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_a_401(server: Hosted, name: str) -> None:
    bad = BAD[name]
    ways = [
        handshake(f"/ws?token={bad}"),
        handshake("/ws", f"Authorization: Bearer {bad or '.'}"),
        handshake("/ws", f"Sec-WebSocket-Protocol: notifyd.v1, bearer.{bad}"),
        request("GET", f"/sse?token={bad}"),
        request("GET", "/sse", f"Authorization: Bearer {bad or '.'}"),
        request("POST", "/api/v1/acks", f"Authorization: Bearer {bad}", body=b"{}"),
    ]
    if server.lane == "asgi" and len(bad) > 8000:
        # The `websockets` package takes no longer line.
        ways = [data for data in ways if b"Upgrade" not in data]
    for data in ways:
        async with server.connected() as client:
            await client.send(data)
            answer = await client.response()
            assert answer.status == 401, (name, answer)
            assert answer.code in ("UNAUTHORIZED", "TOKEN_EXPIRED")
            assert (answer.code == "TOKEN_EXPIRED") == (name == "expired")
            if len(bad) > 20:
                assert bad.encode() not in answer.body


@pytest.mark.parametrize("name", [name for name in BAD if name != "empty"])
async def test_a_bad_token_as_the_first_message_closes(server: Hosted, name: str) -> None:
    async with server.connected() as client:
        await client.send(handshake("/ws"))
        assert (await client.response()).status == 101
        await client.say(type="Auth", payload={"token": BAD[name]})
        error = await client.message("error")
        assert error["code"] in ("UNAUTHORIZED", "TOKEN_EXPIRED")
        assert await client.close_code() == (4010 if name == "expired" else 4001)


@pytest.mark.parametrize("name", ["expired", "another secret", "alg none", "no sub"])
async def test_a_bad_token_later_takes_nothing_away(server: Hosted, name: str) -> None:
    async with server.websocket() as client:
        await client.say(type="Auth", payload={"token": BAD[name]})
        assert (await client.message())["type"] == "error"
        await client.pings()


async def test_a_token_of_another_user_closes_4003(server: Hosted) -> None:
    async with server.websocket() as client:
        await client.say(type="Auth", payload={"token": token("somebody-else")})
        assert await client.close_code() == 4003


async def test_an_auth_message_over_16_kib_closes_4001(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(handshake("/ws"))
        assert (await client.response()).status == 101
        big = handmade(HS256, {**GOOD, "x": "y" * 20_000})
        await client.say(type="Auth", payload={"token": big})
        assert await client.close_code() == 4001


async def test_a_huge_claim_in_a_head_is_a_431(sockets: Hosted) -> None:
    big = handmade(HS256, {**GOOD, "x": "y" * 20_000})
    async with sockets.connected() as client:
        await client.send(handshake(f"/ws?token={big}"))
        assert (await client.response()).status == 431


async def test_a_claim_of_some_kilobytes_is_taken(server: Hosted) -> None:
    big = handmade(HS256, {**GOOD, "sub": "big", "x": "y" * 5000})
    async with server.connected() as client:
        await client.send(handshake(f"/ws?token={big}"))
        assert (await client.response()).status == 101
        assert (await client.message("connected"))["user_id"] == "big"


# --- the key of another algorithm ---


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """An issuer's key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module", params=["sockets", "asgi"])
def with_public_key(request: pytest.FixtureRequest, key: rsa.RSAPrivateKey) -> Iterator[Hosted]:
    """A server that knows the issuer's public key, and a secret too."""
    lane: Lane = request.param
    auth = {
        "jwt_secret": SECRET,
        "jwt_algorithms": ("HS256", "RS256"),
        "jwt_public_key": public_pem(key).decode(),
    }
    with hosted(lane, open_settings(auth=auth)) as server:
        yield server


def public_pem(key: rsa.RSAPrivateKey) -> bytes:
    """The public key, as everybody may have it."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


async def test_hs256_signed_with_the_public_key(
    with_public_key: Hosted, key: rsa.RSAPrivateKey
) -> None:
    pem = public_pem(key)
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    forged = [handmade(HS256, GOOD, secret) for secret in (pem, pem.strip(), der, b"")]
    forged.append(handmade({"alg": "RS256"}, GOOD))
    forged.append(jwt.encode(GOOD, rsa.generate_private_key(65537, 2048), algorithm="RS256"))
    for bad in forged:
        for data in (handshake(f"/ws?token={bad}"), request("GET", f"/sse?token={bad}")):
            async with with_public_key.connected() as client:
                await client.send(data)
                assert (await client.response()).code == "UNAUTHORIZED"
    for good in (jwt.encode(GOOD, key, algorithm="RS256"), handmade(HS256, GOOD)):
        async with with_public_key.connected() as client:
            await client.send(handshake(f"/ws?token={good}"))
            assert (await client.response()).status == 101
