"""Idempotency keys in Redis."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from functools import partial

from notifyd.errors import RateLimited, Unavailable, ValidationError
from notifyd.eventually import retrieve
from notifyd.idempotency import MAX_WAITERS, Fresh, KeptAnswer, Replay, Scope, Wait
from notifyd.queue.redis.scripts import Clock, load_script, milliseconds
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis, Word

LEASE_SECONDS = 60.0
"""How long a call may work under an idempotency key before another may."""

FIRST_LOOK_SECONDS = 0.02
LONGEST_LOOK_SECONDS = 0.5


class _Leased(Fresh):
    """A claim on a key in Redis; `holder` tells it from one that another was given since."""

    __slots__ = ("fingerprint", "holder")

    def __init__(
        self, keys: RedisIdempotencyKeys, scope: Scope, fingerprint: bytes, holder: str
    ) -> None:
        super().__init__(keys, scope)
        self.fingerprint = fingerprint
        self.holder = holder


class RedisIdempotencyKeys:
    """`IdempotencyKeys` in Redis, each for `window_seconds`.

    A key at work is leased: a node that dies frees it after `LEASE_SECONDS`. Who waits is woken by
    his own node, and looks by himself for what others do.
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        window_seconds: float,
        clock: Clock | None = None,
        max_waiters: int = MAX_WAITERS,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._window = int(window_seconds * 1000)
        self._clock = clock
        self._max_waiters = max_waiters
        self._waiting: dict[Scope, list[asyncio.Event]] = {}
        self._claim = load_script("claim")
        self._answer = load_script("answer")

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Awaitable[Fresh | Replay | Wait]:
        """Who works on this key. Raises ValidationError where its body was another one."""
        holder = secrets.token_hex(8)

        def claimed(answer: list[bytes]) -> Fresh | Replay | Wait:
            if len(answer) == 2:
                return Replay(KeptAnswer(int(answer[0]), answer[1]))
            if answer[0] == b"fresh":
                return _Leased(self, scope, fingerprint, holder)
            if answer[0] == b"wait":
                return Wait(self, scope, fingerprint)
            raise ValidationError(
                "This idempotency key was used for another body.",
                field="idempotency_key",
                constraint="one body for each key",
            )

        args = (
            milliseconds(self._clock),
            fingerprint,
            holder,
            int(LEASE_SECONDS * 1000),
            int(alone),
        )
        return self._redis.run(self._claim, (self._keys.idempotency(scope),), args, claimed)

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says."""
        waiting = self._waiting.setdefault(scope, [])
        if len(waiting) >= self._max_waiters:
            raise RateLimited(
                "Too many calls wait for the answer of one idempotency key.", retry_after=1
            )
        woken = asyncio.Event()
        waiting.append(woken)
        pause = FIRST_LOOK_SECONDS
        try:
            while True:
                claim = await self.claim(scope, fingerprint)
                if not isinstance(claim, Wait):
                    return claim
                try:
                    async with asyncio.timeout(pause):
                        await woken.wait()
                except TimeoutError:
                    pause = min(pause * 2, LONGEST_LOOK_SECONDS)
                woken.clear()
        finally:
            waiting.remove(woken)
            if not waiting:
                self._waiting.pop(scope, None)

    def keep(self, claim: Fresh, answer: KeptAnswer) -> Awaitable[None]:
        """What `Fresh.complete` says, of an answer that is kept."""
        return self._end(claim, answer.status, answer.body)

    def release(self, claim: Fresh) -> Awaitable[None]:
        """What `Fresh.abandon` says."""
        return self._end(claim)

    def _end(self, claim: Fresh, *answer: Word) -> asyncio.Future[None]:
        assert isinstance(claim, _Leased)  # noqa: S101  # for the type checker: we gave it out
        args = (
            milliseconds(self._clock),
            claim.holder,
            claim.fingerprint,
            self._window,
            *answer,
        )
        key = self._keys.idempotency(claim.scope)
        return self._redis.run(self._answer, (key,), args, partial(self._ended, claim.scope))

    def _ended(self, scope: Scope, answer: int) -> None:
        for woken in self._waiting.get(scope, ()):
            woken.set()

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it, or else its lease runs out."""
        try:
            self._end(claim).add_done_callback(retrieve)
        except (Unavailable, RuntimeError):
            return  # Redis is away, or the event loop is: the lease runs out.
