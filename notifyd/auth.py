"""Who speaks, and from which page: tokens of users, API keys of backends, origins of browsers."""

from __future__ import annotations

import base64
import hmac
import math
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from hashlib import sha256
from itertools import islice
from typing import Annotated, Any, NamedTuple, TypeVar

import jwt
import msgspec
from jwt.algorithms import Algorithm, get_default_algorithms

from notifyd import names
from notifyd.errors import (
    ConfigurationError,
    Conflict,
    Forbidden,
    TokenExpired,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from notifyd.identity import DEFAULT_TENANT, Identity, Principal
from notifyd.jwks import Fetch, Jwks, algorithm_of, public_key_of_pem
from notifyd.options import HMAC_ALGORITHMS, AuthSettings, ClaimName
from notifyd.tenants import Tenants, only_default

MAX_TOKEN_BYTES = 16384
MAX_TOKEN_TTL = 31_536_000
MAX_API_KEY_BYTES = 4096
MAX_ROLES = 100
MAX_ROLE_CHARACTERS = 128
MAX_CLAIMED_CHANNELS = 1000
MAX_REVOCATIONS = 100_000

_LAST_SECOND = 253_402_300_799
"""9999-12-31T23:59:59Z: what lies behind it is a time in milliseconds, not in seconds."""

_CLAIMS: dict[ClaimName, str] = {
    "user_id": "sub",
    "tenant": "tenant_id",
    "roles": "roles",
    "channels": "channels",
    "subscribe": "subscribe",
}

_KNOWN_ALGORITHMS = frozenset(get_default_algorithms())

T = TypeVar("T")


class _Header(msgspec.Struct):
    """The JOSE header: what is read, and what must not be there.

    `jku` and `x5u` would have keys fetched from wherever the token says. `crit` names extensions
    that must be understood (RFC 7515, section 4.1.11), and none is; `b64` is one of them (RFC
    7797). An embedded `jwk` or `x5c` is not looked at.
    """

    alg: str
    kid: Annotated[str, msgspec.Meta(max_length=256)] | msgspec.UnsetType = msgspec.UNSET
    jku: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    x5u: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    crit: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    b64: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Token(NamedTuple):
    """A token taken apart, not yet believed."""

    digest: bytes
    algorithm: str
    kid: str | None
    signed: bytes
    signature: bytes
    payload: bytes


_Claims = dict[str, msgspec.Raw]

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)").fullmatch
_HEADER = msgspec.json.Decoder(_Header)
_OBJECT = msgspec.json.Decoder(_Claims)
_TEXT = msgspec.json.Decoder(str | None)
_NUMBER = msgspec.json.Decoder(float | None)
_TEXTS = msgspec.json.Decoder(list[str] | str | None)


class TokenVerifier:
    """Verifies tokens of users (JWT, RFC 7519), remembers verified ones, revokes and mints.

    `clock` gives Unix seconds. `tenants` says which tenants a token may be of; without it there are
    none. `fetch_jwks` replaces the HTTP request for `auth.jwks_url`; it
    returns the document and raises OSError, httpx.HTTPError or jwks.JwksError.

    Every algorithm has its one kind of key: HS256, HS384 and HS512 the secrets, RS256 an RSA key,
    ES256 a P-256 key, EdDSA an Edwards key. A token is only ever tried with keys of the kind of the
    algorithm it names, so that a public key never serves as a secret (RFC 8725, section 2.1).

    Raises ConfigurationError for keys that cannot be used. Errors never contain the token.
    """

    # The compact form is taken apart here and not by PyJWT, which prepares its key anew for each
    # token (parsing it as PEM, DER and JSON: twice the time in all) and has no limits of size.
    # The algorithms and the keys are PyJWT's.

    def __init__(
        self,
        settings: AuthSettings,
        *,
        production: bool,
        clock: Callable[[], float] = time.time,
        fetch_jwks: Fetch | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        self._clock = clock
        self._tenants = tenants or only_default()
        self._leeway = settings.leeway_seconds
        self._issuer = settings.jwt_issuer
        self._audience = settings.jwt_audience
        self._claims = {
            name: _ClaimPath(settings.claims.get(name, usual)) for name, usual in _CLAIMS.items()
        }
        self._algorithms: dict[str, Algorithm] = {
            name: jwt.get_algorithm_by_name(name) for name in settings.jwt_algorithms
        }
        self._keys: dict[str, list[Any]] = {name: [] for name in settings.jwt_algorithms}
        self._signing: tuple[str, str] | None = None
        self._take_secrets(settings)
        if settings.jwt_public_key is not None:
            self._take_public_key(settings.jwt_public_key)
        self._jwks: Jwks | None = None
        if settings.jwks_url is not None:
            if production and not settings.jwks_url.startswith("https://"):
                raise ConfigurationError("auth.jwks_url: production takes keys over https only")
            self._jwks = Jwks(
                settings.jwks_url, on_withdrawn=self.flush, clock=clock, fetch=fetch_jwks
            )
        self._cache = _TokenCache(settings.token_cache_size)
        self._revocations = _Revocations()

    def _take_secrets(self, settings: AuthSettings) -> None:
        for name in settings.jwt_algorithms:
            if name not in HMAC_ALGORITHMS or not settings.jwt_secrets:
                continue
            try:
                self._keys[name] = [
                    self._algorithms[name].prepare_key(secret) for secret in settings.jwt_secrets
                ]
            except jwt.InvalidKeyError as error:
                raise ConfigurationError(
                    "auth.jwt_secret: this is a PEM, SSH or JWK key, not a secret; "
                    "make one with: openssl rand -base64 64 | tr -d '\\n'"
                ) from error
            if self._signing is None:
                self._signing = (name, settings.jwt_secrets[0])

    def _take_public_key(self, pem: str) -> None:
        key = public_key_of_pem(pem)
        algorithm = algorithm_of(key) or ""
        if algorithm not in self._keys:
            raise ConfigurationError(
                f"auth.jwt_public_key: this key is one for {algorithm}, which auth.jwt_algorithms "
                "does not name; add it there"
            )
        self._keys[algorithm] = [key]

    def verify(self, token: str) -> Identity | Awaitable[Identity]:
        """Whom `token` is about: at once, or an awaitable where its key must be fetched first.

        A token seen before costs about 1 µs, whatever its algorithm. Where a JWKS is configured,
        call this in the event loop. Cancelling the awaitable does not stop the fetch that others
        wait for too.

        Raises TokenExpired; Unauthorized for any other invalid token; Unavailable where
        the issuer's keys cannot be had.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthorized(f"The token is longer than {MAX_TOKEN_BYTES // 1024} KiB.")
        if not token.isascii():
            raise _not_a_token()
        digest = sha256(token.encode()).digest()
        identity = self._cache.get(digest)
        if identity is None:
            return self._verify_new(_taken_apart(token, digest))
        self._check_time(identity.expires_at)
        if self._revocations:
            self._revocations.check(identity)
        return identity

    def _verify_new(self, token: _Token) -> Identity | Awaitable[Identity]:
        algorithm = self._algorithms.get(token.algorithm)
        if algorithm is None:
            raise self._unaccepted(token.algorithm)
        if self._holds(token, self._keys[token.algorithm]):
            return self._believed(token)
        if self._jwks is None or token.algorithm in HMAC_ALGORITHMS:
            raise _bad_signature(token.algorithm)
        keys = self._jwks.find(token.algorithm, token.kid)
        if keys:
            self._jwks.refresh_if_old()
            return self._judged(token, keys)
        if self._jwks.may_fetch():
            return self._verify_fetched(token, self._jwks)
        raise self._unknown_key(self._jwks)

    async def _verify_fetched(self, token: _Token, jwks: Jwks) -> Identity:
        await jwks.fetched()
        # From here on nothing is awaited: what the cache gets was verified with the keys of now.
        keys = jwks.find(token.algorithm, token.kid)
        if not keys:
            raise self._unknown_key(jwks)
        return self._judged(token, keys)

    def _judged(self, token: _Token, keys: Sequence[Any]) -> Identity:
        if not self._holds(token, keys):
            raise _bad_signature(token.algorithm)
        return self._believed(token)

    def _holds(self, token: _Token, keys: Sequence[Any]) -> bool:
        verify = self._algorithms[token.algorithm].verify
        return any(verify(token.signed, key, token.signature) for key in keys)

    def _unaccepted(self, algorithm: str) -> Unauthorized:
        accepted = ", ".join(self._algorithms)
        given = f"the token says {algorithm}, and " if algorithm in _KNOWN_ALGORITHMS else ""
        return Unauthorized(
            "The token's algorithm is not accepted here.",
            hint=f"{given}auth.jwt_algorithms accepts {accepted}",
        )

    @staticmethod
    def _unknown_key(jwks: Jwks) -> Unauthorized | Unavailable:
        if jwks.failure is not None:
            return jwks.unavailable()
        return Unauthorized(
            "The token is signed with a key that its issuer does not publish.",
            hint="no key at auth.jwks_url has the token's kid and algorithm",
        )

    def _believed(self, token: _Token) -> Identity:
        """The claims of a token whose signature holds, checked and remembered."""
        try:
            claims = _OBJECT.decode(token.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Unauthorized("The token's claims are not a JSON object.") from None
        identity = self._identity(claims)
        self._check_time(identity.expires_at)
        self._check_not_before(claims)
        self._check_issuer(claims)
        self._revocations.check(identity)
        self._cache.put(token.digest, identity)
        return identity

    def _identity(self, claims: _Claims) -> Identity:
        paths, shared = self._claims, self._cache.shared
        path = paths["user_id"]
        user_id = _text(path.find(claims), path.name)
        if user_id is None:
            raise Unauthorized(f"The token has no {path.name} claim, which names the user.")
        expires_at = _seconds(claims.get("exp"), "exp")
        if expires_at is None:
            raise Unauthorized("The token has no exp claim, which says when it expires.")
        path = paths["tenant"]
        tenant = self._tenants.of_claim(_text(path.find(claims), path.name), path.name)
        return Identity(
            user_id=_named(names.user_id, user_id, paths["user_id"].name),
            # The cache holds thousands of tokens of a tenant: one text for all of them.
            tenant=sys.intern(tenant),
            roles=shared(_roles(paths["roles"], claims)),
            channels=_channels(paths["channels"], claims, shared),
            subscribe=shared(_subscribe(paths["subscribe"], claims)),
            expires_at=expires_at,
            issued_at=_number(claims.get("iat"), "iat"),
        )

    def _check_time(self, expires_at: float | None) -> None:
        late = self._clock() - expires_at if expires_at is not None else -math.inf
        if late >= self._leeway:
            raise TokenExpired(
                "The token has expired.", hint=f"the token expired {math.floor(late)} s ago"
            )

    def _check_not_before(self, claims: _Claims) -> None:
        not_before = _seconds(claims.get("nbf"), "nbf")
        early = not_before - self._clock() if not_before is not None else 0
        if early > self._leeway:
            raise Unauthorized(
                "The token is not valid yet.",
                hint=f"the token's nbf is {math.ceil(early)} s ahead of this server's clock",
            )

    def _check_issuer(self, claims: _Claims) -> None:
        if self._issuer is not None:
            issuer = _decoded(_TEXT, claims.get("iss"), "iss", "text")
            if issuer != self._issuer:
                raise Unauthorized(
                    "The token is from another issuer.",
                    hint=f'the iss claim must be "{self._issuer}" (auth.jwt_issuer)',
                )
        if self._audience is not None:
            audience = _decoded(_TEXTS, claims.get("aud"), "aud", "text or a list of texts")
            if self._audience not in ([audience] if isinstance(audience, str) else audience or ()):
                raise Unauthorized(
                    "The token is for another audience.",
                    hint=f'the aud claim must name "{self._audience}" (auth.jwt_audience)',
                )

    def revoke(self, tenant: str, user_id: str, at: float) -> None:
        """Refuse the user's tokens with an `iat` up to `at` (Unix seconds), or with none.

        It holds while this process lives and is never forgotten: how long a token may still live is
        not known, as there is no bound for `exp`. Beyond 100,000 users the oldest tenth of the
        tenant with the most is merged into one time for all of that tenant: then its tokens with an
        `iat` up to that time, or with none, are refused. That asks some users for a new token, and
        lets no revoked one in.
        """
        self._revocations.add(tenant, user_id, at)

    def revoke_all(self, tenant: str, at: float) -> None:
        """`revoke` for all users of a tenant."""
        self._revocations.add_all(tenant, at)

    def revocations(self) -> list[tuple[str, str, float]]:
        """What is revoked: tenant, user and time of each, and no user where it is all of them."""
        return self._revocations.all()

    def flush(self) -> None:
        """Forget the verified tokens, so that each must pass the keys of now once more."""
        self._cache.clear()

    async def prefetch(self) -> str | None:
        """Fetch the JWKS, if one is configured, before the first token asks for it.

        Returns why that failed, as a clause to log: tokens are answered with Unavailable until a
        later fetch succeeds. Raises Unavailable when closed meanwhile.
        """
        if self._jwks is None:
            return None
        await self._jwks.fetched()
        return self._jwks.failure

    async def aclose(self) -> None:
        """Stop a fetch that is under way; who waits for it gets Unavailable."""
        if self._jwks is not None:
            await self._jwks.aclose()

    def mint(
        self,
        user_id: str,
        *,
        ttl: int,
        roles: Sequence[str] = (),
        channels: Sequence[str] | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[str, float]:
        """A new token of `user_id` for `ttl` seconds, and its `exp` in Unix seconds.

        Signed with the newest secret and the first HS algorithm; it has what `auth.claims`,
        `jwt_issuer` and `jwt_audience` ask for, so that this server accepts it. `channels` are
        names or patterns; None leaves the claim out.

        Raises ValidationError, or Conflict if there is no secret to sign with.
        """
        if self._signing is None:
            raise Conflict(
                "This server has no secret to sign tokens with; they come from your issuer.",
                hint="set auth.jwt_secret and have HS256 in auth.jwt_algorithms",
            )
        if type(ttl) is not int or not 1 <= ttl <= MAX_TOKEN_TTL:
            raise _invalid("ttl", f"a whole number of seconds from 1 to {MAX_TOKEN_TTL:,}")
        self._tenants.named(tenant)
        now = self._clock()
        expires_at = math.ceil(now) + ttl
        # `iat` with its fraction: with whole seconds, a token minted in the second of a revocation
        # would be refused along with those it replaces.
        claims: dict[str, Any] = {"exp": expires_at, "iat": now}
        self._claims["user_id"].put(claims, names.user_id(user_id))
        if tenant != DEFAULT_TENANT:
            self._claims["tenant"].put(claims, tenant)
        if roles:
            _check_count(roles, "roles", MAX_ROLES)
            self._claims["roles"].put(claims, [_role(role) for role in roles])
        if channels is not None:
            _check_count(channels, "channels", MAX_CLAIMED_CHANNELS)
            self._claims["channels"].put(
                claims, [names.channel_pattern(channel) for channel in channels]
            )
        if self._issuer is not None:
            claims["iss"] = self._issuer
        if self._audience is not None:
            claims["aud"] = self._audience
        algorithm, secret = self._signing
        token = jwt.encode(claims, secret, algorithm=algorithm)
        if len(token) > MAX_TOKEN_BYTES:
            raise _invalid("channels", f"such that the token is at most {MAX_TOKEN_BYTES} bytes")
        return token, float(expires_at)


class _ClaimPath:
    """Where a claim stands: a name, or names with dots between them that lead into objects."""

    __slots__ = ("_inner", "_steps", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        *self._steps, self._inner = name.split(".")

    def find(self, claims: _Claims) -> msgspec.Raw | None:
        """The claim as it was written. A claim whose very name has dots, as a URL has, wins."""
        whole = claims.get(self.name)
        if whole is not None or not self._steps:
            return whole
        for step in self._steps:
            inner = claims.get(step)
            if inner is None:
                return None
            try:
                claims = _OBJECT.decode(inner)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
        return claims.get(self._inner)

    def put(self, claims: dict[str, Any], value: object) -> None:
        """Write the claim where `find` finds it."""
        for step in self._steps:
            claims = claims.setdefault(step, {})
        claims[self._inner] = value


class _TokenCache:
    """Verified tokens by the SHA-256 of their text; the token itself is not kept.

    Least recently used, nearly: entries live in a recent and an older half, a hit in the older one
    moves to the recent one, and a full recent half becomes the older one. So a hit costs no
    bookkeeping, and nothing is ever searched for what to drop. A token with many roles or channels
    takes the room of several.
    """

    __slots__ = ("_half", "_older", "_recent", "_shared", "_weight")

    def __init__(self, size: int) -> None:
        self._half = size // 2
        self._recent: dict[bytes, Identity] = {}
        self._older: dict[bytes, Identity] = {}
        self._weight = 0
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}

    def get(self, digest: bytes) -> Identity | None:
        identity = self._recent.get(digest)
        if identity is None:
            identity = self._older.get(digest)
            if identity is not None:
                self.put(digest, identity)
        return identity

    def put(self, digest: bytes, identity: Identity) -> None:
        claimed = len(identity.roles) + len(identity.channels or ()) + len(identity.subscribe)
        weight = 1 + claimed // 8
        if weight > self._half:
            return
        if self._weight + weight > self._half:
            self._older, self._recent, self._weight = self._recent, {}, 0
        self._recent[digest] = identity
        self._weight += weight

    def shared(self, claimed: tuple[str, ...]) -> tuple[str, ...]:
        """One tuple for all tokens that claim the same: most users have the same few roles."""
        if len(claimed) > 16:
            return claimed
        if len(self._shared) >= 1024:
            self._shared.clear()
        return self._shared.setdefault(claimed, claimed)

    def clear(self) -> None:
        self._recent, self._older, self._weight = {}, {}, 0
        self._shared.clear()


class _Revocations:
    """One time per user; see TokenVerifier.revoke for what becomes of the oldest."""

    __slots__ = ("_count", "_floors", "_tenants")

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, float]] = {}
        self._floors: dict[str, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return bool(self._count or self._floors)

    def add(self, tenant: str, user_id: str, at: float) -> None:
        times = self._tenants.setdefault(tenant, {})
        self._count += user_id not in times
        # Taken out first, so that the dict stays in the order of the last revocation.
        times[user_id] = max(at, times.pop(user_id, at))
        if self._count > MAX_REVOCATIONS:
            # Whoever has the most pays for it: another tenant's tokens must not end by that.
            self._merge(max(self._tenants, key=lambda name: len(self._tenants[name])))

    def add_all(self, tenant: str, at: float) -> None:
        self._floors[tenant] = max(at, self._floors.get(tenant, at))

    def _merge(self, tenant: str) -> None:
        times = self._tenants[tenant]
        floor = -math.inf
        for oldest in list(islice(times, max(1, len(times) // 10))):
            floor = max(floor, times.pop(oldest))
            self._count -= 1
        self.add_all(tenant, floor)

    def all(self) -> list[tuple[str, str, float]]:
        floors = [(tenant, "", at) for tenant, at in self._floors.items()]
        users = [
            (tenant, user_id, at)
            for tenant, times in self._tenants.items()
            for user_id, at in times.items()
        ]
        return floors + users

    def check(self, identity: Identity) -> None:
        """Raises Unauthorized for a revoked token."""
        at = max(
            self._tenants.get(identity.tenant, {}).get(identity.user_id, -math.inf),
            self._floors.get(identity.tenant, -math.inf),
        )
        issued_at = -math.inf if identity.issued_at is None else identity.issued_at
        if at > -math.inf and issued_at <= at:
            raise Unauthorized("The token was revoked.")


def _taken_apart(token: str, digest: bytes) -> _Token:
    parts = _COMPACT(token)
    if parts is None:
        raise _not_a_token()
    header_text, payload_text, signature_text = parts.groups()
    try:
        header = _HEADER.decode(_base64url(header_text))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _not_a_token() from None
    for name in ("jku", "x5u", "crit", "b64"):
        if getattr(header, name) is not msgspec.UNSET:
            raise Unauthorized(f"A token with {name} in its header is not accepted.")
    return _Token(
        digest=digest,
        algorithm=header.alg,
        kid=None if header.kid is msgspec.UNSET else header.kid,
        signed=token[: parts.end(2)].encode(),
        signature=_base64url(signature_text),
        payload=_base64url(payload_text),
    )


def _base64url(text: str) -> bytes:
    """RFC 7515, section 2: no padding. Only the one canonical spelling is taken.

    Otherwise the unused bits at the end would give one token several texts, each of which verifies
    and takes a place in the cache.
    """
    if len(text) % 4 == 1:
        raise _not_a_token()
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != text.encode():
        raise _not_a_token()
    return decoded


def _not_a_token() -> Unauthorized:
    return Unauthorized("The token is not a JWT: three parts of base64url with dots between them.")


def _bad_signature(algorithm: str) -> Unauthorized:
    return Unauthorized(
        "The token's signature is invalid.",
        hint="it was signed with a secret other than auth.jwt_secret"
        if algorithm in HMAC_ALGORITHMS
        else "it was signed with a key other than the configured one",
    )


def _refused(claim: str, rule: str) -> Unauthorized:
    return Unauthorized(f"The token's {claim} claim must be {rule}.")


def _invalid(field: str, constraint: str) -> ValidationError:
    return ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)


def _decoded(
    decoder: msgspec.json.Decoder[T], raw: msgspec.Raw | None, claim: str, rule: str
) -> T | None:
    """The claim's value, None where it is absent or null. Raises Unauthorized."""
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _refused(claim, rule) from None


def _text(raw: msgspec.Raw | None, claim: str) -> str | None:
    """Text, or a number as the text it was written with."""
    if raw is not None and (written := bytes(raw))[:1] in b"-0123456789":
        return written.decode()
    return _decoded(_TEXT, raw, claim, "text or a number")


def _number(raw: msgspec.Raw | None, claim: str) -> float | None:
    return _decoded(_NUMBER, raw, claim, "a number of seconds since 1970")


def _seconds(raw: msgspec.Raw | None, claim: str) -> float | None:
    """A time that decides something, so that one in milliseconds must not pass for seconds."""
    number = _number(raw, claim)
    if number is not None and abs(number) > _LAST_SECOND:
        raise _refused(claim, "a number of seconds since 1970, not of milliseconds")
    return number


def _named(check: Callable[[str, str], str], text: str, claim: str) -> str:
    try:
        return check(text, claim)
    except ValidationError as error:
        raise _refused(claim, error.constraint or "valid") from None


def _texts(path: _ClaimPath, claims: _Claims, most: int) -> list[str] | None:
    """A list of texts, or one; None where the claim is absent or null."""
    rule = f"text or a list of at most {most} texts"
    texts = _decoded(_TEXTS, path.find(claims), path.name, rule)
    if isinstance(texts, str):
        return [texts]
    if texts is not None and len(texts) > most:
        raise _refused(path.name, rule)
    return texts


def _roles(path: _ClaimPath, claims: _Claims) -> tuple[str, ...]:
    roles = _texts(path, claims, MAX_ROLES) or []
    return _distinct(_named(_role, role, path.name) for role in roles)


def _channels(
    path: _ClaimPath, claims: _Claims, shared: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> tuple[str, ...] | None:
    channels = _texts(path, claims, MAX_CLAIMED_CHANNELS)
    if channels is None:
        if path.find(claims) is None:
            return None
        # The claim restricts; an issuer that writes null where it has nothing to grant must not
        # thereby lift the restriction.
        raise _refused(path.name, "a list, or absent; null is neither")
    return shared(_distinct(_named(names.channel_pattern, entry, path.name) for entry in channels))


def _subscribe(path: _ClaimPath, claims: _Claims) -> tuple[str, ...]:
    channels = _texts(path, claims, MAX_CLAIMED_CHANNELS) or []
    return _distinct(_named(names.channel_name, entry, path.name) for entry in channels)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _role(text: str, field: str = "roles") -> str:
    if not 1 <= len(text) <= MAX_ROLE_CHARACTERS or not text.isprintable():
        raise _invalid(field, f"of roles of 1 to {MAX_ROLE_CHARACTERS} printable characters")
    return text


def _check_count(texts: Sequence[str], field: str, most: int) -> None:
    if len(texts) > most:
        raise _invalid(field, f"at most {most}")


class ApiKeys:
    """The API keys of the settings, by their SHA-256.

    Keys are random and long, so that their digest is safe to keep and to look up by: what a lookup
    takes depends on the digest of a guess, which tells nothing about a key.
    """

    __slots__ = ("_clock", "_keys")

    def __init__(self, settings: AuthSettings, *, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigurationError where two entries are the same key."""
        self._clock = clock
        self._keys: dict[bytes, tuple[bytes, Principal]] = {}
        for entry in settings.api_keys:
            if entry.key is not None:
                digest = sha256(entry.key.encode()).digest()
            else:
                digest = bytes.fromhex(entry.sha256 or "")
            if digest in self._keys:
                taken = self._keys[digest][1].name
                raise ConfigurationError(
                    f'auth.api_keys: "{entry.name}" is the same key as "{taken}"; keys are unique'
                )
            principal = Principal(
                name=entry.name,
                scopes=frozenset(entry.scopes),
                tenant=entry.tenant_id,
                expires_at=None if entry.expires_at is None else entry.expires_at.timestamp(),
            )
            self._keys[digest] = (digest, principal)

    def authenticate(self, key: bytes) -> Principal:
        """Whose `key` it is; takes about 1 µs. Raises Unauthorized."""
        if len(key) <= MAX_API_KEY_BYTES:
            digest = sha256(key).digest()
            known = self._keys.get(digest)
            if known is not None and hmac.compare_digest(known[0], digest):
                principal = known[1]
                if principal.expires_at is not None and self._clock() >= principal.expires_at:
                    late = math.floor(self._clock() - principal.expires_at)
                    raise Unauthorized(
                        "The API key has expired.",
                        hint=f'the API key "{principal.name}" expired {late} s ago',
                    )
                return principal
        raise Unauthorized("The API key is not known here.")


_LOOPBACK = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?").fullmatch


class Origins:
    """From which pages browsers may come (the Origin header, RFC 6454).

    `origins` are those of `cors.origins`, exactly as browsers send them; `*` stands for any in
    development and for nothing in production, where the settings refuse it.
    """

    __slots__ = ("_any", "_development", "_origins")

    def __init__(self, origins: Sequence[str], *, development: bool) -> None:
        self._any = development and "*" in origins
        self._development = development
        # RFC 6454, section 7.3: `null` is what any sandboxed page or local file sends.
        self._origins = frozenset(origins) - {"*", "null"}

    def allows(self, origin: str | None) -> bool:
        """Whether a request with this Origin header, or with none (not a browser), may come in."""
        if origin is None or origin in self._origins:
            return True
        if origin == "null" or not self._development:
            return False
        return self._any or _LOOPBACK(origin) is not None

    def require(self, origin: bytes | None) -> None:
        """Raise Forbidden where a page of this origin, as its header has it, may not call."""
        text = None if origin is None else origin.decode("latin-1")
        if not self.allows(text):
            hint = f'add "{text}" to cors.origins'
            raise Forbidden("Pages of this origin may not call.", hint=hint)
