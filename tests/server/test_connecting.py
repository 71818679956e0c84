"""Who may connect, how he says who he is, and how one who may not is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt import encode as jwt_encode
from websockets.exceptions import InvalidStatus

from notifyd.connections import lifecycle
from tests.conftest import StartServer
from tests.front_door import (
    ORIGIN,
    WAIT,
    Host,
    Message,
    Transport,
    token,
    until,
    user,
)

BY_CLAIM = {"rules": {"*": {"subscribe": "any"}}}


async def status_of_websocket(host: Host, **options: Any) -> tuple[int, dict[str, str], Message]:
    """Status, headers and body of a refused handshake."""
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(greeted=False, **options)
    response = refused.value.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return response.status_code, headers, json.loads(response.body or b"{}")


async def close_code_of_websocket(host: Host, **options: Any) -> tuple[int, list[Message]]:
    """How a browser is refused: close code, and the messages before it."""
    websocket = await host.websocket(greeted=False, origin=ORIGIN, **options)
    return await websocket.closed()


async def stream_status(host: Host, **options: Any) -> int:
    """The status of a refused stream."""
    response = await host.get("/sse", key=None, **options)
    return response.status_code


# --- identity ---


async def test_the_greeting_says_who_is_connected_and_until_when(
    host: Host, transport: Transport
) -> None:
    jwt = token("ada", expires_in=3600, subscribe=["news", "orders:ada"])
    listener = (
        await host.websocket(jwt=jwt) if transport == "websocket" else await host.sse(jwt=jwt)
    )
    connected = listener.connected
    assert connected["user_id"] == "ada"
    assert len(connected["connection_id"]) == 36
    session = connected["session"]
    assert session["heartbeat_interval"] == 30
    assert session["subscriptions"] == ["news", "orders:ada"]
    expires_at = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 3600))
    assert session["expires_at"].startswith(expires_at[:13])
    assert session["expires_at"].endswith("Z")
    await host.publish({"type": "channel", "value": "orders:ada"}, payload=1)
    assert (await listener.expect("notification"))["payload"] == 1


async def test_a_token_may_come_by_query_header_or_subprotocol(host: Host) -> None:
    jwt = token("ada")
    by_query = await host.websocket(None, query=f"token={jwt}")
    by_header = await host.websocket(jwt=jwt)
    by_subprotocol = await host.websocket(None, subprotocols=[f"bearer.{jwt}"])
    by_both = await host.websocket(None, subprotocols=["foo", f"bearer.{jwt}", "notifyd.v1"])
    stream_by_query = await host.sse(None, query=f"token={jwt}")
    assert by_subprotocol.connection.subprotocol == f"bearer.{jwt}"
    assert by_both.connection.subprotocol == "notifyd.v1"
    assert by_header.connection.subprotocol is None
    for listener in (by_query, by_header, by_subprotocol, by_both, stream_by_query):
        assert listener.connected["user_id"] == "ada"


async def test_a_token_may_come_by_cookie_from_a_known_page(start: StartServer) -> None:
    host = await start(auth={"cookie_name": "session", "jwt_secret": SECRET_OF_COOKIES})
    cookie = {"Cookie": f"theme=dark; session={token('ada', secret=SECRET_OF_COOKIES)}"}
    from_page = await host.websocket(None, headers=cookie, origin=ORIGIN)
    same_origin = await host.sse(None, headers={**cookie, "Sec-Fetch-Site": "same-origin"})
    assert from_page.connected["user_id"] == same_origin.connected["user_id"] == "ada"
    # From nobody knows where, as in a forged request.
    assert (await status_of_websocket(host, user_id=None, headers=cookie))[0] == 403
    assert await stream_status(host, headers={**cookie, "Sec-Fetch-Site": "cross-site"}) == 403


SECRET_OF_COOKIES = "another secret of thirty-two bytes"


async def test_a_user_id_that_is_a_number_is_taken_as_its_text(host: Host) -> None:
    websocket = await host.websocket(jwt=token(42))  # type: ignore[arg-type]  # on purpose
    assert websocket.connected["user_id"] == "42"
    assert (await host.publish(user("42")))["outcome"] == "delivered"


async def test_without_a_token_the_first_message_authenticates(host: Host) -> None:
    websocket = await host.websocket(None, greeted=False)
    await websocket.send("Auth", {"token": token("ada")})
    assert (await websocket.expect("connected"))["user_id"] == "ada"
    await host.publish(user("ada"))
    await websocket.expect("notification")


@pytest.mark.parametrize(
    "message",
    [
        '{"type":"Auth","payload":{"token":"nonsense"}}',
        '{"type":"Ping"}',
        "not json",
        '{"type":"Auth","payload":{"token":"' + "x" * 16384 + '"}}',
    ],
)
async def test_a_bad_first_message_closes(host: Host, message: str) -> None:
    websocket = await host.websocket(None, greeted=False)
    await websocket.send_text(message)
    code, told = await websocket.closed()
    assert code == 4001
    assert [message["type"] for message in told] == ["error"]


async def test_an_expired_first_message_token_says_so(host: Host) -> None:
    websocket = await host.websocket(None, greeted=False)
    await websocket.send("Auth", {"token": token(expires_in=-60)})
    code, told = await websocket.closed()
    assert code == 4010
    assert told[0]["code"] == "TOKEN_EXPIRED"


async def test_silence_instead_of_auth_closes(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "AUTH_SECONDS", 0.05)
    host = await start()
    websocket = await host.websocket(None, greeted=False)
    code, told = await websocket.closed()
    assert code == 4001
    assert told[0]["code"] == "UNAUTHORIZED"


async def test_sockets_that_wait_for_auth_are_limited_by_address(host: Host) -> None:
    waiting = [await host.websocket(None, greeted=False) for _ in range(20)]
    status, headers, body = await status_of_websocket(host, user_id=None)
    assert status == 429
    assert int(headers["retry-after"]) > 0
    assert body["error"]["code"] == "CONNECTION_LIMIT"
    code, _ = await close_code_of_websocket(host, user_id=None)
    assert code == 4029
    # Who brings a token is not held up by them, and who authenticates makes room.
    await host.websocket("ada")
    await waiting[0].send("Auth", {"token": token("ada")})
    await waiting[0].expect("connected")
    await host.websocket(None, greeted=False)


async def test_sockets_that_wait_for_auth_are_limited_together(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "MAX_AUTHENTICATING", 2)
    host = await start()
    waiting = [await host.websocket(None, greeted=False) for _ in range(2)]
    assert (await status_of_websocket(host, user_id=None))[0] == 429
    await waiting[0].close()
    await until(lambda: len(host.notifyd.lifecycle._authenticating) == 1)
    await host.websocket(None, greeted=False)


# --- refusals ---

BAD_TOKENS: dict[str, Callable[[], str]] = {
    "expired": lambda: token(expires_in=-31),
    "another secret": lambda: token(secret="x" * 32),
    "not a token": lambda: "a.b.c",
    "no subject": lambda: token(sub=None),
    "no expiry": lambda: token(exp=None),
    "not yet": lambda: token(nbf=time.time() + 60),
    "another tenant": lambda: token(tenant_id="acme"),
}


async def test_a_token_that_does_not_hold_is_refused(host: Host) -> None:
    for bad, make in BAD_TOKENS.items():
        await check_refused(host, make(), "TOKEN_EXPIRED" if bad == "expired" else "UNAUTHORIZED")


async def test_a_token_that_was_good_before_is_refused_once_it_expired(host: Host) -> None:
    """It is known by then, and its signature not looked at again."""
    jwt = token("ada", expires_in=600)
    bearer = {"Authorization": f"Bearer {jwt}"}
    ack = {"notification_id": "6f1de0fd-0000-4000-8000-000000000001"}
    await host.websocket(jwt=jwt)
    assert (await host.post("/api/v1/acks", ack, key=None, headers=bearer)).status_code == 200
    host.clock.advance(600 + 31)
    await check_refused(host, jwt, "TOKEN_EXPIRED")
    response = await host.post("/api/v1/acks", ack, key=None, headers=bearer)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "TOKEN_EXPIRED")


async def check_refused(host: Host, jwt: str, error_code: str) -> None:
    """Refused on both transports, in every way that its client can read."""
    status, headers, body = await status_of_websocket(host, jwt=jwt)
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert body["error"]["code"] == error_code
    code, told = await close_code_of_websocket(host, jwt=jwt)
    assert code == 4001
    assert told == [
        {"type": "error", "code": body["error"]["code"], "message": body["error"]["message"]}
    ]
    assert await stream_status(host, headers={"Authorization": f"Bearer {jwt}"}) == 401


async def test_a_stream_without_a_token_is_refused(host: Host) -> None:
    assert await stream_status(host) == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_a_foreign_page_is_refused_by_status(host: Host, origin: str) -> None:
    status, _, body = await status_of_websocket(host, user_id="ada", origin=origin)
    assert status == 403
    assert body["error"]["hint"] == f'add "{origin}" to cors.origins'
    headers = {"Authorization": f"Bearer {token()}", "Origin": origin}
    assert await stream_status(host, headers=headers) == 403


async def test_development_allows_any_port_of_localhost(host: Host) -> None:
    await host.websocket("ada", origin="http://localhost:5173")
    await host.sse("ada", headers={"Origin": "http://127.0.0.1:3000"})


async def test_production_allows_only_what_is_listed(start: StartServer) -> None:
    host = await start(server={"mode": "production"}, channels=BY_CLAIM)
    await host.websocket("ada", origin=ORIGIN)
    await host.websocket("ada")
    status, _, body = await status_of_websocket(host, user_id="ada", origin="http://localhost:5173")
    assert status == 403
    assert "hint" not in body["error"]


async def test_leeway_lets_clocks_disagree(host: Host) -> None:
    assert (await host.websocket(jwt=token("ada", expires_in=-20))).connected["user_id"] == "ada"


async def test_a_stream_that_may_come_later_is_told_in_the_stream(start: StartServer) -> None:
    host = await start(websocket={"max_connections": 1})
    await host.websocket("ada")
    stream = await host.sse("bob", greeted=False)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    told = await stream.rest()
    assert [message["type"] for message in told] == ["error"]
    assert told[0]["code"] == "CONNECTION_LIMIT"
    assert told[0]["retry_after_seconds"] == 30
    assert stream.retry is not None
    assert 30_000 <= stream.retry <= 45_000


async def test_all_connections_together_are_limited(start: StartServer) -> None:
    host = await start(websocket={"max_connections": 2})
    first = await host.websocket("ada")
    await host.sse("bob")
    status, headers, body = await status_of_websocket(host, user_id="cleo")
    assert (status, headers["retry-after"], body["error"]["code"]) == (
        429,
        "30",
        "CONNECTION_LIMIT",
    )
    code, told = await close_code_of_websocket(host, user_id="cleo")
    assert (code, told[0]["code"]) == (4029, "CONNECTION_LIMIT")
    await first.close()
    await until(lambda: host.notifyd._registry.by_transport["websocket"] == 0)
    await host.websocket("cleo")


async def test_one_user_beyond_his_limit_is_refused(start: StartServer) -> None:
    host = await start(websocket={"max_connections_per_user": 1, "on_user_limit": "refuse"})
    await host.websocket("ada")
    status, headers, body = await status_of_websocket(host, user_id="ada")
    assert (status, headers["retry-after"], body["error"]["code"]) == (
        429,
        "30",
        "CONNECTION_LIMIT",
    )
    code, told = await close_code_of_websocket(host, user_id="ada")
    assert (code, told[0]["code"]) == (4009, "CONNECTION_LIMIT")
    stream = await host.sse("ada", greeted=False)
    assert [message["code"] for message in await stream.rest()] == ["CONNECTION_LIMIT"]
    late = await host.websocket(None, greeted=False)
    await late.send("Auth", {"token": token("ada")})
    assert (await late.closed())[0] == 4009
    await host.websocket("bob")


async def test_one_user_beyond_his_limit_gives_up_the_longest_silent(start: StartServer) -> None:
    host = await start(websocket={"max_connections_per_user": 2})
    first = await host.websocket("ada")
    host.clock.advance(1)
    second = await host.websocket("ada")
    host.clock.advance(1)
    await first.nothing_came()
    third = await host.websocket("ada")
    code, told = await second.closed()
    assert (code, told[-1]["code"]) == (4009, "CONNECTION_LIMIT")
    await first.nothing_came()
    await third.nothing_came()


async def test_a_stream_given_up_for_a_newer_one_stays_away_for_a_day(start: StartServer) -> None:
    host = await start(websocket={"max_connections_per_user": 1})
    old = await host.sse("ada")
    new = await host.websocket("ada")
    told = await old.rest()
    assert [message["type"] for message in told] == ["error"]
    assert told[0]["code"] == "CONNECTION_LIMIT"
    assert old.retry == 86_400_000
    await new.nothing_came()


async def test_bad_queries_are_named(host: Host) -> None:
    jwt = token()
    assert (await status_of_websocket(host, jwt=jwt, query="acks=yes"))[0] == 400
    headers = {"Authorization": f"Bearer {jwt}"}
    response = await host.get("/sse?acks=yes", key=None, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["details"]["field"] == "acks"


async def test_a_stream_has_the_headers_that_keep_it_flowing(host: Host) -> None:
    stream = await host.sse("ada", headers={"Origin": ORIGIN, "X-Request-ID": "mine"})
    headers = stream.response.headers
    assert headers["content-type"].split(";")[0] == "text/event-stream"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"] == "mine"
    assert headers["access-control-allow-origin"] == ORIGIN
    assert stream.retry is not None
    assert 1000 <= stream.retry <= 5000


async def test_a_stream_takes_its_channels_from_the_query(start: StartServer) -> None:
    host = await start(channels={"rules": {"open:*": {"subscribe": "any"}}})
    stream = await host.sse("ada", query="channels=open:a,closed,open:b")
    assert (await stream.expect("subscribed"))["payload"] == ["open:a", "open:b"]
    error = await stream.expect("error")
    assert error["code"] == "SUBSCRIPTION_ERROR"
    assert "closed" in error["message"]


async def test_a_path_that_has_no_websocket_is_refused(host: Host) -> None:
    reader, writer = await host.raw()
    writer.write(
        b"GET /nothing HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    async with asyncio.timeout(WAIT):
        status = await reader.readline()
    assert int(status.split()[1]) in {403, 404}


async def test_claims_may_have_other_names(start: StartServer) -> None:
    names = {"user_id": "uid", "roles": "app_metadata.roles", "subscribe": "app_metadata.rooms"}
    host = await start(auth={"claims": names})
    metadata = {"roles": ["admin"], "rooms": ["lobby"]}
    websocket = await host.websocket(jwt=token("other", uid="ada", app_metadata=metadata))
    assert websocket.connected["user_id"] == "ada"
    assert websocket.connected["session"]["subscriptions"] == ["lobby"]
    await host.publish(user("ada"), audience={"type": "Roles", "value": ["admin"]})
    await websocket.expect("notification")


async def test_secrets_are_changed_one_after_the_other(start: StartServer) -> None:
    old, new = "the old secret of thirty-two bytes", "the new secret of thirty-two bytes"
    host = await start(auth={"jwt_secret": new, "jwt_secrets": [old]})
    for secret in (old, new):
        await host.websocket(jwt=token("ada", secret=secret))
    assert (await status_of_websocket(host, jwt=token("ada")))[0] == 401


async def test_issuer_and_audience_are_checked_where_they_are_configured(
    start: StartServer,
) -> None:
    host = await start(auth={"jwt_issuer": "https://id.example", "jwt_audience": "notifyd"})
    right: dict[str, Any] = {"iss": "https://id.example", "aud": ["other", "notifyd"]}
    await host.websocket(jwt=token("ada", **right))
    for wrong in ({"iss": None}, {"iss": "https://evil.example"}, {"aud": None}, {"aud": "other"}):
        jwt = token("ada", **{**right, **wrong})
        assert (await status_of_websocket(host, jwt=jwt))[0] == 401, wrong


async def test_a_public_key_believes_its_own_algorithm_alone(start: StartServer) -> None:
    key = Ed25519PrivateKey.generate()
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    host = await start(
        auth={"jwt_secret": None, "jwt_public_key": pem, "jwt_algorithms": ["EdDSA"]}
    )
    claims = {"sub": "ada", "exp": int(time.time()) + 60}
    websocket = await host.websocket(jwt=jwt_encode(claims, key, algorithm="EdDSA"))
    assert websocket.connected["user_id"] == "ada"
    unsigned = jwt_encode(claims, "", algorithm="none")
    for wrong in (unsigned, token("ada", secret=SECRET_OF_COOKIES)):
        assert (await status_of_websocket(host, jwt=wrong))[0] == 401


async def test_a_client_of_http_1_0_gets_its_stream_as_it_is(start_on: StartServer) -> None:
    host = await start_on("sockets")
    reader, writer = await host.raw()
    writer.write(f"GET /sse?token={token('ada')} HTTP/1.0\r\n\r\n".encode())
    async with asyncio.timeout(WAIT):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        # RFC 9112, section 6.1: chunks are nothing that HTTP/1.0 knows.
        assert b"transfer-encoding" not in head.lower()
        assert (await reader.readuntil(b"\n\n")).startswith(b"retry: ")
        assert (await reader.readuntil(b"\n\n")).startswith(b"event: connected\n")
