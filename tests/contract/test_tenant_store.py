"""What `TenantStore` promises, whatever keeps it."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta

import pytest

from notifyd.errors import Conflict
from notifyd.eventually import settled
from notifyd.tenants import Counts, Figures, LimitChanges
from tests.contract.backends import Backend

DAY = date(2026, 3, 14)


class TestLimits:
    async def test_gives_back_what_it_was_given(self, backend: Backend) -> None:
        store = await backend.tenants()
        first = await settled(store.read(None))
        assert first is not None
        assert first.limits == {}
        acme = LimitChanges(max_connections=5, max_subscriptions_per_connection=7)
        await settled(store.put("acme", acme))
        await settled(store.put("default", LimitChanges()))
        kept = await settled(store.read(first.version))
        assert kept is not None
        assert kept.limits == {"acme": acme, "default": LimitChanges()}

    async def test_is_silent_until_something_changes(self, backend: Backend) -> None:
        store = await backend.tenants()
        await settled(store.put("acme", LimitChanges(max_connections=5)))
        kept = await settled(store.read(None))
        assert kept is not None
        assert await settled(store.read(kept.version)) is None
        await settled(store.put("acme", LimitChanges(max_connections=6)))
        again = await settled(store.read(kept.version))
        assert again is not None
        assert again.limits["acme"].max_connections == 6

    async def test_is_bounded(self, backend: Backend) -> None:
        store = await backend.tenants(max_tenants=2)
        for name in ("a", "b"):
            await settled(store.put(name, LimitChanges(max_connections=1)))
        with pytest.raises(Conflict):
            await settled(store.put("c", LimitChanges()))
        await settled(store.put("b", LimitChanges(max_connections=2)))
        kept = await settled(store.read(None))
        assert kept is not None
        assert {name: each.max_connections for name, each in kept.limits.items()} == {
            "a": 1,
            "b": 2,
        }

    async def test_one_at_a_time_is_counted(self, backend: Backend) -> None:
        store = await backend.tenants(max_tenants=3)

        async def put(name: str) -> bool:
            try:
                await settled(store.put(name, LimitChanges()))
            except Conflict:
                return False
            return True

        assert sum(await asyncio.gather(*(put(f"t{n}") for n in range(10)))) == 3


class TestFigures:
    async def test_adds_up_by_day_and_month(self, backend: Backend) -> None:
        store = await backend.tenants()
        yesterday = DAY - timedelta(days=1)
        await settled(store.add(yesterday, {"acme": Counts(1, 10), "globex": Counts(5, 0)}))
        await settled(store.add(DAY, {"acme": Counts(2, 20)}))
        await settled(store.add(DAY, {"acme": Counts(3, 0), "b.c-d_e": Counts(1, 1)}))
        assert await settled(store.figures(DAY)) == {
            "acme": Figures(Counts(5, 20), Counts(6, 30)),
            "globex": Figures(Counts(), Counts(5, 0)),
            "b.c-d_e": Figures(Counts(1, 1), Counts(1, 1)),
        }
        assert await settled(store.figures(DAY, "globex")) == {
            "globex": Figures(Counts(), Counts(5, 0))
        }
        assert await settled(store.figures(DAY, "nobody")) == {}

    async def test_a_month_begins_at_nothing(self, backend: Backend) -> None:
        store = await backend.tenants()
        await settled(store.add(date(2026, 2, 28), {"acme": Counts(1, 1)}))
        first = date(2026, 3, 1)
        assert await settled(store.figures(first)) == {}
        await settled(store.add(first, {"acme": Counts(2, 2)}))
        assert await settled(store.figures(first)) == {"acme": Figures(Counts(2, 2), Counts(2, 2))}

    async def test_of_many_tenants(self, backend: Backend) -> None:
        store = await backend.tenants(max_tenants=2000)
        many = {f"t{n}": Counts(n, n) for n in range(1, 1200)}
        await settled(store.add(DAY, many))
        figures = await settled(store.figures(DAY))
        assert {name: each.today for name, each in figures.items()} == many
