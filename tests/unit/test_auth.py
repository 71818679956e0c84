"""Tokens, API keys and origins."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from notifyd import auth
from notifyd.auth import ApiKeys, Origins, TokenVerifier
from notifyd.errors import (
    ConfigurationError,
    Conflict,
    TokenExpired,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from notifyd.identity import Identity
from notifyd.options import ApiKeySettings, AuthSettings
from tests.unit.test_jwks import document, jwk

SECRET = "s" * 64
OLD_SECRET = "o" * 64
NOW = 1_800_000_000.0

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def pem_of(key: Any) -> str:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return str(public.decode())


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def settings(**options: Any) -> AuthSettings:
    return AuthSettings(**{"jwt_secret": SECRET, **options})


def verifier(clock: Clock | None = None, **options: Any) -> TokenVerifier:
    return TokenVerifier(settings(**options), production=True, clock=clock or Clock())


def asymmetric(key: Any, algorithm: str, **options: Any) -> TokenVerifier:
    return verifier(
        jwt_secret=None, jwt_algorithms=(algorithm,), jwt_public_key=pem_of(key), **options
    )


def signed(
    claims: Mapping[str, object] | None = None,
    key: Any = SECRET,
    algorithm: str = "HS256",
    headers: dict[str, Any] | None = None,
    **more: object,
) -> str:
    everything = {"sub": "u1", "exp": NOW + 600, **(claims or {}), **more}
    return jwt.encode(everything, key, algorithm=algorithm, headers=headers)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: bytes, payload: bytes, secret: bytes = SECRET.encode()) -> str:
    """A token of exactly these bytes, rightly signed."""
    text = f"{b64(header)}.{b64(payload)}"
    return f"{text}.{b64(hmac.digest(secret, text.encode(), 'sha256'))}"


def now(result: Identity | Awaitable[Identity]) -> Identity:
    assert isinstance(result, Identity)
    return result


def refusal(verifier: TokenVerifier, token: str) -> Unauthorized:
    with pytest.raises(Unauthorized) as refused:
        now(verifier.verify(token))
    error = refused.value
    for part in token.split("."):
        assert len(part) < 8 or part not in f"{error.message} {error.hint}"
    return error


# What a token says


def test_the_claims_of_a_token() -> None:
    identity = now(
        verifier().verify(
            signed(
                nbf=NOW - 1,
                iat=NOW - 5,
                iss="anybody",
                aud="anything",
                tenant_id="default",
                roles=["admin", "staff", "admin"],
                channels=["orders", "order:*"],
                subscribe=["orders", "news"],
            )
        )
    )
    assert identity == Identity(
        "u1",
        roles=("admin", "staff"),
        channels=("orders", "order:*"),
        subscribe=("orders", "news"),
        expires_at=NOW + 600,
        issued_at=NOW - 5,
    )


def test_the_least_a_token_says() -> None:
    assert now(verifier().verify(signed())) == Identity("u1", expires_at=NOW + 600)
    assert now(verifier().verify(signed(roles="admin", channels="o*", subscribe="news"))) == (
        Identity("u1", "default", ("admin",), ("o*",), ("news",), NOW + 600)
    )
    absent = signed(iat=None, nbf=None, roles=None, subscribe=None, tenant_id=None)
    assert now(verifier().verify(absent)) == Identity("u1", expires_at=NOW + 600)


@pytest.mark.parametrize("written", ["42", "0", "-7", "123456789012345678901234567890", "4.20"])
def test_a_number_as_subject_is_taken_as_its_text(written: str) -> None:
    payload = f'{{"sub":{written},"exp":{NOW + 1}}}'
    token = by_hand(b'{"alg":"HS256"}', payload.encode())
    assert now(verifier().verify(token)).user_id == written


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"sub": None}, "no sub claim"),
        ({"sub": ""}, "sub claim must be 1 to 256 printable characters"),
        ({"sub": "x" * 257}, "sub claim must be"),
        ({"sub": "a\nb"}, "sub claim must be"),
        ({"sub": "a\0"}, "sub claim must be"),
        ({"sub": True}, "text or a number"),
        ({"sub": ["u1"]}, "text or a number"),
        ({"exp": None}, "no exp claim"),
        ({"exp": "1900000000"}, "exp claim must be a number"),
        ({"exp": True}, "exp claim must be a number"),
        ({"exp": NOW * 1000}, "not of milliseconds"),
        ({"nbf": "soon"}, "nbf claim"),
        ({"iat": "yesterday"}, "iat claim"),
        ({"tenant_id": "acme"}, "of a tenant"),
        ({"tenant_id": 7}, "of a tenant"),
        ({"tenant_id": ["default"]}, "tenant_id claim"),
        ({"roles": {"admin": True}}, "roles claim"),
        ({"roles": ["a", 1]}, "roles claim"),
        ({"roles": [""]}, "roles claim"),
        ({"roles": ["x" * 129]}, "roles claim"),
        ({"roles": [str(number) for number in range(101)]}, "at most 100"),
        ({"channels": None}, "channels claim must be a list"),
        ({"channels": ["a b"]}, "channels claim"),
        ({"channels": {"a": 1}}, "channels claim"),
        ({"channels": [str(number) for number in range(1001)]}, "at most 1000"),
        ({"subscribe": ["order:*"]}, "subscribe claim"),
        ({"subscribe": [None]}, "subscribe claim"),
    ],
)
def test_claims_that_are_refused(claims: dict[str, object], words: str) -> None:
    assert words in refusal(verifier(), signed(claims)).message


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b'"u1"',
        b'{"sub":"u1"',
        b'{"sub":"u1","exp":1e400}',
        b'{"sub":"u1","exp":NaN}',
        b'{"sub":"u\xff","exp":1900000000}',
        b'{"sub":"\\ud800","exp":1900000000}',
        b'{"sub":"u1","exp":1900000000,"x":' + b"[" * 6000 + b"]" * 6000 + b"}",
        b'{"sub":"u1","exp":1900000000,"roles":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_claims_that_are_no_json_object(payload: bytes) -> None:
    refusal(verifier(), by_hand(b'{"alg":"HS256"}', payload))


def test_an_empty_channels_claim_grants_nothing() -> None:
    assert now(verifier().verify(signed(channels=[]))).channels == ()


def test_claims_under_other_names() -> None:
    mapped = verifier(
        claims={
            "user_id": "uid",
            "tenant": "app_metadata.org_id",
            "roles": "app_metadata.auth.roles",
            "channels": "https://example.com/channels",
        }
    )
    token = signed(
        {
            "uid": 7,
            "app_metadata": {"org_id": "default", "auth": {"roles": ["admin"]}},
            "https://example.com/channels": ["orders"],
            "roles": ["ignored"],
        }
    )
    assert now(mapped.verify(token)) == Identity(
        "7", roles=("admin",), channels=("orders",), expires_at=NOW + 600
    )
    assert "app_metadata.org_id" in (
        refusal(mapped, signed(uid="u", app_metadata={"org_id": "acme"})).hint or ""
    )
    assert now(mapped.verify(signed(uid="u", app_metadata="text"))).roles == ()
    assert "uid claim" in refusal(mapped, signed(sub="u1")).message


def test_issuer_and_audience_where_configured() -> None:
    strict = verifier(jwt_issuer="https://issuer.test/", jwt_audience="notifyd")
    right = {"iss": "https://issuer.test/", "aud": "notifyd"}
    now(strict.verify(signed(right)))
    now(strict.verify(signed(right, aud=["other", "notifyd"])))
    issuers: list[object] = ["https://issuer.test", None, ["https://issuer.test/"]]
    for issuer in issuers:
        assert "iss" in words_of(refusal(strict, by_json({**right, "iss": issuer})))
    audiences: list[object] = ["other", None, [], {"notifyd": 1}]
    for audience in audiences:
        assert "aud" in words_of(refusal(strict, by_json({**right, "aud": audience})))


def by_json(claims: Mapping[str, object]) -> str:
    """Signed by hand, as PyJWT refuses to write some wrong claims."""
    everything = {"sub": "u1", "exp": NOW + 600, **claims}
    return by_hand(b'{"alg":"HS256"}', json.dumps(everything).encode())


def words_of(error: Unauthorized) -> str:
    return f"{error.message} {error.hint}"


# Time


def test_expiry_with_leeway() -> None:
    clock = Clock()
    token = signed(exp=NOW)
    for size in (50_000, 0):
        clock.now = NOW
        checked = verifier(clock, token_cache_size=size)
        now(checked.verify(token))
        clock.now = NOW + 29.9
        now(checked.verify(token))
        clock.now = NOW + 42.5
        with pytest.raises(TokenExpired) as expired:
            now(checked.verify(token))
        assert expired.value.message == "The token has expired."
        assert expired.value.hint == "the token expired 42 s ago"


def test_not_before_with_leeway() -> None:
    now(verifier().verify(signed(nbf=NOW + 30)))
    error = refusal(verifier(), signed(nbf=NOW + 31))
    assert error.message == "The token is not valid yet."
    assert "31 s ahead" in (error.hint or "")


def test_issued_at_is_no_validity_check() -> None:
    assert now(verifier().verify(signed(iat=NOW + 1e6))).issued_at == NOW + 1e6


# Keys and algorithms


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_secrets_newest_and_older(algorithm: str) -> None:
    both = verifier(jwt_secret=None, jwt_secrets=(SECRET, OLD_SECRET), jwt_algorithms=(algorithm,))
    now(both.verify(signed(key=SECRET, algorithm=algorithm)))
    now(both.verify(signed(key=OLD_SECRET, algorithm=algorithm)))
    error = refusal(both, signed(key="x" * 64, algorithm=algorithm))
    assert error.message == "The token's signature is invalid."


@pytest.mark.parametrize(
    ("key", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA")]
)
def test_public_keys(key: Any, algorithm: str) -> None:
    checked = asymmetric(key, algorithm)
    assert now(checked.verify(signed(key=key, algorithm=algorithm))).user_id == "u1"
    others = {
        "RS256": rsa.generate_private_key(65537, 2048),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, other in others.items():
        refusal(checked, signed(key=other, algorithm=name))


def test_secrets_and_a_public_key_together() -> None:
    both = verifier(jwt_algorithms=("HS256", "RS256"), jwt_public_key=pem_of(RSA_KEY))
    now(both.verify(signed()))
    now(both.verify(signed(key=RSA_KEY, algorithm="RS256")))
    # The public key as a secret, in all the forms an attacker may have it in.
    for form in (
        pem_of(RSA_KEY).encode(),
        pem_of(RSA_KEY).strip().encode(),
        RSA_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        b"",
        b"\0",
    ):
        payload = json.dumps({"sub": "admin", "exp": NOW + 600}).encode()
        refusal(both, by_hand(b'{"alg":"HS256"}', payload, form))


@pytest.mark.parametrize(
    "algorithm",
    [
        "none",
        "None",
        "NONE",
        "nOnE",
        "",
        "hs256",
        "HS384",
        "HS512",
        "RS256",
        "PS256",
        "ES256K",
        "x",
    ],
)
def test_algorithms_that_are_not_configured(algorithm: str) -> None:
    payload = json.dumps({"sub": "u1", "exp": NOW + 600}).encode()
    header = json.dumps({"alg": algorithm}).encode()
    error = refusal(verifier(), by_hand(header, payload))
    assert error.message == "The token's algorithm is not accepted here."
    assert "HS256" in (error.hint or "")
    refusal(verifier(), f"{b64(header)}.{b64(payload)}.")
    # Nor does an algorithm without any key accept anything.
    keyless = verifier(jwt_secret=None, jwt_algorithms=("HS256", "ES256"))
    refusal(keyless, by_hand(b'{"alg":"HS256"}', payload, b""))


@pytest.mark.parametrize(
    "header",
    [
        {"jku": "https://evil.test/jwks.json"},
        {"x5u": "https://evil.test/cert.pem"},
        {"jku": None},
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False},
    ],
)
def test_headers_that_are_refused(header: dict[str, object]) -> None:
    payload = json.dumps({"sub": "u1", "exp": NOW + 600}).encode()
    token = by_hand(json.dumps({"alg": "HS256", **header}).encode(), payload)
    assert next(iter(header)) in refusal(verifier(), token).message


def test_an_embedded_key_is_not_looked_at() -> None:
    mine = rsa.generate_private_key(65537, 2048)
    headers = {"jwk": jwk(mine.public_key()), "kid": "mine"}
    token = signed(key=mine, algorithm="RS256", headers=headers)
    refusal(asymmetric(RSA_KEY, "RS256"), token)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"jwt_secret": pem_of(RSA_KEY)}, "auth.jwt_secret"),
        ({"jwt_secret": '{"kty":"oct","k":"c2VjcmV0"}'}, "auth.jwt_secret"),
        ({"jwt_public_key": pem_of(RSA_KEY)}, "RS256"),
        ({"jwt_public_key": pem_of(EC_KEY), "jwt_algorithms": ("RS256",)}, "ES256"),
        ({"jwt_public_key": "-----BEGIN PUBLIC KEY-----", "jwt_algorithms": ("RS256",)}, "PEM"),
        ({"jwks_url": "http://issuer.test/"}, "https"),
    ],
)
def test_keys_that_stop_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        verifier(**options)


# Bytes from strangers


def test_a_token_is_at_most_16_kib() -> None:
    error = refusal(verifier(), "x" * 16385)
    assert error.message == "The token is longer than 16 KiB."
    long = signed(padding="x" * 11_000)
    assert 14_000 < len(long) <= 16_384
    now(verifier().verify(long))


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "a.b", "a.b.c", "a.b.c.d.e", "Bearer x", "é.é.é", "\ud800", "a.b.c\n", "\0"],
)
def test_what_is_no_token(token: str) -> None:
    assert refusal(verifier(), token).message.startswith("The token is not a JWT")


def variations(token: str) -> list[str]:
    header, payload, signature = token.split(".")
    # The last character of a SHA-256 signature has two unused bits.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet[alphabet.index(signature[-1]) ^ 1]
    return [
        f"{header}.{payload}.{signature[:-1]}{last}",
        f"{token}=",
        f"{token}==",
        f" {token}",
        f"{token} ",
        f"{token}\n",
        f"{token}.",
        f"{header}=.{payload}.{signature}",
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}..{signature}",
        f"{payload}.{header}.{signature}",
        token.replace("_", "/").replace("-", "+") + "+",
    ]


def test_a_token_has_one_spelling() -> None:
    checked = verifier()
    token = signed()
    now(checked.verify(token))
    for variation in variations(token):
        refusal(checked, variation)


@given(st.text(max_size=200))
def test_any_text_is_refused(text: str) -> None:
    refusal(verifier(), text)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_any_three_parts_are_refused(header: bytes, payload: bytes, signature: bytes) -> None:
    refusal(verifier(), f"{b64(header)}.{b64(payload)}.{b64(signature)}")


@given(st.data())
def test_any_change_is_refused(data: st.DataObject) -> None:
    token = signed(roles=["admin"])
    at = data.draw(st.integers(0, len(token) - 1))
    if data.draw(st.booleans()):
        changed = token[:at]
    else:
        character = data.draw(st.characters().filter(lambda character: character != token[at]))
        changed = token[:at] + character + token[at + 1 :]
    refusal(verifier(), changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
CLAIM_NAMES = ["sub", "exp", "nbf", "iat", "tenant_id", "roles", "channels", "subscribe"]


@given(st.dictionaries(st.sampled_from(CLAIM_NAMES), JSON))
def test_any_claims_give_an_identity_or_a_refusal(claims: dict[str, Any]) -> None:
    claims.setdefault("sub", "u1")
    payload = json.dumps({"exp": NOW + 600, **claims}).encode("utf-8", "surrogatepass")
    try:
        identity = now(verifier().verify(by_hand(b'{"alg":"HS256"}', payload)))
    except Unauthorized:
        return
    assert 1 <= len(identity.user_id) <= 256
    assert identity.tenant == "default"
    assert identity.expires_at is not None


@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "jku", "crit", "b64"]), JSON))
def test_what_we_accept_pyjwt_accepts(header: dict[str, Any]) -> None:
    header.setdefault("alg", "HS256")
    payload = json.dumps({"sub": "u1", "exp": 4_000_000_000}).encode()
    token = by_hand(json.dumps(header).encode(), payload)
    try:
        now(verifier().verify(token))
    except Unauthorized:
        return
    assert jwt.decode(token, SECRET, algorithms=["HS256"])["sub"] == "u1"


# Verified tokens remembered


class CountingVerifier(TokenVerifier):
    """Counts the signatures that are computed."""

    verified = 0

    def _holds(self, token: Any, keys: Any) -> bool:
        self.verified += 1
        return super()._holds(token, keys)


def counting(clock: Clock | None = None, **options: Any) -> CountingVerifier:
    return CountingVerifier(settings(**options), production=True, clock=clock or Clock())


def test_a_signature_is_computed_once() -> None:
    checked = counting()
    token = signed()
    first = now(checked.verify(token))
    assert now(checked.verify(token)) is first
    assert checked.verified == 1
    checked.flush()
    assert now(checked.verify(token)) == first
    assert checked.verified == 2


def test_a_refused_token_is_not_remembered() -> None:
    checked = counting()
    token = signed(key="x" * 64)
    for _ in range(3):
        refusal(checked, token)
    assert checked.verified == 3
    assert not checked._cache._recent


def test_no_cache() -> None:
    checked = counting(token_cache_size=0)
    for _ in range(3):
        now(checked.verify(signed()))
    assert checked.verified == 3


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    checked = counting(token_cache_size=20)
    kept = signed(sub="kept")
    for number in range(100):
        now(checked.verify(kept))
        now(checked.verify(signed(sub=str(number))))
    assert checked.verified == 101
    assert len(checked._cache._recent) + len(checked._cache._older) <= 20
    heavy = signed(sub="heavy", channels=[f"c{number}" for number in range(70)])
    now(checked.verify(heavy))
    assert len(checked._cache._recent) <= 10
    larger = signed(sub="larger", channels=[f"c{number}" for number in range(90)])
    for _ in range(2):
        now(checked.verify(larger))
    assert checked.verified == 104


def test_equal_roles_are_kept_once() -> None:
    checked = verifier()
    first = now(checked.verify(signed(sub="a", roles=["admin", "staff"])))
    second = now(checked.verify(signed(sub="b", roles=["admin", "staff"])))
    assert first.roles is second.roles
    for number in range(3000):
        now(checked.verify(signed(sub="c", roles=[str(number)])))
    assert len(checked._cache._shared) <= 1024


# Revocation


@pytest.mark.parametrize("size", [0, 50_000])
def test_revocation(size: int) -> None:
    checked = verifier(token_cache_size=size)
    old, undated, new = signed(iat=NOW - 10), signed(), signed(iat=NOW + 1)
    for token in (old, undated, new):
        now(checked.verify(token))
    checked.revoke("default", "u1", NOW)
    for token in (old, undated, signed(iat=NOW)):
        error = refusal(checked, token)
        assert error.message == "The token was revoked."
        assert not isinstance(error, TokenExpired)
    now(checked.verify(new))
    now(checked.verify(signed(sub="u2", iat=NOW - 10)))
    checked.revoke("acme", "u2", NOW)
    now(checked.verify(signed(sub="u2", iat=NOW - 10)))


def test_of_a_whole_tenant_where_no_user_was_revoked() -> None:
    checker = verifier(jwt_secret=SECRET)
    token = signed(iat=NOW)
    assert now(checker.verify(token)).user_id == "u1"
    checker.revoke_all("default", NOW)
    assert refusal(checker, token).message == "The token was revoked."


def test_an_earlier_revocation_does_not_lift_a_later_one() -> None:
    checked = verifier()
    checked.revoke("default", "u1", NOW)
    checked.revoke("default", "u1", NOW - 100)
    refusal(checked, signed(iat=NOW - 50))


def test_a_token_minted_after_a_revocation_is_good() -> None:
    clock = Clock()
    checked = verifier(clock)
    clock.now = NOW + 0.25
    checked.revoke("default", "u1", clock.now)
    clock.now = NOW + 0.5
    now(checked.verify(checked.mint("u1", ttl=60)[0]))


def test_revocations_are_bounded_and_none_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_REVOCATIONS", 100)
    checked = verifier()
    for number in range(101):
        checked.revoke("default", f"u{number}", NOW + number)
    assert len(checked._revocations) == 91
    for number in range(101):
        refusal(checked, signed(sub=f"u{number}", iat=NOW + number))
        if number > 9:
            now(checked.verify(signed(sub=f"u{number}", iat=NOW + number + 1)))
    # What was merged holds for everybody, up to its time and no further.
    refusal(checked, signed(sub="somebody", iat=NOW + 9))
    now(checked.verify(signed(sub="somebody", iat=NOW + 10)))


# Minting


def test_minted_tokens_verify_here_and_elsewhere() -> None:
    checked = verifier(
        jwt_secret=None,
        jwt_secrets=(SECRET, OLD_SECRET),
        jwt_algorithms=("RS256", "HS384", "HS256"),
        jwt_issuer="me",
        jwt_audience="notifyd",
        claims={"roles": "app.roles", "channels": "app.channels", "user_id": "uid"},
    )
    token, expires_at = checked.mint("ann", ttl=60, roles=["admin"], channels=["order:*"])
    assert expires_at == NOW + 60
    assert now(checked.verify(token)) == Identity(
        "ann", roles=("admin",), channels=("order:*",), expires_at=NOW + 60, issued_at=NOW
    )
    options: Any = {"verify_exp": False, "verify_iat": False}
    decoded = jwt.decode(token, SECRET, ["HS384"], options, audience="notifyd", issuer="me")
    assert decoded["app"] == {"roles": ["admin"], "channels": ["order:*"]}
    assert now(checked.verify(checked.mint("ann", ttl=60)[0])).channels is None
    assert now(checked.verify(checked.mint("ann", ttl=60, channels=[])[0])).channels == ()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": 31_536_001}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"tenant": "acme"}, "tenant_id"),
        ({"roles": [""]}, "roles"),
        ({"roles": ["r"] * 101}, "roles"),
        ({"channels": ["a b"]}, "channels"),
        ({"channels": ["c"] * 1001}, "channels"),
        ({"channels": ["c" * 60] * 1000}, "channels"),
    ],
)
def test_what_is_not_minted(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        verifier().mint(**{"user_id": "u1", "ttl": 60, **arguments})
    assert refused.value.field == field


def test_minting_needs_a_secret() -> None:
    with pytest.raises(Conflict, match="no secret"):
        asymmetric(RSA_KEY, "RS256").mint("u1", ttl=60)


# Keys that must be fetched


class Issuer:
    """Stands in for the HTTP request: what it answers, and how often it was asked."""

    def __init__(self, *members: dict[str, Any]) -> None:
        self.body = document(*members)
        self.fails = False
        self.asked = 0
        self.called = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, url: str) -> bytes:
        assert url == "https://issuer.test/jwks.json"
        self.asked += 1
        self.called.set()
        await self.gate.wait()
        if self.fails:
            raise ConnectionRefusedError("connection refused")
        return self.body


def remote(issuer: Issuer, clock: Clock | None = None, **options: Any) -> CountingVerifier:
    url = "https://issuer.test/jwks.json"
    made = AuthSettings(jwks_url=url, **options)
    return CountingVerifier(made, production=True, clock=clock or Clock(), fetch_jwks=issuer)


def rsa_token(kid: str | None = "a", key: Any = RSA_KEY, **claims: object) -> str:
    headers = None if kid is None else {"kid": kid}
    return signed(claims, key=key, algorithm="RS256", headers=headers)


async def later(result: Identity | Awaitable[Identity]) -> Identity:
    assert not isinstance(result, Identity)
    return await result


async def test_only_the_first_token_waits() -> None:
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"), jwk(EC_KEY.public_key(), kid="b"))
    checked = remote(issuer)
    assert (await later(checked.verify(rsa_token()))).user_id == "u1"
    assert now(checked.verify(rsa_token(sub="u2"))).user_id == "u2"
    assert now(checked.verify(rsa_token(None, sub="u3"))).user_id == "u3"
    es256 = signed(key=EC_KEY, algorithm="ES256", headers={"kid": "b"})
    now(checked.verify(es256))
    assert issuer.asked == 1


async def test_a_prefetch_lets_none_wait() -> None:
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"))
    checked = remote(issuer)
    assert await checked.prefetch() is None
    now(checked.verify(rsa_token()))
    issuer.fails = True
    assert await remote(issuer).prefetch() == "connection refused"
    assert await verifier().prefetch() is None


async def test_wrong_signatures_with_published_keys() -> None:
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"))
    checked = remote(issuer)
    stranger = rsa.generate_private_key(65537, 2048)
    with pytest.raises(Unauthorized, match="signature"):
        await later(checked.verify(rsa_token(key=stranger)))
    for kid in ("a", None):
        assert "signature" in refusal(checked, rsa_token(kid, key=stranger)).message
    # The key set has no say about algorithms of secrets, and none about EdDSA unless configured.
    refusal(checked, signed(key=pem_of(RSA_KEY).encode()[:40].hex()))
    refusal(checked, signed(key=ED_KEY, algorithm="EdDSA"))
    assert issuer.asked == 1


async def test_an_unknown_kid_refetches_once_in_30_s() -> None:
    clock = Clock()
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"))
    checked = remote(issuer, clock)
    await checked.prefetch()
    rotated = rsa.generate_private_key(65537, 2048)
    issuer.body = document(jwk(rotated.public_key(), kid="b"), jwk(RSA_KEY.public_key(), kid="a"))
    for _ in range(3):
        assert "does not publish" in refusal(checked, rsa_token("b", rotated)).message
    clock.now += 30
    await later(checked.verify(rsa_token("b", rotated)))
    refusal(checked, rsa_token("c", rotated))
    assert issuer.asked == 2
    clock.now += 30
    with pytest.raises(Unauthorized, match="does not publish"):
        await later(checked.verify(rsa_token("c", rotated)))


async def test_an_unreachable_issuer() -> None:
    clock = Clock()
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"))
    checked = remote(issuer, clock, jwt_secret=SECRET)
    issuer.fails = True
    with pytest.raises(Unavailable) as unavailable:
        await later(checked.verify(rsa_token()))
    assert unavailable.value.hint == "auth.jwks_url: connection refused"
    with pytest.raises(Unavailable):
        now(checked.verify(rsa_token()))
    assert issuer.asked == 1
    now(checked.verify(signed()))  # tokens of secrets need no issuer
    issuer.fails = False
    clock.now += 1
    await later(checked.verify(rsa_token()))
    issuer.fails = True
    clock.now += 30
    with pytest.raises(Unavailable):
        await later(checked.verify(rsa_token("b")))
    now(checked.verify(rsa_token(sub="u2")))  # known keys stay good


async def test_a_hundred_wait_for_one_fetch() -> None:
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"))
    issuer.gate.clear()
    checked = remote(issuer)
    tokens = [rsa_token(sub=f"u{number}") for number in range(100)]
    waiting = [asyncio.ensure_future(later(checked.verify(token))) for token in tokens]
    await issuer.called.wait()
    with pytest.raises(Unavailable):
        await later(checked.verify(rsa_token()))
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    issuer.gate.set()
    identities = await asyncio.gather(*waiting[1:])
    assert [identity.user_id for identity in identities] == [f"u{n}" for n in range(1, 100)]
    assert issuer.asked == 1


async def test_a_withdrawn_key_stops_verifying() -> None:
    clock = Clock()
    issuer = Issuer(jwk(RSA_KEY.public_key(), kid="a"), jwk(EC_KEY.public_key(), kid="b"))
    checked = remote(issuer, clock)
    token = rsa_token(exp=NOW + 10_000)
    await later(checked.verify(token))
    issuer.body = document(jwk(EC_KEY.public_key(), kid="b"))
    clock.now += 600
    now(checked.verify(rsa_token(sub="u2", exp=NOW + 10_000)))
    await checked.prefetch()
    assert issuer.asked == 2
    assert "does not publish" in refusal(checked, token).message


async def test_closing() -> None:
    issuer = Issuer()
    issuer.gate.clear()
    checked = remote(issuer)
    waiting = asyncio.ensure_future(later(checked.verify(rsa_token())))
    await issuer.called.wait()
    await checked.aclose()
    with pytest.raises(Unavailable):
        await waiting
    await verifier().aclose()


# API keys


def keys(*entries: ApiKeySettings, clock: Clock | None = None, **options: Any) -> ApiKeys:
    return ApiKeys(AuthSettings(api_keys=entries, **options), clock=clock or Clock())


def test_api_keys_by_text_and_by_digest() -> None:
    digest = hashlib.sha256(b"another-long-api-key").hexdigest().upper()
    known = keys(
        ApiKeySettings(name="shop", key="a-long-api-key-ü", scopes=("publish", "read")),
        ApiKeySettings(name="ops", sha256=digest, tenant_id="default"),
    )
    shop = known.authenticate("a-long-api-key-ü".encode())
    assert (shop.name, shop.scopes, shop.tenant) == ("shop", frozenset({"publish", "read"}), None)
    ops = known.authenticate(b"another-long-api-key")
    assert (ops.name, ops.tenant) == ("ops", "default")
    assert ops.may("admin")


def test_the_single_key_may_do_everything() -> None:
    principal = keys(api_key="the-only-api-key").authenticate(b"the-only-api-key")
    assert principal.may("admin")
    assert principal.may("publish")


@given(st.binary(max_size=64))
def test_unknown_api_keys(key: bytes) -> None:
    with pytest.raises(Unauthorized) as refused:
        keys(api_key="the-only-api-key").authenticate(key)
    assert refused.value.message == "The API key is not known here."


def test_an_endless_api_key_is_not_hashed() -> None:
    key = "k" * 5000
    with pytest.raises(Unauthorized):
        keys(api_key=key).authenticate(key.encode())


def test_an_api_key_ends() -> None:
    clock = Clock()
    ending = datetime.fromtimestamp(NOW + 10, UTC)
    known = keys(ApiKeySettings(name="old", key="x" * 16, expires_at=ending), clock=clock)
    assert known.authenticate(b"x" * 16).expires_at == NOW + 10
    clock.now += 52
    with pytest.raises(Unauthorized) as refused:
        known.authenticate(b"x" * 16)
    assert refused.value.hint == 'the API key "old" expired 42 s ago'


def test_one_key_has_one_name() -> None:
    digest = hashlib.sha256(b"k" * 16).hexdigest()
    with pytest.raises(ConfigurationError, match="same key"):
        keys(ApiKeySettings(name="a", key="k" * 16), ApiKeySettings(name="b", sha256=digest))


# Origins


def test_origins_in_production() -> None:
    origins = Origins(["https://app.example.com", "*", "null"], development=False)
    assert origins.allows(None)
    assert origins.allows("https://app.example.com")
    for origin in (
        "null",
        "*",
        "",
        "https://app.example.com/",
        "https://app.example.com:8443",
        "http://app.example.com",
        "https://APP.example.com",
        "https://app.example.com.evil.test",
        "https://evil.test?https://app.example.com",
        "http://localhost:5173",
    ):
        assert not origins.allows(origin), origin


def test_origins_in_development() -> None:
    origins = Origins([], development=True)
    for origin in (
        None,
        "http://localhost",
        "http://localhost:5173",
        "https://localhost:8443",
        "http://127.0.0.1:3000",
        "http://[::1]:3000",
    ):
        assert origins.allows(origin), origin
    for origin in (
        "null",
        "http://localhost.evil.test",
        "http://localhost:5173\n",
        "http://localhost:5173.evil.test",
        "http://127.0.0.1.evil.test",
        "http://127.0.0.2",
        "http://evil.test/http://localhost",
        "file://localhost",
    ):
        assert not origins.allows(origin), origin
    anywhere = Origins(["*"], development=True)
    assert anywhere.allows("https://anything.test")
    assert not anywhere.allows("null")
