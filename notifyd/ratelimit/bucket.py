"""A token bucket, exact: no clock of its own, no floating point.

A rate is `count` tokens each `period` milliseconds, and a bucket holds `burst` of them. It is kept
in units of which a token has `period` and a millisecond brings `count`, so that all is whole
numbers: after d milliseconds a bucket of u units has min(burst * period, u + d * count), and lets
a call through where that is at least `period`. bucket.lua does the same in Redis, where numbers are
exact up to 2**53; with a count and burst of at most `MOST` and a period of at most a day they are.
"""

from __future__ import annotations

import re
from math import gcd

import msgspec

from notifyd.ratelimit.base import Verdict

MOST = 1_000_000
PERIODS = {"second": 1000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
"""In milliseconds."""

_TEXT = re.compile(rf"([0-9]+)/({'|'.join(PERIODS)})").fullmatch


class Rate(msgspec.Struct, frozen=True, gc=False):
    """`count` tokens each `period` milliseconds, which have no common divisor, and `burst` at most
    at once.
    """

    count: int
    period: int
    burst: int

    @classmethod
    def of(cls, count: int, period: int, burst: int) -> Rate:
        """In lowest terms. Raises ValueError where a number is out of bounds."""
        if not (1 <= count <= MOST and 1 <= burst <= MOST and 1 <= period <= PERIODS["day"]):
            raise ValueError(f"a rate of {count} in {period} ms, {burst} at once, is out of bounds")
        common = gcd(count, period)
        return cls(count // common, period // common, burst)

    @classmethod
    def parse(cls, text: str) -> Rate:
        """`1000/hour`: a thousand at once, and as many again evenly over each hour.

        The periods are second, minute, hour and day. Raises ValueError.
        """
        found = _TEXT(text)
        if found is None:
            raise ValueError(f'"{text}" is no rate; write it as 1000/hour')
        count = int(found[1])
        return cls.of(count, PERIODS[found[2]], count)

    @property
    def capacity(self) -> int:
        """The units of a full bucket."""
        return self.burst * self.period

    @property
    def full_after(self) -> int:
        """Milliseconds after which any bucket is full."""
        return -(-self.capacity // self.count)

    def verdict(self, units: int, now: int, *, allowed: bool) -> Verdict:
        """What to tell of a bucket with `units` left at `now` (Unix milliseconds)."""
        count, period = self.count, self.period
        full_at = now - (units - self.capacity) // count
        wait = 0 if allowed else max(1, -((units - period) // (1000 * count)))
        return Verdict(allowed, self.burst, units // period, -(-full_at // 1000), wait)


class Bucket:
    """Units as they were `at` some time (milliseconds), full at first."""

    __slots__ = ("at", "units")

    def __init__(self, rate: Rate, now: int) -> None:
        self.units = rate.capacity
        self.at = now

    def take(self, rate: Rate, now: int) -> bool:
        """Take a token, if there is one at `now`.

        A clock that was set back brings nothing, and takes nothing away.
        """
        passed = now - self.at
        self.at = now
        units = self.units
        if passed > 0:
            units = min(rate.capacity, units + passed * rate.count)
        allowed = units >= rate.period
        self.units = units - rate.period if allowed else units
        return allowed
