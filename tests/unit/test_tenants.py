from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from datetime import date
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.errors import (
    BadRequest,
    Forbidden,
    NotFound,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from notifyd.identity import Identity, Principal
from notifyd.options import TenantOverride, TenantSettings
from notifyd.queue.redis import RedisTenants
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.tenants import (
    MAX_TENANTS,
    Counts,
    Figures,
    Kept,
    LimitChanges,
    MemoryTenants,
    TenantLimits,
    Tenants,
    only_default,
    scoped,
)

NOON = 1_800_000_000.0
TODAY = date(2027, 1, 15)
OF_SECTION_WEBSOCKET = TenantLimits(9, 8, 7)
ANY = Principal(name="any", scopes=frozenset({"admin"}))
ACME = Principal(name="acme", scopes=frozenset({"admin"}), tenant="acme")


class Store(MemoryTenants):
    """Memory that can be away."""

    down = False

    def read(self, known: int | None) -> Kept | None:
        self._require_up()
        return super().read(known)

    def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        self._require_up()
        super().add(day, counts)

    def _require_up(self) -> None:
        if self.down:
            raise Unavailable("The store is away.")


def made(store: MemoryTenants | None = None, **settings: Any) -> Tenants:
    return Tenants(
        TenantSettings(enabled=True, **settings),
        store or MemoryTenants(),
        limits=OF_SECTION_WEBSOCKET,
        named=("acme",),
        clock=lambda: NOON,
    )


class TestScoped:
    @given(*[st.text(max_size=6)] * 4)
    def test_no_two_names_are_one(self, one: str, mine: str, other: str, yours: str) -> None:
        names = [each.encode("utf-8", "ignore").decode() for each in (one, mine, other, yours)]
        same = names[:2] == names[2:]
        assert (scoped(names[0], names[1]) == scoped(names[2], names[3])) == same

    @pytest.mark.parametrize("name", ["a|b", "a:b", "{x}", "a\nb", "a%7Cb", "ü", "\x00", ""])
    def test_holds_nothing_that_separates(self, name: str) -> None:
        tenant, _, rest = scoped("acme", name).partition("|")
        assert tenant == "acme"
        assert not set(rest) & set("|:{}\n\x00")


class TestWhoSpeaks:
    def test_a_bound_key(self) -> None:
        tenants = made()
        assert tenants.of_key(ACME, None) == tenants.of_key(ACME, b"acme") == "acme"
        for header in (b"globex", b"", b"acme,acme", b"\xff"):
            with pytest.raises(Forbidden):
                tenants.of_key(ACME, header)
            with pytest.raises(Forbidden):
                tenants.of_operator(ACME, header)

    def test_an_unbound_key(self) -> None:
        tenants = made()
        assert tenants.of_key(ANY, b"globex") == "globex"
        assert tenants.of_operator(ANY, None) == "default"
        for header in (None, b"", b"a:b", b"a\nb", b"a\x00", b"\xff", b"x" * 65):
            with pytest.raises(BadRequest):
                tenants.of_key(ANY, header)

    def test_a_users_own(self) -> None:
        tenants = made()
        mine = Identity("u1", "globex")
        assert tenants.of_user(mine) == tenants.of_user(mine, b"globex") == "globex"
        with pytest.raises(Forbidden):
            tenants.of_user(mine, b"acme")
        for claim in ("", "a:b", "a\n", "x" * 65):
            with pytest.raises(Unauthorized):
                tenants.of_claim(claim, "tenant_id")

    def test_a_message_of_whoever_is_trusted(self) -> None:
        tenants = made(auto_create=False)
        assert tenants.of_message("acme") == "acme"
        for name in (None, "globex", "a:b", "", "acme\n"):
            with pytest.raises(ValidationError):
                tenants.of_message(name)
        off = only_default()
        assert off.of_message(None) == off.of_message("default") == "default"
        with pytest.raises(ValidationError):
            off.of_message("acme")

    def test_switched_off(self) -> None:
        tenants = only_default()
        assert tenants.of_key(ANY, None) == tenants.of_key(ANY, b"default") == "default"
        assert tenants.of_claim(None, "tenant_id") == "default"
        with pytest.raises(BadRequest):
            tenants.of_key(ANY, b"acme")
        with pytest.raises(BadRequest):
            tenants.of_user(Identity("u1"), b"acme")
        with pytest.raises(Unauthorized):
            tenants.of_claim("acme", "tenant_id")
        with pytest.raises(NotFound):
            tenants.require()

    def test_without_auto_create(self) -> None:
        tenants = made(auto_create=False, overrides={"initech": TenantOverride()})
        assert [name for name in ("acme", "initech", "default", "x") if tenants.exists(name)] == [
            "acme",
            "initech",
        ]
        with pytest.raises(BadRequest):
            tenants.of_key(ANY, b"x")
        with pytest.raises(Unauthorized):
            tenants.of_claim(None, "tenant_id")


class TestLimits:
    def test_of_the_settings(self) -> None:
        override = TenantOverride(max_connections=5)
        tenants = made(max_connections_per_user=3, overrides={"initech": override})
        assert tenants.limits("acme") == TenantLimits(1000, 3, 50)
        assert tenants.limits("initech") == TenantLimits(5, 3, 50)
        assert only_default().limits("default") == TenantLimits(100_000, 20, 50)

    async def test_set_at_run_time_stand_over_them(self) -> None:
        store = MemoryTenants()
        override = TenantOverride(max_connections=5, max_connections_per_user=6)
        settings: dict[str, Any] = {"overrides": {"initech": override}, "auto_create": False}
        one, other = made(store, **settings), made(store, **settings)
        changed = await one.set_limits("initech", LimitChanges(max_connections=7))
        assert changed == one.limits("initech") == TenantLimits(7, 6, 50)
        await one.set_limits("umbrella", LimitChanges())
        assert other.limits("initech").max_connections == 5
        await other.sync()
        assert other.limits("initech") == changed
        assert other.exists("umbrella")
        await one.set_limits("initech", LimitChanges())
        await other.sync()
        assert other.limits("initech").max_connections == 5

    async def test_while_the_store_is_away_the_last_ones_hold(self) -> None:
        store = Store()
        tenants = made(store)
        await tenants.set_limits("acme", LimitChanges(max_connections=7))
        store.down = True
        await tenants.sync()
        assert tenants.limits("acme").max_connections == 7
        with pytest.raises(Unavailable):
            await tenants.load()


class TestFigures:
    async def test_are_stored_and_added_up(self) -> None:
        store = MemoryTenants()
        one, other = made(store), made(store)
        for tenants in (one, other, one):
            tenants.tally("acme", 2)
        await other.sync()
        sums = Counts(3, 6)
        assert await one.figures("acme") == {"acme": Figures(sums, sums)}

    async def test_wait_while_the_store_is_away(self) -> None:
        store = Store()
        tenants = made(store)
        tenants.tally("acme", 1)
        store.down = True
        with pytest.raises(Unavailable):
            await tenants.figures()
        tenants.tally("acme", 1)
        tenants.tally("globex", 0)
        await tenants.sync()
        store.down = False
        figures = await tenants.figures()
        assert figures["acme"].today == Counts(2, 2)
        assert figures["globex"].today == Counts(1, 0)

    async def test_cancelled_they_are_not_lost(self) -> None:
        class Slow(MemoryTenants):
            def add(self, day: date, counts: Mapping[str, Counts]) -> Any:
                return asyncio.get_running_loop().create_future()

        tenants = made(Slow())
        tenants.tally("acme", 1)
        task = asyncio.create_task(tenants.sync())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tenants._tallies["acme"].notifications == 1

    async def test_the_end_waits_for_them_so_long_and_no_longer(self) -> None:
        class Slow(MemoryTenants):
            def add(self, day: date, counts: Mapping[str, Counts]) -> Any:
                return asyncio.get_running_loop().create_future()

        assert await made(Slow()).finish(0.01)
        for store in (Slow(), Store()):
            tenants = made(store)
            tenants.tally("acme", 1)
            if isinstance(store, Store):
                store.down = True
            assert not await tenants.finish(0.01)
        tenants = made()
        tenants.tally("acme", 1)
        assert await tenants.finish(0.01)
        assert (await tenants.figures())["acme"].today == Counts(1, 1)

    async def test_are_of_so_many_tenants_at_most(self) -> None:
        tenants = made()
        for n in range(MAX_TENANTS + 5):
            tenants.tally(f"t{n}", 1)
        assert len(await tenants.figures()) == MAX_TENANTS


class LostRedis:
    """Loses its connection with every call on it."""

    def command(self, *words: Any, **given: Any) -> asyncio.Future[Any]:
        call = asyncio.get_running_loop().create_future()
        call.set_exception(Unavailable("Redis does not answer."))
        return call


async def test_what_two_calls_were_for_is_told_once_where_both_fail() -> None:
    """Else the log had a traceback of the second, whenever rubbish is collected."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    store = RedisTenants(
        cast(Redis, LostRedis()), RedisKeys("test"), on_corrupt=lambda reason: None
    )
    with pytest.raises(Unavailable):
        await store.figures(date(2026, 1, 31))
    gc.collect()
    assert told == []
