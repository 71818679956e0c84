"""Public keys of tokens: which algorithm each is for, and how they come from an issuer's JWKS.

RFC 7517 says what a JWK Set is, RFC 7518 and RFC 8037 what its keys are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import httpx
import jwt
import msgspec
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from notifyd.errors import ConfigurationError, Unavailable

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey
Fetch: TypeAlias = Callable[[str], Awaitable[bytes]]

FETCH_TIMEOUT = 5.0
MAX_DOCUMENT_BYTES = 65536
MAX_WAITING = 100
REFETCH_INTERVAL = 30.0
"""Seconds between two fetches while there are keys; an unknown `kid` cannot cause more."""
RETRY_INTERVAL = 1.0
"""Seconds between two fetches while there has never been a key, so that a start heals quickly."""
MAX_AGE = 600.0
"""Seconds after which keys are fetched again, so that one the issuer withdrew stops verifying."""

_log = structlog.get_logger(__name__)

# RFC 7518, section 3.3, asks for 2048 bits; the upper bound is so that no key costs milliseconds.
_RSA_BITS = range(2048, 8193)


class JwksError(Exception):
    """What came from the JWKS URL is no key set, or did not come as it must."""


def algorithm_of(key: object) -> str | None:
    """The one algorithm that `key` verifies here; None for a key of any other kind.

    This is what binds an algorithm to its kind of key: a token says which algorithm it uses, and
    only a key that answers with the same name is ever tried on it (RFC 8725, section 3.1).
    """
    if isinstance(key, RSAPublicKey):
        return "RS256" if key.key_size in _RSA_BITS else None
    if isinstance(key, EllipticCurvePublicKey):
        return "ES256" if isinstance(key.curve, SECP256R1) else None
    return "EdDSA" if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else None


def public_key_of_pem(text: str) -> PublicKey:
    """The key in a PEM public key or certificate. Raises ConfigurationError."""
    pem = text.strip().encode()
    try:
        if pem.startswith(b"-----BEGIN CERTIFICATE-----"):
            key: object = x509.load_pem_x509_certificate(pem).public_key()
        else:
            key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            "auth.jwt_public_key: not a PEM public key; it begins with -----BEGIN PUBLIC KEY-----"
        ) from error
    if algorithm_of(key) is None:
        raise ConfigurationError(
            "auth.jwt_public_key: no algorithm takes this key; RS256 takes RSA of 2048 to 8192 "
            "bits, ES256 the curve P-256, EdDSA Ed25519 or Ed448"
        )
    return key  # type: ignore[return-value]  # what algorithm_of names is a PublicKey


class _KeySetDocument(msgspec.Struct):
    """RFC 7517, section 5: unknown members are ignored."""

    keys: list[dict[str, Any]]


class KeySet:
    """The keys of one JWKS document that can verify a token here; others are passed over.

    Raises JwksError where `document` is no JWK Set.
    """

    __slots__ = ("_entries", "_members")

    def __init__(self, document: bytes) -> None:
        try:
            members = msgspec.json.decode(document, type=_KeySetDocument).keys
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise JwksError("what the JWKS URL answered is no JWK Set") from error
        self._entries: list[tuple[str, str | None, PublicKey]] = []
        self._members: list[dict[str, Any]] = []
        for member in members:
            if (key := _key_of(member)) is not None and (algorithm := algorithm_of(key)):
                if member.get("alg") not in {None, algorithm}:
                    continue
                self._entries.append((algorithm, member.get("kid"), key))
                self._members.append(member)

    def find(self, algorithm: str, kid: str | None) -> list[PublicKey]:
        """Keys of `algorithm` with that `kid`; all of them for a token that names none."""
        return [key for name, id_, key in self._entries if name == algorithm and kid in {None, id_}]

    def keeps(self, other: KeySet) -> bool:
        """Whether every key of `other` is in this set too, unchanged."""
        return all(member in self._members for member in other._members)

    def __len__(self) -> int:
        return len(self._entries)


def _key_of(member: dict[str, Any]) -> PublicKey | None:
    """The public signature key in a JWK; None for symmetric, private, encryption or odd ones."""
    operations = member.get("key_ops")
    if (
        member.get("kty") not in {"RSA", "EC", "OKP"}
        or "d" in member
        or member.get("use") not in {None, "sig"}
        or (operations is not None and (type(operations) is not list or "verify" not in operations))
        or not isinstance(member.get("kid"), str | None)
        or not isinstance(member.get("alg"), str | None)
    ):
        return None
    try:
        return jwt.PyJWK(member).key  # type: ignore[no-any-return]  # algorithm_of looks at it
    except (jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm):
        # One odd key must not take the others away (RFC 7517, section 5).
        return None


class Jwks:
    """The keys that an issuer publishes at a URL, fetched when they are needed.

    Nothing is fetched until `fetched()` or `refresh_if_old()` is called. One fetch is under way at
    a time and everybody waits for the same one; who stops waiting does not stop it. `on_withdrawn`
    is called when a fetch shows that a key is gone, so that what it verified can be forgotten.
    `fetch` returns the document at a URL and raises OSError, httpx.HTTPError or JwksError.
    """

    def __init__(
        self,
        url: str,
        *,
        on_withdrawn: Callable[[], None],
        clock: Callable[[], float] = time.time,
        fetch: Fetch | None = None,
    ) -> None:
        self._url = url
        self._on_withdrawn = on_withdrawn
        self._clock = clock
        self._fetch = fetch or fetch_document
        self._keys: KeySet | None = None
        self._fetched_at = -math.inf
        self._attempted_at = -math.inf
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting = 0

    @property
    def failure(self) -> str | None:
        """Why the last fetch brought no keys, in one plain clause; None if it did."""
        return self._failure

    def find(self, algorithm: str, kid: str | None) -> list[PublicKey]:
        """The known keys for a token; none of them is for another algorithm."""
        return [] if self._keys is None else self._keys.find(algorithm, kid)

    def may_fetch(self) -> bool:
        """Whether waiting for `fetched()` can bring anything new."""
        return self._task is not None or self._wait() <= 0

    def unavailable(self) -> Unavailable:
        """The error for a token that cannot be judged without keys that cannot be had."""
        return Unavailable(
            "The keys that verify tokens cannot be had just now.",
            hint=f"auth.jwks_url: {self._failure}" if self._failure and not self._task else None,
            retry_after=1 if self._task else max(1, math.ceil(self._wait())),
        )

    def _wait(self) -> float:
        """Seconds until the next fetch is allowed. A clock that was set back allows it."""
        interval = RETRY_INTERVAL if self._keys is None else REFETCH_INTERVAL
        elapsed = self._clock() - self._attempted_at
        return 0 if elapsed < 0 else interval - elapsed

    async def fetched(self) -> None:
        """Wait for the fetch that is under way, or for a new one; `failure` says how it went.

        Raises Unavailable if 100 are waiting already. Cancelling this leaves the fetch to the
        others.
        """
        if self._waiting >= MAX_WAITING:
            raise self.unavailable()
        task = self._task or self._start()
        self._waiting += 1
        try:
            # Not `await task`, nor a shield: a cancelled waiter must not cancel the fetch, and a
            # fetch cancelled by aclose() must not look like the waiter's own cancellation.
            await asyncio.wait([task])
        finally:
            self._waiting -= 1
        if task.cancelled():
            raise self.unavailable()
        task.result()

    def refresh_if_old(self) -> None:
        """Fetch in the background if the keys are older than 10 minutes; what is known stays good.

        Must be called in the event loop.
        """
        if (
            self._task is None
            and not 0 <= self._clock() - self._fetched_at < MAX_AGE
            and self._wait() <= 0
        ):
            self._start()

    async def aclose(self) -> None:
        """Stop the fetch that is under way, if any; who waits for it gets Unavailable."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])

    def _start(self) -> asyncio.Task[None]:
        self._attempted_at = self._clock()
        self._task = asyncio.get_running_loop().create_task(self._fetch_once(), name="jwks")
        self._task.add_done_callback(self._ended)
        return self._task

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self._task = None

    async def _fetch_once(self) -> None:
        # What stays if this is cancelled, or fails as nothing here expects.
        self._failure = "the fetch did not come to its end"
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                keys = KeySet(await self._fetch(self._url))
            if not keys:
                raise JwksError("the key set has no key for RS256, ES256 or EdDSA")
        except TimeoutError:
            self._failed(f"no answer within {FETCH_TIMEOUT:g} s")
            return
        except (OSError, httpx.HTTPError, httpx.InvalidURL, JwksError) as error:
            self._failed(str(error) or type(error).__name__)
            return
        before, self._keys = self._keys, keys
        self._fetched_at = self._clock()
        self._failure = None
        if before is not None and not keys.keeps(before):
            self._on_withdrawn()

    def _failed(self, reason: str) -> None:
        self._failure = reason
        _log.warning("the keys at auth.jwks_url cannot be had", reason=reason)


async def fetch_document(url: str) -> bytes:
    """What stands at `url`: 64 KiB at most, without following redirects.

    Raises OSError, httpx.HTTPError or JwksError. Jwks bounds its time.
    """
    # Reading the certificates of the system takes 20 ms, in which the loop would stand still.
    context = await asyncio.to_thread(httpx.create_ssl_context)
    headers = {"Accept": "application/jwk-set+json, application/json"}
    # identity: a small compressed answer may unpack to gigabytes.
    headers["Accept-Encoding"] = "identity"
    async with (
        httpx.AsyncClient(verify=context, follow_redirects=False) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise JwksError(f"the JWKS URL answered {response.status_code}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise JwksError("the JWKS URL answered with compressed content")
        document = bytearray()
        async for chunk in response.aiter_raw():
            document += chunk
            if len(document) > MAX_DOCUMENT_BYTES:
                raise JwksError(f"the key set is larger than {MAX_DOCUMENT_BYTES} bytes")
        return bytes(document)
