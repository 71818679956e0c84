"""Keys, scopes, tenants, request ids, CORS, errors and metrics, the same for every endpoint."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from notifyd.api.guard import Answer, Description, Endpoint, Request, bearer
from notifyd.errors import Internal, RateLimited, Unauthorized, ValidationError
from notifyd.eventually import settled
from tests.unit.api_server import ADMIN, NOW, ORIGIN, PUBLISH, READ, ApiServer, error_of

EVENT = {"event_type": "a", "payload": 1}


# --- who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": READ},
        {"Authorization": f"Bearer {READ}"},
        {"Authorization": f"bearer  {READ}"},
        {"X-API-Key": READ, "Authorization": "Basic x"},
    ],
)
async def test_a_key_comes_in_either_header(headers: dict[str, str]) -> None:
    response = await ApiServer().request("GET", "/api/v1/channels", key=None, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-API-Key": "wrong"}, {"Authorization": "Basic x"}, {"Authorization": "Bearer "}],
)
async def test_without_a_key_that_is_known_nothing_goes(headers: dict[str, str]) -> None:
    response = await ApiServer().request("GET", "/api/v1/channels", key=None, headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "UNAUTHORIZED"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "wrong" not in response.text


@pytest.mark.parametrize(
    ("key", "read", "publish", "admin"),
    [(READ, 200, 403, 403), (PUBLISH, 403, 200, 403), (ADMIN, 200, 200, 200)],
)
async def test_scopes(key: str, read: int, publish: int, admin: int) -> None:
    server = ApiServer()
    for path in ("/api/v1/channels", "/stats", "/api/v1/stats", "/metrics", "/api/v1/templates"):
        assert (await server.request("GET", path, key=key)).status_code == read
    presence = await server.request("POST", "/api/v1/presence", {"user_ids": ["a"]}, key=key)
    assert presence.status_code == read
    assert (await server.publish("/broadcast", EVENT, key=key)).status_code == publish
    path = "/api/v1/users/u1/disconnect"
    assert (await server.request("POST", path, {}, key=key)).status_code == admin


async def test_a_missing_scope_is_named() -> None:
    response = await ApiServer(production=False).publish("/broadcast", EVENT, key=READ)
    error = error_of(response)
    assert error["code"] == "FORBIDDEN"
    assert '"reader"' in error["message"]
    assert "publish" in error["hint"]


@pytest.mark.parametrize(("tenant", "status"), [("default", 200), ("acme", 400), ("", 400)])
async def test_there_is_one_tenant(tenant: str, status: int) -> None:
    headers = {"X-Tenant-ID": tenant}
    response = await ApiServer().publish("/broadcast", EVENT, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        (b"", None),
        (b"Bearer", None),
        (b"Bearer ", None),
        (b"Basic abc", None),
        (b"BEARER abc", b"abc"),
        (b"Bearer  a b ", b"a b"),
    ],
)
def test_bearer(header: bytes | None, token: bytes | None) -> None:
    assert bearer(header) == token


# --- request ids and metrics ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "kept"), [("r-1", True), ("x" * 128, True), ("x" * 129, False)]
)
async def test_the_caller_s_request_id_is_kept_where_it_is_short(offered: str, kept: bool) -> None:
    headers = {"X-Request-ID": offered}
    for path in ("/health", "/nothing", "/api/v1/channels"):
        response = await ApiServer().request("GET", path, key=None, headers=headers)
        assert (response.headers["X-Request-ID"] == offered) == kept
        assert response.headers["X-Request-ID"]


async def test_requests_are_counted_by_the_pattern_of_their_route() -> None:
    server = ApiServer()
    await server.request("GET", "/api/v1/users/somebody/connections")
    await server.request("GET", "/api/v1/users/somebody/connections", key=None)
    await server.request("HEAD", "/health", key=None)
    await server.request("GET", "/secret/path")
    await server.request("BREW", "/health")
    count = server.metrics.http_requests_total.labels
    assert count("GET", "/api/v1/users/{id}/connections", "200").value == 1
    assert count("GET", "/api/v1/users/{id}/connections", "401").value == 1
    assert count("HEAD", "/health", "200").value == 1
    assert count("GET", "unmatched", "404").value == 1
    assert count("other", "/health", "405").value == 1
    assert server.metrics.http_request_seconds.count == 5


# --- errors ---------------------------------------------------------------------------------------


def failing(server: ApiServer, error: Exception, *, later: bool = False) -> Endpoint:
    """An endpoint whose handler raises."""

    def handler(request: Request) -> Any:
        raise error

    async def handler_later(request: Request) -> Any:
        raise error

    description = Description("Fails", "Tests")
    chosen = handler_later if later else handler
    return Endpoint(
        server.guard, "POST", "/fails", chosen, description, access="open", idempotent=True
    )


def request(*headers: tuple[bytes, bytes], body: bytes = b"") -> Request:
    return Request("POST", "/fails", {}, b"", list(headers), body, "192.0.2.1")


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("key", [(), ((b"idempotency-key", b"k"),)])
@pytest.mark.parametrize("production", [False, True])
async def test_what_is_our_own_fault_is_logged_and_masked(
    production: bool, key: tuple[tuple[bytes, bytes], ...], later: bool
) -> None:
    structlog.reset_defaults()
    server = ApiServer(production=production)
    for error in (RuntimeError("the password is x"), Internal("the password is x")):
        with capture_logs() as logs:
            endpoint = failing(server, error, later=later)
            answer = await settled(endpoint(request((b"x-request-id", b"r-1"), *key)))
        assert answer.status == 500
        assert b"INTERNAL" in answer.body
        assert (b"password" in answer.body) != production
        (entry,) = logs
        assert entry["request_id"] == "r-1"
        assert entry["exc_info"] is error


@pytest.mark.parametrize("later", [False, True])
async def test_an_error_says_where_and_how(later: bool) -> None:
    error = ValidationError("a is bad", field="a", constraint="good", hint="make it good")
    for production in (False, True):
        answer = await settled(
            failing(ApiServer(production=production), error, later=later)(request())
        )
        assert answer.status == 422
        assert b'"details":{"field":"a","constraint":"good"}' in answer.body
        assert (b"make it good" in answer.body) != production


async def test_how_long_to_wait() -> None:
    answer = await settled(failing(ApiServer(), RateLimited("slow", retry_after=7))(request()))
    assert (b"retry-after", b"7") in answer.headers
    answer = await settled(failing(ApiServer(), RateLimited("slow"))(request()))
    assert (b"retry-after", b"1") in answer.headers
    answer = await settled(failing(ApiServer(), Unauthorized("who?"))(request()))
    assert (b"www-authenticate", b"Bearer") in answer.headers


async def test_the_body_s_limit_holds_in_every_lane() -> None:
    server = ApiServer()
    endpoint = server.endpoint("POST", "/api/v1/notifications/channel")
    answer = await settled(endpoint(request((b"x-api-key", ADMIN.encode()), body=b"x" * 65537)))
    assert answer.status == 413


@pytest.mark.parametrize("key", ["", "x" * 257])
async def test_an_idempotency_key_has_1_to_256_bytes(key: str) -> None:
    response = await ApiServer().publish("/broadcast", EVENT, headers={"Idempotency-Key": key})
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == "Idempotency-Key"


async def test_an_answer_may_be_given_whole() -> None:
    server = ApiServer()
    whole = Answer(418, b"tea", ((b"x-pot", b"1"),), b"text/plain")
    endpoint = Endpoint(
        server.guard, "GET", "/tea", lambda request: whole, Description("", ""), access="open"
    )
    answer = await settled(endpoint(request((b"x-request-id", b"r"))))
    assert answer == Answer(418, b"tea", ((b"x-pot", b"1"), (b"x-request-id", b"r")), b"text/plain")


# --- users ----------------------------------------------------------------------------------------


class LaterKeys:
    """Verifies as with keys that must be fetched first."""

    def __init__(self, server: ApiServer) -> None:
        self.identify = server.guard.identify

    async def __call__(self, request: Request) -> Any:
        return await settled(self.identify(request))


@pytest.mark.parametrize("later", [False, True])
async def test_a_user_is_known_by_his_token(later: bool) -> None:
    server = ApiServer()
    if later:
        server.guard.identify = LaterKeys(server)
    body = {"notification_ids": ["0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"]}

    async def ack(**headers: str) -> int:
        response = await server.request("POST", "/api/v1/acks", body, key=None, headers=headers)
        return response.status_code

    assert await ack(Authorization=f"Bearer {server.token('u1')}") == 200
    assert await ack() == 401
    assert await ack(Authorization=f"Bearer {ADMIN}") == 401
    assert await ack(**{"X-API-Key": ADMIN}) == 401
    token = server.token("u1")
    assert await ack(Authorization=f"Bearer {token}", Origin="https://evil.example") == 403
    server.clock.now = NOW + 4000
    assert await ack(Authorization=f"Bearer {token}") == 401


async def test_a_cookie_needs_a_known_page() -> None:
    server = ApiServer(cookie_name="session")
    body = {"notification_ids": ["0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"]}
    cookie = {"Cookie": f"session={server.token('u1')}"}
    path = "/api/v1/acks"
    known = await server.request("POST", path, body, key=None, headers={**cookie, "Origin": ORIGIN})
    assert known.status_code == 200
    assert known.headers["Access-Control-Allow-Credentials"] == "true"
    unknown = await server.request("POST", path, body, key=None, headers=cookie)
    assert unknown.status_code == 403


# --- CORS -----------------------------------------------------------------------------------------


async def test_pages_of_allowed_origins_may_read_answers() -> None:
    server = ApiServer()
    for path, key in (("/health", None), ("/nothing", None), ("/api/v1/channels", None)):
        response = await server.request("GET", path, key=key, headers={"Origin": ORIGIN})
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "X-Request-ID" in response.headers["Access-Control-Expose-Headers"]
        assert response.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in response.headers
    foreign = {"Origin": "https://evil.example"}
    response = await server.request("GET", "/health", headers=foreign)
    assert response.status_code == 200
    assert "Access-Control-Allow-Origin" not in response.headers
    assert response.headers["Vary"] == "Origin"


async def test_a_browser_asks_before_it_calls() -> None:
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    response = await ApiServer().request("OPTIONS", "/api/v1/acks", key=None, headers=headers)
    assert response.status_code == 204
    assert response.content == b""
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert response.headers["X-Request-ID"]


async def test_a_foreign_page_is_refused_and_told_how_to_mend_it() -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    server = ApiServer(production=False)
    response = await server.request("OPTIONS", "/api/v1/acks", key=None, headers=headers)
    assert response.status_code == 403
    assert error_of(response)["hint"] == 'add "https://evil.example" to cors.origins'
    assert "Access-Control-Allow-Origin" not in response.headers
