"""What every limiter keeps, local or in Redis.

One `Limit` is one rate for many callers, each with a bucket of his own, full at first. Taking is
one step: of calls that overlap, none is let through on a token that another took.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from notifyd.errors import RateLimited
from notifyd.eventually import Eventually


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What became of one token asked for.

    `limit` tokens fit into the bucket, `remaining` whole ones are left; it is full again at
    `reset_at` (Unix seconds, rounded up). `retry_after` (seconds, rounded up, at least 1): when
    there is a token for who got none; 0 for who got one.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_at: int
    retry_after: int


class Limit(Protocol):
    """Tokens for many, each by his name."""

    def take(self, who: str) -> Eventually[Verdict]:
        """Take a token of his, if there is one. Never raises; cancelled, it may be taken or not."""


class RateExceeded(RateLimited):
    """There was no token; what the caller is told of his bucket."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message, retry_after=verdict.retry_after)
        self.verdict = verdict
