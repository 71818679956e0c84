"""What is kept of tenants, in Redis: their limits and their counts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import date

import msgspec

from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.redis.scripts import load_script
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.tenants import MAX_TENANTS, Counts, Figures, Kept, LimitChanges, too_many

TENANTS_PER_CALL = 500
DAY_COUNTS_SECONDS = 3 * 86_400
MONTH_COUNTS_SECONDS = 40 * 86_400

_encode_limits = msgspec.json.Encoder().encode
_decode_limits = msgspec.json.Decoder(LimitChanges).decode


class RedisTenants:
    """`TenantStore` in Redis. Limits are configuration, and do not expire; limits that cannot be
    read are told to `on_corrupt`, and are as if they had not been set."""

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        on_corrupt: Callable[[str], None],
        max_tenants: int = MAX_TENANTS,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._corrupt = CorruptLog(on_corrupt)
        self._max_tenants = max_tenants
        self._limits = load_script("limits")
        self._counts = load_script("counts")

    async def read(self, known: int | None) -> Kept | None:
        """See `TenantStore.read`. Raises Unavailable."""
        key = self._keys.tenant_limits
        if known is not None and int(await self._redis.command("HGET", key, "") or 0) == known:
            return None
        answer: list[bytes] = await self._redis.command("HGETALL", key)
        fields = dict(zip(answer[::2], answer[1::2], strict=True))
        version = int(fields.pop(b"", 0))
        limits = {name.decode(): self._decoded(body) for name, body in fields.items()}
        return Kept(version, {name: each for name, each in limits.items() if each is not None})

    def _decoded(self, body: bytes) -> LimitChanges | None:
        try:
            return _decode_limits(body)
        except msgspec.MsgspecError as error:
            self._corrupt.tell("a tenant's limits cannot be read", "limits", error)
            return None

    def put(self, tenant: str, limits: LimitChanges) -> Awaitable[None]:
        """See `TenantStore.put`. Raises Unavailable."""

        def done(answer: bytes) -> None:
            if answer == b"full":
                raise too_many(self._max_tenants)

        version = 1 + secrets.randbits(62)
        args = (tenant, _encode_limits(limits), self._max_tenants, version)
        return self._redis.run(self._limits, (self._keys.tenant_limits,), args, done)

    async def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        """See `TenantStore.add`. Raises Unavailable; then a part may have been added."""
        keys = self._periods(day)
        rows = [(name, each.notifications, each.deliveries) for name, each in counts.items()]
        for first in range(0, len(rows), TENANTS_PER_CALL):
            some = [word for row in rows[first : first + TENANTS_PER_CALL] for word in row]
            args = (DAY_COUNTS_SECONDS, MONTH_COUNTS_SECONDS, *some)
            await self._redis.run(self._counts, keys, args)

    def _periods(self, day: date) -> tuple[str, str]:
        text = day.isoformat()
        return self._keys.tenant_counts(text), self._keys.tenant_counts(text[:7])

    async def figures(self, day: date, tenant: str | None = None) -> Mapping[str, Figures]:
        """See `TenantStore.figures`. Raises Unavailable."""
        asked = [self._period(key, tenant) for key in self._periods(day)]
        today, month = await asyncio.gather(*asked)
        return {name: Figures(today.get(name, Counts()), counts) for name, counts in month.items()}

    def _period(self, key: str, tenant: str | None) -> asyncio.Future[dict[str, Counts]]:
        if tenant is not None:
            names = (f"{tenant}|n", f"{tenant}|d")
            return self._redis.command(
                "HMGET",
                key,
                *names,
                convert=lambda answer: _counts(zip(names, answer, strict=True)),
            )
        return self._redis.command(
            "HGETALL",
            key,
            convert=lambda answer: _counts(
                (name.decode(), count)
                for name, count in zip(answer[::2], answer[1::2], strict=True)
            ),
        )


def _counts(fields: Iterable[tuple[str, bytes | None]]) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    for field, count in fields:
        if count is not None:
            name, _, what = field.partition("|")
            added = Counts(int(count), 0) if what == "n" else Counts(0, int(count))
            counts[name] = counts.get(name, Counts()) + added
    return counts
