"""/demo without a browser: who gets the page, and above all who gets its tokens and key."""

from __future__ import annotations

import pytest

from notifyd.identity import Identity
from notifyd.options import ApiKeySettings, ChannelRule
from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, Host

PATHS = ("/demo", "/demo/demo.css", "/demo/demo.js", "/demo/session")


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/demo", "text/html; charset=utf-8"),
        ("/demo/demo.css", "text/css; charset=utf-8"),
        ("/demo/demo.js", "text/javascript; charset=utf-8"),
    ],
)
async def test_the_page_is_under_a_strict_policy(host: Host, path: str, content_type: str) -> None:
    answer = await host.get(path, key=None)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == content_type
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_session_has_what_works(host: Host) -> None:
    answer = await host.get("/demo/session", key=None)
    assert answer.headers["cache-control"] == "no-store"
    session = answer.json()
    assert session["api_key"] == ADMIN_KEY
    assert [user["user_id"] for user in session["users"]] == ["alice", "bob"]
    alice = await host.websocket(jwt=session["users"][0]["token"])
    assert alice.connected["user_id"] == "alice"


@pytest.mark.parametrize(
    "name", ["localhost:{port}", "LOCALHOST", "127.0.0.1:{port}", "127.8.8.8", "[::1]:{port}"]
)
async def test_names_of_this_machine(host: Host, name: str) -> None:
    headers = {"Host": name.format(port=host.port)}
    answer = await host.get("/demo/session", key=None, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example.com"},
        {"Host": "127.0.0.1.example.com"},
        {"Host": "localhost.example.com:80"},
        {"Host": "192.0.2.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-Forwarded-For": "192.0.2.1"},
    ],
)
async def test_nobody_else_gets_the_session(host: Host, headers: dict[str, str]) -> None:
    answer = await host.get("/demo/session", key=None, headers=headers)
    assert answer.status_code == 403
    assert "token" not in answer.text


async def test_a_key_known_by_its_digest_alone_is_not_told(start: StartServer) -> None:
    key = ApiKeySettings(name="shop", sha256="0" * 64, scopes=("publish",))
    host = await start(auth={"jwt_secret": "s" * 32, "api_keys": (key,)})
    answer = await host.get("/demo/session", key=None)
    assert answer.json()["api_key"] is None


@pytest.mark.parametrize("path", PATHS)
async def test_production_has_no_demo(start: StartServer, path: str) -> None:
    host = await start(
        server={"mode": "production", "port": 0},
        channels={"rules": {"*": ChannelRule(subscribe="any")}},
    )
    assert (await host.get(path)).status_code == 404
    assert "/demo" not in (await host.get("/openapi.json")).json()["paths"]


async def test_an_application_that_knows_its_users_has_no_demo(start: StartServer) -> None:
    async def authenticate(connection: object) -> Identity | None:
        return None

    host = await start(authenticate=authenticate)
    assert (await host.get("/demo")).status_code == 404
