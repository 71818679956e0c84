"""Something that one node of a cluster does at a time: a lease in Redis, renewed while it is held.

Who cannot renew it stops before it can have lapsed, by his own clock, so that no two hold it: his
time begins before he asks and ends `MARGIN` early. Clocks that run unlike by less than a twelfth
change nothing.

Redis may forget it (a failover, a restart without its data, FLUSHALL) while its holder goes on. So
what is written of a lease outlives it, and where nothing is to be found only its holder gets it, by
renewing it, until he cannot believe any more that he has it.
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
    only grows. `on_change` is told whether it is held. With `shared` False nobody is waited for who
    may hold it where Redis knows nothing: of a server that is the only one.
    """

    def __init__(
        self,
        redis: Redis,
        key: str,
        holder: str,
        *,
        shared: bool = True,
        time_to_live: float = TIME_TO_LIVE,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_change: Callable[[bool], None] = lambda held: None,
    ) -> None:
        self._redis = redis
        self._key = key
        self._holder = holder
        self._shared = shared
        self._time_to_live = time_to_live
        self._interval = interval
        self._margin = min(MARGIN, time_to_live / 4)
        self._clock = clock
        self._sleep = sleep
        self._on_change = on_change
        self._until = float("-inf")
        # When another's lapses, as far as is known.
        self._lapses_at = float("inf")
        self._asking: asyncio.Task[None] | None = None
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
            again_at = self._clock() + self._interval
            await self._ask()
            await self._sleep(max(0.0, min(again_at, self._lapses_at) - self._clock()))

    def ask(self) -> None:
        """Ask at once, for it was given up."""
        self._asking = asyncio.ensure_future(self._ask())

    async def _ask(self) -> None:
        try:
            await self.renew()
        except Unavailable:
            self._tell()  # it may have lapsed; the client has logged why

    async def renew(self) -> bool:
        """Ask once; whether it is held. Raises Unavailable."""
        asked_at = self._clock()
        self._lapses_at = float("inf")
        args = (self._holder, int(self._time_to_live * 1000), int(self.held or not self._shared))
        left = await self._redis.run(self._take, [self._key], args)
        if left:
            self._until = float("-inf")
            self._lapses_at = self._clock() + left / 1000
        else:
            self._until = asked_at + self._time_to_live - self._margin
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

    async def release(self) -> bool:
        """Give it up, so that another need not wait; whether it was held. Raises Unavailable; it
        lapses then."""
        if self._asking is not None:
            self._asking.cancel()
        held, self._until = self.held, float("-inf")
        self._tell()
        if held:
            await self._redis.run(self._release, [self._key], [self._holder])
        return held

    def _tell(self) -> None:
        held = self.held
        if held:
            self._acquired.set()
        else:
            self._acquired.clear()
        if held != self._told:
            self._told = held
            self._on_change(held)
