"""Tenants through the front door: who speaks for whom, what each may have, what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio

from notifyd.app import Notifyd
from notifyd.client import AsyncClient
from notifyd.connections import outbox
from notifyd.errors import ConfigurationError, Unauthorized, ValidationError
from notifyd.identifiers import new_uuid
from notifyd.identity import Identity
from notifyd.options import TenantSettings
from tests.conftest import StartServer
from tests.front_door import Host, settings_of, token, until, user

OPERATOR = "operator-key-0123456789"
ACME = "acme-key-0123456789"
GLOBEX = "globex-key-0123456789"
READER = "reader-key-0123456789"
KEYS = (
    {"name": "operator", "key": OPERATOR, "scopes": ["admin"]},
    {"name": "acme", "key": ACME, "scopes": ["admin"], "tenant_id": "acme"},
    {"name": "globex", "key": GLOBEX, "scopes": ["admin"], "tenant_id": "globex"},
    {"name": "reader", "key": READER, "scopes": ["read"]},
)
EVENT = {"event_type": "test.event", "payload": None}


def given(**tenant: Any) -> dict[str, Any]:
    return {"tenant": {"enabled": True, **tenant}, "auth": {"api_keys": KEYS}}


def of(tenant: str, user_id: str = "u1", **claims: Any) -> str:
    return token(user_id, tenant_id=tenant, **claims)


async def send(host: Host, key: str, tenant: str | None = None, **target: Any) -> Any:
    headers = {} if tenant is None else {"X-Tenant-ID": tenant}
    body = {"target": target or user("u1"), **EVENT}
    return await host.post("/api/v1/notifications", body, key=key, headers=headers)


def problem(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


class TestWhoSpeaksForWhom:
    async def test_a_bound_key_speaks_for_its_tenant_alone(self, start: StartServer) -> None:
        host = await start(**given())
        acme = await host.websocket(jwt=of("acme"))
        globex = await host.websocket(jwt=of("globex"))
        for headers in (None, "acme"):
            answer = await send(host, ACME, headers)
            assert answer.json()["delivered_to"] == 1
        assert len(await acme.notifications(2)) == 2
        await globex.nothing_came()

    @pytest.mark.parametrize(
        "named", ["globex", "default", "ACME", "acme,acme", "a:b", "{acme}", "acme|u1", "%61cme"]
    )
    async def test_another_header_is_forbidden(self, start: StartServer, named: str) -> None:
        host = await start(**given())
        assert problem(await send(host, ACME, named)) == (403, "FORBIDDEN")
        assert problem(
            await host.get("/api/v1/channels", key=ACME, headers={"X-Tenant-ID": named})
        ) == (403, "FORBIDDEN")

    async def test_two_headers_are_none_that_fits(self, host: Host, start: StartServer) -> None:
        server = await start(**given())
        both = [("X-API-Key", ACME), ("X-Tenant-ID", "acme"), ("X-Tenant-ID", "globex")]
        answer = await server.http.get("/api/v1/channels", headers=both)
        assert problem(answer) == (403, "FORBIDDEN")

    async def test_an_unbound_key_must_name_one(self, start: StartServer) -> None:
        host = await start(**given())
        acme = await host.websocket(jwt=of("acme"))
        default = await host.websocket(jwt=token("u1"))
        refused = await send(host, OPERATOR)
        assert problem(refused) == (400, "BAD_REQUEST")
        assert refused.json()["error"]["details"]["field"] == "X-Tenant-ID"
        assert (await send(host, OPERATOR, "acme")).json()["delivered_to"] == 1
        assert (await send(host, OPERATOR, "default")).json()["delivered_to"] == 1
        await acme.expect("notification")
        await default.expect("notification")
        for path in ("/stats", "/api/v1/stats/acks", "/api/v1/templates"):
            assert problem(await host.get(path, key=OPERATOR)) == (400, "BAD_REQUEST")

    async def test_the_same_idempotency_key_is_another_one_for_each(
        self, start: StartServer
    ) -> None:
        host = await start(**given())
        body = {"target": user("u1"), **EVENT, "ttl": 60}
        listeners = [await host.websocket(jwt=of(name)) for name in ("acme", "globex")]
        for name in ("acme", "globex"):
            headers = {"X-Tenant-ID": name, "Idempotency-Key": "k"}
            answer = await host.post("/api/v1/notifications", body, key=OPERATOR, headers=headers)
            assert answer.json()["delivered_to"] == 1
            assert "Idempotent-Replay" not in answer.headers
        for listener in listeners:
            await listener.expect("notification")

    @pytest.mark.parametrize(
        "name", ["a:b", "{x}", "a|b", "a/b", "a b", "", "a%3Ab", "*", "x" * 65, "ü", "a\tb"]
    )
    async def test_what_is_no_name_reaches_nobody(self, start: StartServer, name: str) -> None:
        host = await start(**given())
        headers = [(b"X-API-Key", OPERATOR.encode()), (b"X-Tenant-ID", name.encode())]
        answer = await host.http.get("/api/v1/channels", headers=headers)
        assert problem(answer) == (400, "BAD_REQUEST")
        if name.isprintable():
            with pytest.raises(AssertionError, match="UNAUTHORIZED"):
                await host.sse(jwt=of(name))

    async def test_a_token_with_a_newline_in_its_tenant(self, start: StartServer) -> None:
        host = await start(**given())
        for name in ("acme\n", "acme\r\nX: y", "acme\x00", "acme "):
            with pytest.raises(AssertionError, match="UNAUTHORIZED"):
                await host.sse(jwt=of(name))

    async def test_a_users_call_is_for_his_own_tenant(self, start: StartServer) -> None:
        host = await start(**given())
        asked = {"notification_id": "0b9d3f6e-52a3-4c53-9a64-1f3c9f3f0d11"}
        bearer = {"Authorization": f"Bearer {of('acme')}"}
        for name, status in ((None, 200), ("acme", 200), ("globex", 403), ("default", 403)):
            headers = bearer if name is None else {**bearer, "X-Tenant-ID": name}
            answer = await host.post("/api/v1/acks", asked, key=None, headers=headers)
            assert answer.status_code == status

    async def test_tokens_are_made_for_the_tenant_of_the_call(self, start: StartServer) -> None:
        host = await start(**given())
        path = "/api/v1/tokens"
        made = await host.post(path, {"user_id": "u1", "ttl": 60}, key=ACME)
        listener = await host.websocket(jwt=made.json()["token"])
        assert (await send(host, ACME)).json()["delivered_to"] == 1
        await listener.expect("notification")
        asked = {"user_id": "u1", "ttl": 60, "tenant_id": "globex"}
        assert problem(await host.post(path, asked, key=ACME)) == (403, "FORBIDDEN")
        named = {"X-Tenant-ID": "globex"}
        assert (await host.post(path, asked, key=OPERATOR, headers=named)).status_code == 200
        named = {"X-Tenant-ID": "acme"}
        assert problem(await host.post(path, asked, key=OPERATOR, headers=named)) == (
            403,
            "FORBIDDEN",
        )
        bad = {**asked, "tenant_id": "a:b"}
        assert problem(await host.post(path, bad, key=ACME)) == (422, "VALIDATION_ERROR")

    async def test_a_new_token_is_of_the_same_tenant(self, start: StartServer) -> None:
        host = await start(**given())
        listener = await host.websocket(jwt=of("acme"))
        await listener.send("Auth", {"token": of("globex")})
        code, told = await listener.closed()
        assert (code, told[0]["code"]) == (4003, "FORBIDDEN")


class TestWhichThereAre:
    async def test_without_auto_create_those_that_were_named(self, start: StartServer) -> None:
        host = await start(**given(auto_create=False, overrides={"initech": {}}))
        for name in ("initech", "acme", "globex"):
            assert (await send(host, OPERATOR, name)).status_code == 200
            await host.websocket(jwt=of(name))
        for name in ("umbrella", "default"):
            refused = await send(host, OPERATOR, name)
            assert problem(refused) == (400, "BAD_REQUEST")
            assert "tenant.overrides" in refused.json()["error"]["hint"]
        with pytest.raises(AssertionError, match="UNAUTHORIZED"):
            await host.sse(jwt=of("umbrella"))
        with pytest.raises(AssertionError, match="UNAUTHORIZED"):
            await host.sse(jwt=token("u1"))
        late = await host.websocket(None, greeted=False)
        await late.send("Auth", {"token": of("umbrella")})
        code, told = await late.closed()
        assert (code, told[0]["code"]) == (4001, "UNAUTHORIZED")
        named = {"X-Tenant-ID": "acme"}
        asked = {"user_id": "u1", "ttl": 60, "tenant_id": "umbrella"}
        assert problem(await host.post("/api/v1/tokens", asked, key=OPERATOR, headers=named)) == (
            422,
            "VALIDATION_ERROR",
        )
        answer = await host.get("/api/v1/tenants/umbrella", key=OPERATOR)
        assert problem(answer) == (404, "NOT_FOUND")

    async def test_one_is_created_by_its_limits(self, start: StartServer) -> None:
        host = await start(**given(auto_create=False))
        path = "/api/v1/tenants/umbrella/limits"
        made = await host.request("PUT", path, key=OPERATOR, content=b"{}")
        assert made.json()["limits"]["max_connections"] == 1000
        listener = await host.websocket(jwt=of("umbrella"))
        assert (await send(host, OPERATOR, "umbrella")).json()["delivered_to"] == 1
        await listener.expect("notification")

    async def test_switched_off_there_is_default_alone(self, start: StartServer) -> None:
        host = await start(auth={"api_keys": KEYS[:1]})
        for name, status in ((None, 200), ("default", 200), ("acme", 400), ("default,x", 400)):
            assert (await send(host, OPERATOR, name)).status_code == status
        with pytest.raises(AssertionError, match="UNAUTHORIZED"):
            await host.sse(jwt=of("acme"))
        for path in ("/api/v1/tenants", "/api/v1/tenants/default"):
            assert problem(await host.get(path, key=OPERATOR)) == (404, "NOT_FOUND")
        answer = await host.request(
            "PUT", "/api/v1/tenants/default/limits", key=OPERATOR, content=b"{}"
        )
        assert problem(answer) == (404, "NOT_FOUND")


class TestLimits:
    async def test_of_a_tenant_its_users_and_its_connections(self, start: StartServer) -> None:
        limits = {
            "max_connections": 2,
            "max_connections_per_user": 1,
            "max_subscriptions_per_connection": 1,
        }
        host = await start(**given(overrides={"acme": limits}))
        first = await host.websocket(jwt=of("acme", "u1"))
        await first.subscribe("a")
        await first.send("Subscribe", {"channels": ["b"]})
        assert (await first.expect("error"))["code"] == "SUBSCRIPTION_ERROR"
        await host.websocket(jwt=of("acme", "u1"))
        assert (await first.closed())[0] == 4009
        await host.websocket(jwt=of("acme", "u2"))
        refused = await host.http.get(
            "/sse", headers={"Authorization": f"Bearer {of('acme', 'u3')}"}
        )
        assert "CONNECTION_LIMIT" in refused.text
        browser = await host.websocket(
            jwt=of("acme", "u3"), origin="http://localhost:3000", greeted=False
        )
        assert (await browser.closed())[0] == 4029
        other = await host.websocket(jwt=of("globex", "u3"))
        await other.subscribe("a", "b")

    async def test_change_at_run_time(self, start: StartServer) -> None:
        host = await start(**given(overrides={"acme": {"max_connections_per_user": 7}}))
        path = "/api/v1/tenants/acme/limits"

        async def put(body: bytes, key: str = OPERATOR) -> Any:
            return await host.request("PUT", path, key=key, content=body)

        answer = await put(b'{"max_connections":1}')
        assert answer.json() == {
            "id": "acme",
            "limits": {
                "max_connections": 1,
                "max_connections_per_user": 7,
                "max_subscriptions_per_connection": 50,
            },
        }
        await host.websocket(jwt=of("acme", "u1"))
        late = await host.websocket(None, greeted=False)
        await late.send("Auth", {"token": of("acme", "u2")})
        assert (await late.closed())[0] == 4029
        assert (await put(b'{"max_connections":2}')).status_code == 200
        await host.websocket(jwt=of("acme", "u2"))
        assert (await host.get("/api/v1/tenants/acme", key=READER)).json()["limits"] == {
            "max_connections": 2,
            "max_connections_per_user": 7,
            "max_subscriptions_per_connection": 50,
        }
        assert (await put(b"{}")).json()["limits"]["max_connections"] == 1000
        assert problem(await put(b"{}", READER)) == (403, "FORBIDDEN")
        assert problem(await put(b"{}", ACME)) == (403, "FORBIDDEN")
        assert problem(await put(b"{}", GLOBEX)) == (403, "FORBIDDEN")

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b'{"max_connections":0}', 422),
            (b'{"max_connections":-1}', 422),
            (b'{"max_connections":1.5}', 422),
            (b'{"max_connections":"9"}', 422),
            (b'{"max_connection":9}', 422),
            (b"[]", 422),
            (b"", 400),
            (b"{", 400),
        ],
    )
    async def test_bad_ones(self, start_on: StartServer, body: bytes, status: int) -> None:
        host = await start_on(**given())
        path = "/api/v1/tenants/acme/limits"
        assert (await host.request("PUT", path, key=OPERATOR, content=body)).status_code == status

    @pytest.mark.parametrize("name", ["a:b", "%7Bx%7D", "a%09b", "a%7Cb", "x" * 65])
    async def test_of_what_is_no_name(self, start_on: StartServer, name: str) -> None:
        host = await start_on(**given())
        path = f"/api/v1/tenants/{name}"
        assert problem(await host.get(path, key=OPERATOR)) == (422, "VALIDATION_ERROR")
        answer = await host.request("PUT", f"{path}/limits", key=OPERATOR, content=b"{}")
        assert problem(answer) == (422, "VALIDATION_ERROR")


class TestFigures:
    async def test_of_one_and_of_all(self, start: StartServer) -> None:
        host = await start(**given())
        acme = await host.websocket(jwt=of("acme"))
        await acme.subscribe("a", "b")
        await host.sse(jwt=of("globex"))
        await host.sse(jwt=of("globex"))
        await send(host, ACME)
        await send(host, GLOBEX)
        await send(host, GLOBEX, **user("nobody"))
        listed = (await host.get("/api/v1/tenants", key=READER)).json()
        assert listed["total"] == 2
        figures = {each.pop("id"): each for each in listed["tenants"]}
        limits = figures["acme"].pop("limits")
        assert limits["max_connections"] == 1000
        assert figures["acme"] == {
            "connections": 1,
            "users": 1,
            "channels": 2,
            "notifications": {"today": 1, "this_month": 1},
            "deliveries": {"today": 1, "this_month": 1},
        }
        assert figures["globex"]["notifications"] == {"today": 2, "this_month": 2}
        assert figures["globex"]["deliveries"] == {"today": 2, "this_month": 2}
        await send(host, OPERATOR, "initech", **user("x"))
        one = (await host.get("/api/v1/tenants/initech", key=READER)).json()
        assert (one["connections"], one["notifications"]["today"]) == (0, 1)

    async def test_a_new_day_begins_at_nothing(self, start_on: StartServer) -> None:
        host = await start_on(**given())
        await send(host, ACME)
        assert (await self.today(host)) == 1
        host.clock.advance(86_400)
        assert (await self.today(host)) == 0

    async def today(self, host: Host) -> int:
        figures = (await host.get("/api/v1/tenants/acme", key=ACME)).json()
        return int(figures["notifications"]["today"])

    async def test_a_bound_key_sees_its_own_alone(self, start: StartServer) -> None:
        host = await start(**given(), server={"mode": "development"})
        await host.websocket(jwt=of("acme"))
        globex = await host.websocket(jwt=of("globex"))
        await globex.subscribe("secret")
        await send(host, GLOBEX, **user("nobody"))
        for path in ("/stats", "/api/v1/stats"):
            stats = (await host.get(path, key=ACME)).json()
            assert stats["connections"]["total_connections"] == 1
            assert stats["connections"]["channels"] == {}
            assert stats["notifications"] is stats["ack"] is None
            assert stats["queue"]["total_messages"] is None
        named = {"X-Tenant-ID": "globex"}
        stats = (await host.get("/stats", key=OPERATOR, headers=named)).json()
        assert stats["connections"]["channels"] == {"secret": 1}
        assert stats["queue"]["total_messages"] == 1
        assert stats["notifications"]["total_sent"] == 1
        for path in ("/api/v1/stats/acks", "/api/v1/tenants", "/api/v1/tenants/globex"):
            assert problem(await host.get(path, key=ACME)) == (403, "FORBIDDEN")
        assert (await host.get("/api/v1/tenants/acme", key=ACME)).json()["connections"] == 1
        health = (await host.get("/health", key=ACME)).json()
        assert health["connections"] == {"total": 1, "unique_users": 1, "channels_count": 0}
        assert health["queue"]["total_messages"] is None
        health = (await host.get("/health", key=OPERATOR)).json()
        assert health["connections"] == {"total": 2, "unique_users": 2, "channels_count": 1}
        assert health["queue"]["total_messages"] == 1

    async def test_metrics_in_production_are_for_unbound_keys(self, start: StartServer) -> None:
        host = await start(
            **given(),
            server={"mode": "production"},
            channels={"rules": {"*": {"subscribe": "any"}}},
        )
        assert (await host.get("/metrics", key=READER)).status_code == 200
        assert problem(await host.get("/metrics", key=ACME)) == (403, "FORBIDDEN")
        assert set((await host.get("/health", key=None)).json()) == {
            "status",
            "version",
            "uptime_seconds",
        }


class TestKeptInAStore:
    async def test_in_redis(
        self, start_on: StartServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = {"url": redis_url, "key_prefix": f"test-{new_uuid()}"}
        await self.outlives_and_spreads(start_on, monkeypatch, "redis", kept)

    async def test_in_postgres(
        self, start_on: StartServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.outlives_and_spreads(start_on, monkeypatch, "postgres", {"url": postgres_url})

    async def outlives_and_spreads(
        self,
        start_on: StartServer,
        monkeypatch: pytest.MonkeyPatch,
        backend: str,
        store: dict[str, str],
    ) -> None:
        monkeypatch.setattr("notifyd.app.SYNC_SECONDS", 0.02)
        chosen = {"backend": backend}
        sections = {**given(auto_create=False), "queue": chosen, "ack": chosen, backend: store}
        first, second = await start_on(**sections), await start_on(**sections)
        path = "/api/v1/tenants/initech"
        body = b'{"max_connections":9}'
        assert (await second.get(path, key=READER)).status_code == 404
        await first.request("PUT", f"{path}/limits", key=OPERATOR, content=body)
        await send(first, OPERATOR, "initech")
        await until(lambda: second.notifyd.tenants.exists("initech"))
        await first.get(path, key=READER)
        told = (await second.get(path, key=READER)).json()
        assert told["limits"]["max_connections"] == 9
        assert told["notifications"] == {"today": 1, "this_month": 1}
        monkeypatch.setattr("notifyd.app.SYNC_SECONDS", 1000)
        await send(second, OPERATOR, "initech")
        await first.stop()
        await second.stop()
        third = await start_on(**sections)
        told = (await third.get(path, key=READER)).json()
        assert told["limits"]["max_connections"] == 9
        assert told["notifications"] == {"today": 2, "this_month": 2}
        await third.stop()

    async def test_while_the_store_is_down_the_last_limits_hold(
        self, start_on: StartServer, redis_server: Any
    ) -> None:
        host = await start_on(
            **given(auto_create=False),
            queue={"backend": "redis"},
            ack={"backend": "redis"},
            redis={"url": redis_server.url, "command_timeout_seconds": 0.3},
            breaker={"failure_threshold": 1},
        )
        path = "/api/v1/tenants/initech"
        body = b'{"max_connections":9}'
        await host.request("PUT", f"{path}/limits", key=OPERATOR, content=body)
        redis_server.kill()
        await host.notifyd.tenants.sync()
        figures = (await host.get(path, key=OPERATOR)).json()
        assert figures["limits"]["max_connections"] == 9
        listener = await host.websocket(jwt=of("initech"))
        assert (await listener.expect("gap"))["reason"] == "queue_unavailable"
        await send(host, OPERATOR, "initech", **user("u1"))
        assert (await host.get(path, key=OPERATOR)).json()["notifications"] is None
        refused = await host.request("PUT", f"{path}/limits", key=OPERATOR, content=b"{}")
        assert problem(refused) == (503, "UNAVAILABLE")
        assert (await host.get(path, key=OPERATOR)).json()["limits"]["max_connections"] == 9


class TestKeptInRedis:
    async def test_limits_that_redis_lost_are_followed_by_new_ones(
        self, start_on: StartServer, redis_url: str
    ) -> None:
        prefix = f"test-{new_uuid()}"
        stores: dict[str, Any] = {
            "queue": {"backend": "redis"},
            "redis": {"url": redis_url, "key_prefix": prefix},
        }
        one, other = [await start_on(**given(), **stores) for _ in range(2)]
        path = "/api/v1/tenants/acme"

        async def limit_seen(most: int) -> int:
            content = json.dumps({"max_connections": most}).encode()
            answer = await one.request("PUT", f"{path}/limits", key=OPERATOR, content=content)
            assert answer.status_code == 200
            # As the other one does every few seconds.
            await other.notifyd.tenants.sync()
            seen: int = (await other.get(path, key=ACME)).json()["limits"]["max_connections"]
            return seen

        assert await limit_seen(5) == 5
        async with redis.asyncio.from_url(redis_url) as client:
            assert await client.delete(f"{prefix}:{{tenants}}:limits") == 1
        assert await limit_seen(7) == 7

    async def test_no_name_reaches_anothers_keys(
        self, start_on: StartServer, redis_url: str
    ) -> None:
        """Users, channels, templates and keys whose names hold what Redis's keys are made of."""
        users = ("a", "a:b", "a|b", "{a}", "a}:log:acme|a", "acme|a", "%61", "a%7Cb", "*", "a[b]?")
        prefix = f"test-{new_uuid()}"
        backend = {"backend": "redis"}
        host = await start_on(
            queue=backend,
            ack=backend,
            redis={"url": redis_url, "key_prefix": prefix},
            cluster={"enabled": True},
            **given(),
        )
        template = {"name": "t", "event_type": "e", "payload_template": {"of": ""}}
        for key, tenant in ((ACME, "acme"), (GLOBEX, "globex")):
            for name in ("a", "a:b", "a.b"):
                body = {**template, "id": name, "payload_template": f"{tenant} {name}"}
                assert (await host.post("/api/v1/templates", body, key=key)).status_code == 201
            for name in users:
                body = {"target": user(name), "event_type": "e", "payload": f"{tenant} {name}"}
                answer = await host.post(
                    "/api/v1/notifications", {**body, "idempotency_key": name}, key=key
                )
                assert answer.json()["outcome"] == "queued"
        for key, tenant in ((ACME, "acme"), (GLOBEX, "globex")):
            for name in ("a", "a:b", "a.b"):
                found = (await host.get(f"/api/v1/templates/{name}", key=key)).json()
                assert found["payload_template"] == f"{tenant} {name}"
            for number, name in enumerate(users, 1):
                listener = await host.websocket(jwt=of(tenant, name))
                assert (await listener.expect("notification"))["payload"] == f"{tenant} {name}"
                assert (await listener.expect("caught_up"))["replayed"] == 1
                answer = await host.post("/api/v1/presence", {"user_ids": users}, key=key)
                assert answer.json() == {"online": dict.fromkeys(users[:number], 1)}

    @pytest.mark.parametrize("name", ["a\n", "a\r\nSET x y", "a\x00b", ""])
    async def test_what_is_no_name_makes_no_key(
        self, start_on: StartServer, redis_url: str, name: str
    ) -> None:
        prefix = f"test-{new_uuid()}"
        backend = {"backend": "redis"}
        host = await start_on(
            queue=backend, ack=backend, redis={"url": redis_url, "key_prefix": prefix}, **given()
        )
        bodies: tuple[tuple[dict[str, Any], int], ...] = (
            ({"target": user(name), **EVENT}, 422),
            ({"target": {"type": "users", "value": ["u1", name]}, **EVENT}, 422),
            ({"target": {"type": "channel", "value": name}, **EVENT}, 422),
            ({"target": user("u1"), "template_id": name, "variables": {}}, 404),
        )
        for body, status in bodies:
            answer = await host.post("/api/v1/notifications", body, key=ACME)
            assert answer.status_code == status, body
        template = {"id": name, "name": "t", "event_type": "e", "payload_template": {}}
        assert problem(await host.post("/api/v1/templates", template, key=ACME))[0] == 422
        async with redis.asyncio.from_url(redis_url) as client:
            assert [key async for key in client.scan_iter(f"{prefix}:*")] == []


class TestTheClientAndTheApplication:
    async def test_a_client_names_its_tenant(self, start_on: StartServer) -> None:
        host = await start_on(**given())
        listener = await host.websocket(jwt=of("acme"))
        async with AsyncClient(host.url, api_key=OPERATOR, tenant="acme") as client:
            receipt = await client.send(user="u1", event="hello")
            assert receipt.delivered_to == 1
            changed = await client.set_tenant_limits("acme", max_connections=3)
            assert (changed.id, changed.limits.max_connections) == ("acme", 3)
            found = await client.get_tenant("acme")
            assert found.notifications is not None
            assert (found.connections, found.notifications.today) == (1, 1)
            assert "acme" in [each.id for each in (await client.list_tenants()).tenants]
        await listener.expect("notification")

    async def test_an_application_sends_for_a_tenant(self, start_on: StartServer) -> None:
        host = await start_on(**given(auto_create=False, overrides={"initech": {}}))
        listener = await host.websocket(jwt=of("initech"))
        receipt = await host.notifyd.of_tenant("initech").send(user="u1", event="hello")
        assert receipt.delivered_to == 1
        await listener.expect("notification")
        for name in ("umbrella", "a:b"):
            with pytest.raises(ValidationError):
                host.notifyd.of_tenant(name)

    async def test_an_application_says_whose_user_it_is(self, start_on: StartServer) -> None:
        async def authenticate(connection: Any) -> Identity:
            return Identity("u1", connection.query_params["of"])

        host = await start_on("asgi", authenticate=authenticate, **given())
        listener = await host.websocket(None, query="of=acme")
        assert (await send(host, ACME)).json()["delivered_to"] == 1
        await listener.expect("notification")
        for name in ("a:b", ""):
            with pytest.raises(AssertionError, match="UNAUTHORIZED"):
                await host.sse(None, query=f"of={name}")

    async def test_without_tenants_it_says_none(self, start_on: StartServer) -> None:
        async def authenticate(connection: Any) -> Identity:
            return Identity("u1", "acme")

        host = await start_on("asgi", authenticate=authenticate)
        with pytest.raises(AssertionError, match="UNAUTHORIZED"):
            await host.sse(None)

    def test_settings_that_cannot_be(self) -> None:
        wrongs: tuple[dict[str, Any], ...] = (
            {"tenant": {"overrides": {"acme": {}}}},
            {"tenant": {"enabled": True, "overrides": {"a:b": {}}}},
            {"tenant": {"enabled": True, "max_connections": 1_000_000}},
            {"tenant": {"enabled": True, "overrides": {"a": {"max_connections": 1_000_000}}}},
            {"auth": {"api_keys": KEYS}},
            {
                "tenant": {"enabled": True},
                "auth": {"api_keys": [{"name": "a", "key": ACME, "tenant_id": "a:b"}]},
            },
        )
        for wrong in wrongs:
            with pytest.raises(ConfigurationError, match="tenant"):
                Notifyd(settings_of(**wrong))


class TestManyRevocations:
    def test_one_tenants_end_no_tokens_of_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("notifyd.auth.MAX_REVOCATIONS", 100)
        verifier = Notifyd(settings_of(**given())).verifier
        mine = of("globex", "u1")
        verifier.verify(mine)
        for n in range(300):
            verifier.revoke("acme", f"u{n}", 4e9)
        verifier.verify(mine)
        with pytest.raises(Unauthorized):
            verifier.verify(of("acme", "never-revoked"))


async def test_a_notification_is_written_before_the_broadcast_of_another_is_through(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A turn of the event loop writes to one, whatever the clock says.
    monkeypatch.setattr(outbox, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "CHECK_EVERY", 1)
    host = await start(**given())
    many = [await host.websocket(jwt=of("acme", f"u{n}")) for n in range(40)]
    other = await host.websocket(jwt=of("globex"))
    written: list[str] = []
    begun = asyncio.Event()

    def noted(tenant: str, write: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def note(data: bytes) -> None:
            if b"test.event" in data:
                written.append(tenant)
                begun.set()
            write(data)

        return note

    for connection in host.notifyd._registry:
        connection.outbox.write_to(-1)
        write = noted(connection.identity.tenant, connection.outbox._write)
        connection.outbox._write = write  # type: ignore[assignment]  # which has named its argument
    body = {"target": {"type": "broadcast"}, **EVENT}
    broadcast = asyncio.create_task(host.post("/api/v1/notifications", body, key=ACME))
    await begun.wait()
    assert (await send(host, GLOBEX)).json()["delivered_to"] == 1
    assert (await broadcast).json()["delivered_to"] == len(many)
    await other.expect("notification")
    for each in many:
        await each.expect("notification")
    assert written.count("acme") == len(many)
    assert written.index("globex") < len(many)
    await until(lambda: not host.notifyd._flusher.waiting_bytes)


def test_limits_of_the_settings_are_the_documented_ones() -> None:
    defaults = TenantSettings()
    assert (defaults.enabled, defaults.auto_create) == (False, True)
    assert (
        defaults.max_connections,
        defaults.max_connections_per_user,
        defaults.max_subscriptions_per_connection,
    ) == (1000, 20, 50)
