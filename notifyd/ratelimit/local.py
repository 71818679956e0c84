"""Buckets in this process's memory: what one node by itself lets through."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from notifyd.ratelimit.base import Verdict
from notifyd.ratelimit.bucket import Bucket, Rate

MAX_BUCKETS = 100_000
"""Callers that one limit remembers; beyond it, who was seen longest ago begins anew."""

SWEPT_PER_TURN = 1000


class LocalLimit:
    """One rate for many. A bucket that has become full is as good as none, and is swept.

    `clock` gives Unix seconds. Callers stand in the order in which they were seen last, so that
    those whose buckets are full for sure are the first.
    """

    def __init__(self, rate: Rate, *, clock: Callable[[], float], max_buckets: int) -> None:
        self.rate = rate
        self._clock = clock
        self._max_buckets = max_buckets
        self._full_after = rate.full_after
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    def take(self, who: str) -> Verdict:
        """See `Limit.take`; at once."""
        rate, buckets = self.rate, self._buckets
        now = int(self._clock() * 1000)
        bucket = buckets.get(who)
        if bucket is None:
            if len(buckets) >= self._max_buckets:
                buckets.popitem(last=False)
            bucket = buckets[who] = Bucket(rate, now)
        else:
            buckets.move_to_end(who)
        allowed = bucket.take(rate, now)
        return rate.verdict(bucket.units, now, allowed=allowed)

    async def sweep(self) -> None:
        """Forget who was not seen for as long as it takes to fill a bucket.

        Yields to the event loop on the way; cancelled, it has done a part.
        """
        buckets = self._buckets
        while True:
            before = int(self._clock() * 1000) - self._full_after
            for _ in range(SWEPT_PER_TURN):
                if not buckets or next(iter(buckets.values())).at > before:
                    return
                buckets.popitem(last=False)
            await asyncio.sleep(0)
