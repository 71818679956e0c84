"""What is kept of tenants, in PostgreSQL: their limits and their counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import msgspec

from notifyd.postgres import Connection, Postgres
from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.postgres.calls import QUERIES
from notifyd.tenants import MAX_TENANTS, Counts, Figures, Kept, LimitChanges, too_many

_encode_limits = msgspec.json.Encoder().encode
_decode_limits = msgspec.json.Decoder(LimitChanges).decode


class PostgresTenants:
    """`TenantStore` in PostgreSQL. Limits that cannot be read are told to `on_corrupt(reason)`, and
    are as if they had not been set."""

    def __init__(
        self,
        postgres: Postgres,
        *,
        on_corrupt: Callable[[str], None],
        max_tenants: int = MAX_TENANTS,
    ) -> None:
        self._postgres = postgres
        self._corrupt = CorruptLog(on_corrupt)
        self._max_tenants = max_tenants
        self._month: date | None = None

    async def read(self, known: int | None) -> Kept | None:
        """See `TenantStore.read`. Raises Unavailable."""

        async def work(connection: Connection) -> tuple[int, Sequence[Any]]:
            version: int = await connection.fetchval(QUERIES["limits_version"])
            if version == known:
                return version, ()
            return version, await connection.fetch(QUERIES["read_limits"])

        version, rows = await self._postgres.transaction(work)
        if version == known:
            return None
        limits = {row["id"]: self._decoded(row["limits"]) for row in rows}
        return Kept(version, {name: each for name, each in limits.items() if each is not None})

    def _decoded(self, body: bytes) -> LimitChanges | None:
        try:
            return _decode_limits(body)
        except msgspec.MsgspecError as error:
            self._corrupt.tell("a tenant's limits cannot be read", "limits", error)
            return None

    async def put(self, tenant: str, limits: LimitChanges) -> None:
        """See `TenantStore.put`. Raises Unavailable."""

        async def work(connection: Connection) -> str | None:
            await connection.execute(QUERIES["change_limits"])
            kept: str | None = await connection.fetchval(
                QUERIES["put_limits"], tenant, _encode_limits(limits), self._max_tenants
            )
            return kept

        if await self._postgres.transaction(work) is None:
            raise too_many(self._max_tenants)

    async def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        """See `TenantStore.add`. Raises Unavailable."""
        month = day.replace(day=1)

        async def work(connection: Connection) -> None:
            await connection.execute(
                QUERIES["add_counts"],
                day,
                list(counts),
                [each.notifications for each in counts.values()],
                [each.deliveries for each in counts.values()],
            )
            if self._month != month:
                await connection.execute(QUERIES["forget_counts"], month)

        await self._postgres.transaction(work)
        self._month = month

    async def figures(self, day: date, tenant: str | None = None) -> Mapping[str, Figures]:
        """See `TenantStore.figures`. Raises Unavailable."""

        async def work(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(QUERIES["tenant_figures"], day, tenant)
            return rows

        return {
            row["tenant"]: Figures(
                Counts(row["notifications_today"], row["deliveries_today"]),
                Counts(row["notifications"], row["deliveries"]),
            )
            for row in await self._postgres.transaction(work)
        }
