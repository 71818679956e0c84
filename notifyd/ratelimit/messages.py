"""What one WebSocket may say: a bucket for its messages, and one for acks that nothing stands for.

An ack of what was delivered costs nothing, however many come at once. Any other one takes from the
second bucket; where that is empty the ack is refused, and that is all: acks never close a
connection. Messages over the rate are refused with an error; who goes on regardless is closed.
"""

from __future__ import annotations

from notifyd.ratelimit.base import Verdict
from notifyd.ratelimit.bucket import Bucket, Rate

STRIKES = 3
"""So many seconds with messages over the rate, and the connection is closed; forgotten when the
bucket was full in between."""

STRIKE_MS = 1000
"""What is on its way already when the first error is told counts as one with it."""


class MessageBudget:
    """The buckets of one connection. Times are in milliseconds."""

    __slots__ = ("_acks", "_messages", "_refused", "_strikes", "_struck_at")

    def __init__(self, rate: Rate, now: int) -> None:
        self._messages = Bucket(rate, now)
        self._acks: Bucket | None = None
        self._strikes = 0
        self._struck_at = 0
        self._refused = 0

    def say(self, rate: Rate, now: int) -> Verdict:
        """A message comes."""
        bucket = self._messages
        allowed = bucket.take(rate, now)
        if allowed and bucket.units == rate.capacity - rate.period:
            self._strikes = self._refused = 0
        elif not allowed:
            self._refused += 1
            if not self._strikes or not 0 <= now - self._struck_at < STRIKE_MS:
                self._strikes += 1
                self._struck_at = now
        return rate.verdict(bucket.units, now, allowed=allowed)

    def ack(self, rate: Rate, now: int) -> Verdict:
        """An ack comes for more than was delivered."""
        if self._acks is None:
            self._acks = Bucket(rate, now)
        allowed = self._acks.take(rate, now)
        return rate.verdict(self._acks.units, now, allowed=allowed)

    def is_spent(self, rate: Rate) -> bool:
        """Whether messages were over the rate repeatedly, or by a whole burst at once."""
        return self._strikes >= STRIKES or self._refused > rate.burst
