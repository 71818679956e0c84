"""Keys from an issuer, over a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.jwks import Jwks, JwksError, KeySet, algorithm_of, fetch_document, public_key_of_pem

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
WEAK_KEY = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to see it refused


def jwk(key: Any, **members: object) -> dict[str, Any]:
    """The JWK of a key, with other members put in."""
    for kind in (RSAAlgorithm, ECAlgorithm, OKPAlgorithm):
        with contextlib.suppress(jwt.InvalidKeyError, AttributeError):
            made = kind.to_jwk(key, as_dict=True)
            return {name: value for name, value in made.items() if name != "key_ops"} | members
    raise AssertionError(key)


def document(*members: dict[str, Any]) -> bytes:
    return json.dumps({"keys": members}).encode()


class Issuer:
    """An HTTP server on a free port; it answers with `body` once `gate` is set."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.body = document()
        self.status = "200 OK"
        self.headers = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        self.asked.set()
        await self.gate.wait()
        head = f"HTTP/1.1 {self.status}\r\nContent-Length: {len(self.body)}\r\n{self.headers}\r\n"
        writer.write(head.encode() + self.body)
        writer.close()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/jwks.json"

    async def stop(self) -> None:
        self.gate.set()
        self.server.close()
        await self.server.wait_closed()


@pytest.fixture
async def issuer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Issuer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    issuer = Issuer()
    await issuer.start()
    yield issuer
    await issuer.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def nothing() -> None:
    return None


def source(issuer: Issuer, clock: Clock, on_withdrawn: Callable[[], None] = nothing) -> Jwks:
    return Jwks(issuer.url, on_withdrawn=on_withdrawn, clock=clock)


def test_each_key_is_for_one_algorithm() -> None:
    assert algorithm_of(RSA_KEY.public_key()) == "RS256"
    assert algorithm_of(EC_KEY.public_key()) == "ES256"
    assert algorithm_of(ED_KEY.public_key()) == "EdDSA"
    assert algorithm_of(ed448.Ed448PrivateKey.generate().public_key()) == "EdDSA"
    assert algorithm_of(WEAK_KEY.public_key()) is None
    assert algorithm_of(ec.generate_private_key(ec.SECP384R1()).public_key()) is None
    assert algorithm_of(RSA_KEY) is None
    assert algorithm_of(b"secret") is None


def test_a_key_set_passes_over_what_it_cannot_use() -> None:
    good = jwk(RSA_KEY.public_key(), kid="good")
    odd: list[dict[str, Any]] = [
        {},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric", "alg": "HS256"},
        {"kty": "RSA", "kid": "broken", "n": "!!", "e": "AQAB"},
        {"kty": "EC", "kid": "off-curve", "crv": "P-256", "x": "AAAA", "y": "AAAA"},
        {"kty": "XX"},
        jwk(RSA_KEY.public_key(), kid="encryption", use="enc"),
        jwk(RSA_KEY.public_key(), kid="wrap", key_ops=["wrapKey"]),
        jwk(RSA_KEY.public_key(), kid="wrap", key_ops="verify"),
        jwk(RSA_KEY.public_key(), kid="pss", alg="PS256"),
        jwk(RSA_KEY.public_key(), kid="confused", alg="HS256"),
        jwk(RSA_KEY.public_key(), kid=7),
        jwk(RSA_KEY, kid="private"),
        jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), kid="p384"),
    ]
    keys = KeySet(document(*odd, good))
    assert len(keys) == 1
    assert len(keys.find("RS256", "good")) == 1
    assert len(keys.find("RS256", None)) == 1
    assert not keys.find("ES256", "good")
    assert not keys.find("HS256", "symmetric")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[1]}', b"<html>", b"\xff", b"[" * 60000]
)
def test_what_is_no_key_set(text: bytes) -> None:
    with pytest.raises(JwksError):
        KeySet(text)


def test_public_keys_in_pem() -> None:
    pem = EC_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert algorithm_of(public_key_of_pem(f"\n{pem.decode()}\n")) == "ES256"
    with pytest.raises(ConfigurationError, match="not a PEM public key"):
        public_key_of_pem("-----BEGIN PUBLIC KEY-----\nnonsense\n-----END PUBLIC KEY-----")
    with pytest.raises(ConfigurationError, match="not a PEM public key"):
        public_key_of_pem("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----")
    small = WEAK_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ConfigurationError, match="2048"):
        public_key_of_pem(small.decode())


async def test_fetching(issuer: Issuer) -> None:
    issuer.body = document(jwk(RSA_KEY.public_key(), kid="a"))
    jwks = source(issuer, Clock())
    assert not jwks.find("RS256", "a")
    await jwks.fetched()
    assert jwks.failure is None
    assert jwks.find("RS256", "a")
    assert issuer.requests[0].startswith(b"GET /jwks.json HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason"),
    [
        ("302 Found", "Location: http://127.0.0.1:1/\r\n", b"", "answered 302"),
        ("404 Not Found", "", b"", "answered 404"),
        ("200 OK", "Content-Encoding: gzip\r\n", b"x", "compressed"),
        ("200 OK", "", b" " * 65537, "larger than 65536 bytes"),
        ("200 OK", "", b"<html>", "no JWK Set"),
        ("200 OK", "", document(), "no key for"),
    ],
)
async def test_what_is_not_taken(
    issuer: Issuer, status: str, headers: str, body: bytes, reason: str
) -> None:
    issuer.status, issuer.headers, issuer.body = status, headers, body
    jwks = source(issuer, Clock())
    await jwks.fetched()
    assert jwks.failure is not None
    assert reason in jwks.failure
    assert len(issuer.requests) == 1


async def test_a_document_of_the_largest_size_is_taken(issuer: Issuer) -> None:
    issuer.body = document(jwk(RSA_KEY.public_key())).ljust(65536)
    assert len(await fetch_document(issuer.url)) == 65536


async def test_nobody_listening(issuer: Issuer) -> None:
    jwks = source(issuer, Clock())
    await issuer.stop()
    await jwks.fetched()
    assert jwks.failure is not None
    assert jwks.unavailable().retry_after == 1


async def test_an_issuer_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notifyd.jwks.FETCH_TIMEOUT", 0.01)

    async def never(_url: str) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    jwks = Jwks("https://issuer.test/", on_withdrawn=nothing, clock=Clock(), fetch=never)
    await jwks.fetched()
    assert jwks.failure is not None
    assert jwks.failure.startswith("no answer within")


async def test_all_wait_for_one_fetch_and_a_cancelled_one_does_not_stop_it(issuer: Issuer) -> None:
    issuer.body = document(jwk(EC_KEY.public_key(), kid="a"))
    issuer.gate.clear()
    jwks = source(issuer, Clock())
    waiting = [asyncio.create_task(jwks.fetched()) for _ in range(100)]
    await issuer.asked.wait()
    with pytest.raises(Unavailable) as refused:
        await jwks.fetched()
    assert refused.value.retry_after == 1
    for task in waiting[:50]:
        task.cancel()
    cancelled = await asyncio.gather(*waiting[:50], return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in cancelled)
    issuer.gate.set()
    await asyncio.gather(*waiting[50:])
    assert jwks.find("ES256", "a")
    assert len(issuer.requests) == 1


async def test_fetches_are_30_s_apart_and_a_second_while_there_are_no_keys(issuer: Issuer) -> None:
    clock = Clock()
    jwks = source(issuer, clock)
    issuer.status = "500 Internal Server Error"
    assert jwks.may_fetch()
    await jwks.fetched()
    assert not jwks.may_fetch()
    clock.now += 1
    assert jwks.may_fetch()
    issuer.status, issuer.body = "200 OK", document(jwk(EC_KEY.public_key(), kid="a"))
    await jwks.fetched()
    clock.now += 29.9
    assert not jwks.may_fetch()
    assert jwks.unavailable().retry_after == 1
    clock.now += 0.2
    assert jwks.may_fetch()
    await jwks.fetched()
    clock.now -= 1000  # A clock that is set back must not lock the keys in.
    assert jwks.may_fetch()


async def test_a_failure_keeps_the_keys(issuer: Issuer) -> None:
    clock = Clock()
    jwks = source(issuer, clock)
    issuer.body = document(jwk(EC_KEY.public_key(), kid="a"))
    await jwks.fetched()
    issuer.status = "503 Service Unavailable"
    clock.now += 31
    await jwks.fetched()
    assert jwks.failure == "the JWKS URL answered 503"
    assert jwks.find("ES256", "a")
    clock.now += 5
    assert jwks.unavailable().retry_after == 25


async def test_old_keys_are_fetched_again_and_withdrawn_ones_reported(issuer: Issuer) -> None:
    withdrawn: list[float] = []
    clock = Clock()
    jwks = source(issuer, clock, lambda: withdrawn.append(clock.now))
    issuer.body = document(jwk(EC_KEY.public_key(), kid="a"), jwk(ED_KEY.public_key(), kid="b"))
    await jwks.fetched()
    clock.now += 599
    jwks.refresh_if_old()
    assert len(issuer.requests) == 1
    clock.now += 1
    jwks.refresh_if_old()
    jwks.refresh_if_old()
    await jwks.fetched()
    assert len(issuer.requests) == 2
    assert not withdrawn
    issuer.body = document(jwk(EC_KEY.public_key(), kid="a"))
    clock.now += 600
    jwks.refresh_if_old()
    await jwks.fetched()
    assert withdrawn == [clock.now]
    assert not jwks.find("EdDSA", "b")


async def test_closing_ends_the_fetch_and_tells_who_waits(issuer: Issuer) -> None:
    issuer.gate.clear()
    jwks = source(issuer, Clock())
    waiting = asyncio.create_task(jwks.fetched())
    await issuer.asked.wait()
    await jwks.aclose()
    with pytest.raises(Unavailable):
        await waiting
    await jwks.aclose()


async def test_a_fault_of_the_fetch_function_is_not_swallowed() -> None:
    async def broken(_url: str) -> bytes:
        raise ZeroDivisionError

    clock = Clock()
    jwks = Jwks("https://issuer.test/", on_withdrawn=nothing, clock=clock, fetch=broken)
    with pytest.raises(ZeroDivisionError):
        await jwks.fetched()
    assert jwks.failure is not None
