"""A store that fails: when to stop asking it, how long to wait, and what its callers are told.

`CircuitBreaker` and `Backoff` are pure; `Guarded` puts them around calls. The breaker:

    CLOSED     every call is made; `failure_threshold` failures in a row open it
    OPEN       no call is made until the pause of a backoff is over
    HALF_OPEN  one probe at a time; `success_threshold` of them close it, a failure opens it
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import IntEnum
from typing import NoReturn, TypeVar

from notifyd.errors import NotifydError, Unavailable
from notifyd.options import BreakerSettings

T = TypeVar("T")


class BreakerState(IntEnum):
    """The numbers are those of the metrics `redis_breaker_state` and `postgres_breaker_state`."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Backoff:
    """Pauses between attempts, in seconds: each drawn from zero to a ceiling that doubles.

    The whole range is drawn from, so that those who failed together do not come back together.
    `random` gives a number from 0 to 1.
    """

    __slots__ = ("_initial", "_maximum", "_random", "ceiling")

    def __init__(
        self, initial: float, maximum: float, random: Callable[[], float] = random.random
    ) -> None:
        self._initial = min(initial, maximum)
        self._maximum = maximum
        self._random = random
        self.ceiling = self._initial
        """The longest that the next pause may be, in seconds."""

    def next(self) -> float:
        """How long to wait before the next attempt, in seconds."""
        pause = self._random() * self.ceiling
        self.ceiling = min(self.ceiling * 2, self._maximum)
        return pause

    def reset(self) -> None:
        """Begin anew: an attempt succeeded."""
        self.ceiling = self._initial


class CircuitBreaker:
    """Whether a store is asked at all, judged by how the calls before went.

    Each `allow()` that said yes is followed by exactly one of `succeeded`, `failed` and
    `abandoned`. Calls that overlap a change of state say nothing of the new one: a caller that may
    have such keeps `period` from before its call and reports with it. `on_change` is called after
    each change, and so is who subscribes. `clock` is in seconds and only grows, `random` gives 0
    to 1.
    """

    def __init__(
        self,
        settings: BreakerSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        on_change: Callable[[BreakerState], None] | None = None,
    ) -> None:
        self.state = BreakerState.CLOSED
        self.period = 0
        """Counts the changes of state."""
        self._failure_threshold = settings.failure_threshold
        self._success_threshold = settings.success_threshold
        self._clock = clock
        longest = min(settings.backoff_max_ms / 1000, settings.reset_timeout_seconds)
        self._backoff = Backoff(settings.backoff_initial_ms / 1000, longest, random)
        self._failures = 0
        self._successes = 0
        self._probing = False
        self._open_until = 0.0
        self._listeners = [] if on_change is None else [on_change]

    def subscribe(self, listener: Callable[[BreakerState], None]) -> None:
        """Call `listener` after each change of state, with the new one."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[BreakerState], None]) -> None:
        """Call it no more."""
        self._listeners.remove(listener)

    def allow(self) -> bool:
        """Whether a call may be made now. In HALF_OPEN, who is told yes makes the probe."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN:
            if self._clock() < self._open_until:
                return False
            self._change(BreakerState.HALF_OPEN)
        elif self._probing:
            return False
        self._probing = True
        return True

    def succeeded(self, period: int | None = None) -> None:
        """The store answered. `period`: when the call was made, if that may not be now."""
        if self._outdated(period):
            return
        if self.state is BreakerState.CLOSED:
            self._failures = 0
        elif self.state is BreakerState.HALF_OPEN:
            self._probing = False
            self._successes += 1
            if self._successes >= self._success_threshold:
                self._backoff.reset()
                self._change(BreakerState.CLOSED)

    def failed(self, period: int | None = None) -> None:
        """The store did not answer, or not in time. `period`: as in `succeeded`."""
        if self._outdated(period):
            return
        if self.state is BreakerState.CLOSED:
            self._failures += 1
            if self._failures >= self._failure_threshold:
                self._open()
        elif self.state is BreakerState.HALF_OPEN:
            self._open()

    def abandoned(self, period: int | None = None) -> None:
        """The call ended without showing how the store does: its caller was cancelled."""
        if not self._outdated(period):
            self._probing = False

    def retry_after(self) -> float:
        """Seconds until a call may be made; 0 where one may be made, or a probe is under way."""
        if self.state is not BreakerState.OPEN:
            return 0.0
        return max(0.0, self._open_until - self._clock())

    def _outdated(self, period: int | None) -> bool:
        return period is not None and period != self.period

    def _open(self) -> None:
        self._open_until = self._clock() + self._backoff.next()
        self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self.period += 1
        self._failures = 0
        self._successes = 0
        self._probing = False
        for listener in tuple(self._listeners):
            listener(state)


class Guarded:
    """Calls to one store, each with the breaker's leave and a timeout.

    `store` is what callers are told of ("Redis"); `failures` are the exceptions by which the
    store's driver says that it could not answer, beside OSError and TimeoutError. `on_failure` is
    told each of them. Unavailable counts as one; any other NotifydError of the work is an answer
    (NotFound, Conflict); what else it raises is a fault of ours, which comes out as it is and says
    nothing of the store.
    """

    def __init__(
        self,
        breaker: CircuitBreaker,
        store: str,
        *,
        failures: tuple[type[Exception], ...] = (),
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.breaker = breaker
        self._store = store
        self._failures: tuple[type[Exception], ...] = (OSError, TimeoutError, *failures)
        self._on_failure = on_failure
        self._watched = False

    async def call(self, work: Callable[[], Awaitable[T]], timeout: float) -> T:
        """What `work` gives within `timeout` seconds.

        Raises Unavailable, with `retry_after`: at once where the breaker is open (while `watch`
        runs, half open too: no caller waits for a store that may still hang), else when the store
        failed. Cancelled, it cancels the work, and the store is not blamed: who gives up before
        `timeout` shields the call, or a store that hangs is never found out.
        """
        breaker = self.breaker
        closed = breaker.state is BreakerState.CLOSED
        if not closed and (self._watched or not breaker.allow()):
            self.refuse()
        return await self._attempt(work, timeout)

    def refuse(self, cause: Exception | None = None) -> NoReturn:
        """Raise Unavailable with the breaker's `retry_after`."""
        seconds = max(1, math.ceil(self.breaker.retry_after()))
        raise Unavailable(f"{self._store} does not answer.", retry_after=seconds) from cause

    async def watch(
        self,
        ping: Callable[[], Awaitable[object]],
        timeout: float,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        least: float = 0.05,
    ) -> NoReturn:
        """Probe the store with `ping` while the breaker is not closed, until cancelled.

        `call` makes no probes then. Between two there are `least` seconds at least.
        """
        breaker, changed = self.breaker, asyncio.Event()

        def wake(_: BreakerState) -> None:
            changed.set()

        breaker.subscribe(wake)
        self._watched = True
        try:
            while True:
                if breaker.state is BreakerState.CLOSED:
                    changed.clear()
                    await changed.wait()
                    continue
                await sleep(max(least, breaker.retry_after()))
                if breaker.allow():
                    # A failure was told to the breaker and to `on_failure`, who log it.
                    with suppress(Unavailable):
                        await self._attempt(ping, timeout)
        finally:
            breaker.unsubscribe(wake)
            self._watched = False

    async def _attempt(self, work: Callable[[], Awaitable[T]], timeout: float) -> T:
        breaker = self.breaker
        period = breaker.period
        try:
            async with asyncio.timeout(timeout):
                answer = await work()
        except self._failures as error:
            breaker.failed(period)
            if self._on_failure is not None:
                self._on_failure(error)
            self.refuse(error)
        except Unavailable:
            breaker.failed(period)
            raise
        except NotifydError:
            breaker.succeeded(period)
            raise
        except BaseException:
            breaker.abandoned(period)
            raise
        breaker.succeeded(period)
        return answer
