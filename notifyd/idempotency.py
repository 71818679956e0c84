"""Idempotency keys: a call repeated with its key gets the first answer, and delivers nothing twice.

    claim = keys.claim(key_scope(tenant, principal, route, key), fingerprint(body))
    Fresh   -> do the work, then `complete(answer)`; `abandon()` where there is no answer
    Replay  -> give `answer` again, marked `Idempotent-Replay: true`
    Wait    -> the first call is still at work: `await claim.outcome()` gives Fresh or Replay

`answer_once` is that, written once. A call without a key costs nothing: nothing here is called.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol, TypeAlias

import msgspec

from notifyd.errors import RateLimited, Unavailable, ValidationError
from notifyd.eventually import Eventually, settled
from notifyd.options import IdempotencySettings

MAX_KEY_BYTES = 256

MAX_KEPT_BYTES = 256 * 1024 * 1024
"""Bytes of answers kept in memory; a send to 10,000 users has an answer of half a megabyte."""

MAX_WAITERS = 100
"""Calls that wait for one other call's answer."""

_EXPIRED_PER_CLAIM = 2
"""Expired answers that a claim clears away: more than it can add, so that none pile up."""

Scope: TypeAlias = tuple[str, str, str, str]
"""Tenant, API key's name, route, key: the same key within another of these is another key."""


class KeptAnswer(msgspec.Struct, frozen=True, gc=False):
    """An answer as it goes out: HTTP status and body."""

    status: int
    body: bytes

    @property
    def keepable(self) -> bool:
        """False for 429 and 5xx: their caller is meant to try again."""
        return self.status < 500 and self.status != 429


def key_scope(tenant: str, principal: str, route: str, key: str) -> Scope:
    """The scope of a caller's key. Raises ValidationError where it has not 1 to 256 bytes."""
    if not key or len(key) > MAX_KEY_BYTES or len(key.encode()) > MAX_KEY_BYTES:
        raise ValidationError(
            f"An idempotency key must have 1 to {MAX_KEY_BYTES} bytes.",
            field="idempotency_key",
            constraint=f"1 to {MAX_KEY_BYTES} bytes",
        )
    return tenant, principal, route, key


def fingerprint(body: bytes) -> bytes:
    """What tells one body from another: 16 bytes of BLAKE2b (RFC 7693)."""
    return hashlib.blake2b(body, digest_size=16).digest()


class Fresh:
    """The key is the caller's: he works, and ends with `complete` or `abandon`."""

    __slots__ = ("_ended", "_keys", "scope")

    def __init__(self, keys: IdempotencyKeys, scope: Scope) -> None:
        self.scope = scope
        self._keys = keys
        self._ended = False

    def complete(self, answer: KeptAnswer) -> Eventually[None]:
        """Keep the answer and give it to those who wait; 429 and 5xx are abandoned instead.

        Raises RuntimeError after an end.
        """
        if self._ended:
            raise RuntimeError("this claim has ended already")
        self._ended = True
        return self._keys.keep(self, answer) if answer.keepable else self._keys.release(self)

    def abandon(self) -> Eventually[None]:
        """Give the key up: the first of those who wait works instead. Nothing after an end."""
        if self._ended:
            return None
        self._ended = True
        return self._keys.release(self)

    def __del__(self) -> None:
        # A task that is cancelled before its first step never runs the code that would abandon.
        if not self._ended:
            self._keys.lost(self)


class Replay(msgspec.Struct, frozen=True, gc=False):
    """The work was done before; this is what was answered."""

    answer: KeptAnswer


class Wait:
    """Another call with this key is at work. Costs nothing until its outcome is awaited."""

    __slots__ = ("_fingerprint", "_keys", "_scope")

    def __init__(self, keys: IdempotencyKeys, scope: Scope, fingerprint: bytes) -> None:
        self._keys = keys
        self._scope = scope
        self._fingerprint = fingerprint

    def outcome(self) -> Awaitable[Fresh | Replay]:
        """The other call's answer; or the key, where that ended without one that is kept.

        Cancelled, it gives up its place, and the key too if it had just got it. Raises RateLimited
        where too many wait already.
        """
        return self._keys.wait(self._scope, self._fingerprint)


class IdempotencyKeys(Protocol):
    """Where keys and their answers are kept."""

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Eventually[Fresh | Replay | Wait]:
        """Who works on this key.

        `alone`: no other process works on keys of this route, so that a key at which another is
        said to be at work is taken over from it; of this process's own calls the caller knows.
        Raises ValidationError where its body was another one, Unavailable where no more keys can
        be at work.
        """
        ...

    def wait(self, scope: Scope, fingerprint: bytes) -> Awaitable[Fresh | Replay]:
        """What `Wait.outcome` says."""
        ...

    def keep(self, claim: Fresh, answer: KeptAnswer) -> Eventually[None]:
        """What `Fresh.complete` says, of an answer that is kept."""
        ...

    def release(self, claim: Fresh) -> Eventually[None]:
        """What `Fresh.abandon` says."""
        ...

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it, now or by a lease that runs out."""
        ...


class Answered(msgspec.Struct, frozen=True, gc=False):
    """An answer, and whether it is the first one again (`Idempotent-Replay: true`)."""

    answer: KeptAnswer
    replayed: bool


def answer_once(
    keys: IdempotencyKeys,
    scope: Scope,
    fingerprint: bytes,
    work: Callable[[], Eventually[KeptAnswer]],
) -> Eventually[Answered]:
    """The answer of `work`, done at most once for a key; immediate where nothing must be awaited.

    `work` makes answers of the errors that are answers (a 404 is kept). What it raises comes out
    unchanged and frees the key; so does cancellation. Raises what `claim` and `wait` raise.
    """
    claim = keys.claim(scope, fingerprint)
    if isinstance(claim, Fresh | Replay | Wait):
        return _answer(claim, work)
    return _answer_claimed(claim, work)


async def _answer_claimed(
    claim: Awaitable[Fresh | Replay | Wait], work: Callable[[], Eventually[KeptAnswer]]
) -> Answered:
    return await settled(_answer(await claim, work))


def _answer(
    claim: Fresh | Replay | Wait, work: Callable[[], Eventually[KeptAnswer]]
) -> Eventually[Answered]:
    if isinstance(claim, Replay):
        return Answered(claim.answer, replayed=True)
    if isinstance(claim, Wait):
        return _answer_claimed(claim.outcome(), work)
    try:
        answer = work()
    except BaseException as error:
        released = claim.abandon()
        if released is None:
            raise
        return _raise_after(released, error)
    if not isinstance(answer, KeptAnswer):
        return _answer_awaited(claim, answer)
    kept = claim.complete(answer)
    answered = Answered(answer, replayed=False)
    return answered if kept is None else _return_after(kept, answered)


async def _answer_awaited(claim: Fresh, answer: Awaitable[KeptAnswer]) -> Answered:
    try:
        done = await answer
    except BaseException:
        await settled(claim.abandon())
        raise
    await settled(claim.complete(done))
    return Answered(done, replayed=False)


async def _raise_after(released: Awaitable[None], error: BaseException) -> Answered:
    await released
    raise error


async def _return_after(kept: Awaitable[None], answered: Answered) -> Answered:
    await kept
    return answered


class _Working:
    """A key at work, and those who wait for it, the first in front."""

    __slots__ = ("fingerprint", "waiters")

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.waiters: deque[asyncio.Future[Fresh | Replay]] | None = None


class _Kept(msgspec.Struct, frozen=True, gc=False):
    fingerprint: bytes
    answer: KeptAnswer
    expires_at: float


class MemoryIdempotencyKeys:
    """Keys in this process: the last `max_keys`, and `max_bytes` of answers.

    The oldest answers go first, whether their time is up or not; keys at work stay. Everything but
    `wait` is immediate and belongs to the event loop's thread. `clock` is in seconds.
    """

    def __init__(
        self,
        settings: IdempotencySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_KEPT_BYTES,
        max_waiters: int = MAX_WAITERS,
    ) -> None:
        self._window = settings.window_seconds
        self._max_keys = settings.max_keys
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_waiters = max_waiters
        self._working: dict[Scope, _Working] = {}
        # Not a dict: finding the oldest in one that loses its oldest all the time is linear.
        self._kept: OrderedDict[Scope, _Kept] = OrderedDict()
        self._kept_bytes = 0

    def __len__(self) -> int:
        """Keys known, those at work included."""
        return len(self._kept) + len(self._working)

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Fresh | Replay | Wait:
        """Who works on this key; no other process ever does.

        Raises ValidationError where its body was another one, Unavailable where `max_keys` are at
        work.
        """
        now = self._clock()
        kept = self._kept.get(scope)
        if kept is not None:
            if kept.expires_at > now:
                _check_same_body(kept.fingerprint, fingerprint)
                return Replay(kept.answer)
            self._forget(scope)
        working = self._working.get(scope)
        if working is not None:
            _check_same_body(working.fingerprint, fingerprint)
            return Wait(self, scope, fingerprint)
        if len(self._working) >= self._max_keys:
            raise Unavailable(
                "Too many calls with an idempotency key are in progress.", retry_after=1
            )
        if self._kept:
            self._make_room(now)
        self._working[scope] = _Working(fingerprint)
        return Fresh(self, scope)

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says."""
        claim = self.claim(scope, fingerprint)
        if not isinstance(claim, Wait):
            return claim
        working = self._working[scope]
        waiters = working.waiters
        if waiters is None:
            waiters = working.waiters = deque()
        if len(waiters) >= self._max_waiters:
            raise RateLimited(
                "Too many calls wait for the answer of one idempotency key.", retry_after=1
            )
        waiter: asyncio.Future[Fresh | Replay] = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                if waiter in waiters:
                    waiters.remove(waiter)
            elif isinstance(outcome := waiter.result(), Fresh):
                # The key was handed over and the cancellation came before this task ran again.
                outcome.abandon()
            raise

    def keep(self, claim: Fresh, answer: KeptAnswer) -> None:
        """What `Fresh.complete` says, of an answer that is kept."""
        working = self._working.pop(claim.scope)
        expires_at = self._clock() + self._window
        self._kept[claim.scope] = _Kept(working.fingerprint, answer, expires_at)
        self._kept_bytes += len(answer.body)
        while self._kept_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))
        for waiter in working.waiters or ():
            if not waiter.done():
                waiter.set_result(Replay(answer))

    def release(self, claim: Fresh) -> None:
        """What `Fresh.abandon` says."""
        waiters = self._working[claim.scope].waiters
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(Fresh(self, claim.scope))
                return
        del self._working[claim.scope]

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it now."""
        self.release(claim)

    def _make_room(self, now: float) -> None:
        """Evicts expired keys, else the oldest."""
        kept = self._kept
        for _ in range(min(_EXPIRED_PER_CLAIM, len(kept))):
            oldest = next(iter(kept))
            full = len(kept) + len(self._working) >= self._max_keys
            if not full and kept[oldest].expires_at > now:
                return
            self._forget(oldest)

    def _forget(self, scope: Scope) -> None:
        self._kept_bytes -= len(self._kept.pop(scope).answer.body)


class _Shared(Fresh):
    """A key that is this node's both in its memory and in the store."""

    __slots__ = ("local", "stored")

    def __init__(self, keys: FallbackIdempotencyKeys, local: Fresh, stored: Fresh) -> None:
        super().__init__(keys, local.scope)
        self.local = local
        self.stored = stored


class _WaitForOthers(Wait):
    """Another node is at work; here, others wait behind `local`."""

    __slots__ = ("_local", "_shared_keys")

    def __init__(self, keys: FallbackIdempotencyKeys, local: Fresh, fingerprint: bytes) -> None:
        super().__init__(keys, local.scope, fingerprint)
        self._shared_keys = keys
        self._local = local

    def outcome(self) -> Awaitable[Fresh | Replay]:
        """What `Wait.outcome` says."""
        return self._shared_keys.wait_for_others(self._local, self._fingerprint)


class FallbackIdempotencyKeys:
    """Keys in a store that all nodes share, and in this node's memory, which is asked first.

    While the store is down the memory stands in: a call repeated at this node delivers nothing
    twice, whether it came first before or during that. Of calls with one key only one at a time
    asks the store; nothing it says of being down reaches a caller.
    """

    def __init__(self, store: IdempotencyKeys, memory: MemoryIdempotencyKeys) -> None:
        self._store = store
        self._memory = memory

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Eventually[Fresh | Replay | Wait]:
        """Who works on this key; immediate where this node knows.

        Raises ValidationError where its body was another one, Unavailable where no more keys can
        be at work at this node.
        """
        local = self._memory.claim(scope, fingerprint)
        if isinstance(local, Fresh):
            return self._claim_stored(local, fingerprint, alone)
        return Wait(self, scope, fingerprint) if isinstance(local, Wait) else local

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says."""
        local = await self._memory.wait(scope, fingerprint)
        if isinstance(local, Replay):
            return local
        return await self.wait_for_others(local, fingerprint)

    async def wait_for_others(self, local: Fresh, fingerprint: bytes) -> Fresh | Replay:
        """The outcome in the store of a key that is ours in memory."""
        try:
            stored = await self._store.wait(local.scope, fingerprint)
        except Unavailable:
            return local
        except BaseException:
            local.abandon()
            raise
        return self._joined(local, stored)

    async def _claim_stored(
        self, local: Fresh, fingerprint: bytes, alone: bool
    ) -> Fresh | Replay | Wait:
        try:
            stored: Fresh | Replay | Wait
            stored = await settled(self._store.claim(local.scope, fingerprint, alone=alone))
        except Unavailable:
            return local
        except BaseException:
            local.abandon()
            raise
        if isinstance(stored, Wait):
            return _WaitForOthers(self, local, fingerprint)
        return self._joined(local, stored)

    def _joined(self, local: Fresh, stored: Fresh | Replay) -> Fresh | Replay:
        if isinstance(stored, Fresh):
            return _Shared(self, local, stored)
        local.complete(stored.answer)
        return stored

    async def keep(self, claim: Fresh, answer: KeptAnswer) -> None:
        """What `Fresh.complete` says. Where the store is down, this node alone knows the answer."""
        assert isinstance(claim, _Shared)  # noqa: S101  # for the type checker: we gave it out
        claim.local.complete(answer)
        # What was done was done: its caller hears of it, and not of the store.
        with suppress(Unavailable):
            await settled(claim.stored.complete(answer))

    async def release(self, claim: Fresh) -> None:
        """What `Fresh.abandon` says. Where the store is down, the key's lease there runs out."""
        assert isinstance(claim, _Shared)  # noqa: S101  # for the type checker: we gave it out
        claim.local.abandon()
        with suppress(Unavailable):
            await settled(claim.stored.abandon())

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end, and with it those in memory and store, which each
        say so themselves."""


def _check_same_body(first: bytes, second: bytes) -> None:
    if first != second:
        raise ValidationError(
            "This idempotency key was used for another body.",
            field="idempotency_key",
            constraint="one body for each key",
        )
