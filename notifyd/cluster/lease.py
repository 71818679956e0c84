"""Something that one node of a cluster does at a time: a lease in Redis, renewed while it is held.

Who cannot renew it stops before it can have lapsed, by his own clock, so that no two hold it: his
time begins before he asks and ends `MARGIN` early. Clocks that run unlike by less than a twelfth
change nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import NoReturn

from notifyd.errors import Unavailable
from notifyd.redis_client import Redis, Script

TIME_TO_LIVE = 3.0
INTERVAL = 1.0
MARGIN = 0.25

_LUA = files("notifyd.cluster") / "lua"


class Lease:
    """A lease under `key`, asked for as `holder` (a name that no other node has).

    Seconds: it lives `time_to_live` after it was renewed, which is tried every `interval`. `clock`
    only grows. `on_change` is told whether it is held.
    """

    def __init__(
        self,
        redis: Redis,
        key: str,
        holder: str,
        *,
        time_to_live: float = TIME_TO_LIVE,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_change: Callable[[bool], None] = lambda held: None,
    ) -> None:
        self._redis = redis
        self._key = key
        self._holder = holder
        self._time_to_live = time_to_live
        self._interval = interval
        self._margin = min(MARGIN, time_to_live / 4)
        self._clock = clock
        self._sleep = sleep
        self._on_change = on_change
        self._until = float("-inf")
        self._told = False
        self._acquired = asyncio.Event()
        self._take = Script.read(_LUA / "lease.lua")
        self._release = Script.read(_LUA / "release.lua")

    @property
    def held(self) -> bool:
        """Whether it is ours now. Asked before every step that only its holder may take."""
        return self._clock() < self._until

    async def run(self) -> NoReturn:
        """Ask for the lease, or renew it, again and again, until cancelled."""
        while True:
            asked_at = self._clock()
            try:
                await self.renew()
            except Unavailable:
                self._tell()  # it may have lapsed; the client has logged why
            await self._sleep(max(0.0, asked_at + self._interval - self._clock()))

    async def renew(self) -> bool:
        """Ask once; whether it is held. Raises Unavailable."""
        asked_at = self._clock()
        milliseconds = int(self._time_to_live * 1000)
        ours = await self._redis.run(self._take, [self._key], [self._holder, milliseconds])
        self._until = asked_at + self._time_to_live - self._margin if ours else float("-inf")
        self._tell()
        return self.held

    async def acquired(self) -> None:
        """Return once it is held."""
        while not self.held:
            self._tell()
            await self._acquired.wait()

    async def lapsed(self) -> None:
        """Return once it is not held any more."""
        while (left := self._until - self._clock()) > 0:
            await self._sleep(min(left, self._interval))
        self._tell()

    async def release(self) -> None:
        """Give it up, so that another need not wait. Raises Unavailable; it lapses then."""
        held, self._until = self.held, float("-inf")
        self._tell()
        if held:
            await self._redis.run(self._release, [self._key], [self._holder])

    def _tell(self) -> None:
        held = self.held
        if held:
            self._acquired.set()
        else:
            self._acquired.clear()
        if held != self._told:
            self._told = held
            self._on_change(held)
