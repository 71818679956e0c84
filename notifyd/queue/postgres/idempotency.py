"""Idempotency keys in PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import TypeAlias

import msgspec

from notifyd.errors import RateLimited, Unavailable, ValidationError
from notifyd.idempotency import MAX_WAITERS, Fresh, KeptAnswer, Replay, Scope, Wait
from notifyd.postgres import CLOSE_SECONDS, Connection, Postgres, Turn
from notifyd.queue.postgres.calls import (
    CALL_BYTES,
    QUERIES,
    ROWS_PER_BATCH,
    Call,
    new_future,
    resolve,
    take_some,
)

LEASE_SECONDS = 60.0
"""Who works on an idempotency key and does not end loses it after so long."""

_POLL_FIRST_SECONDS = 0.05
_POLL_LONGEST_SECONDS = 1.0


class _Claim(Call, eq=False):
    scope: Scope
    digest: bytes
    fingerprint: bytes
    alone: bool


class _End(Call, eq=False):
    """`answer` None: without one that is kept."""

    scope: Scope
    digest: bytes
    answer: KeptAnswer | None

    @property
    def weight(self) -> int:
        return CALL_BYTES + (0 if self.answer is None else len(self.answer.body))


_KeyCall: TypeAlias = "_Claim | _End"


class _Key(msgspec.Struct, frozen=True, gc=False):
    """What is known of a key that was not given."""

    fingerprint: bytes
    answer: KeptAnswer | None


def _digest(scope: Scope) -> bytes:
    """32 bytes for a scope, whose parts cannot run into each other."""
    digest = blake2b(digest_size=32)
    for part in scope:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "big"))
        digest.update(text)
    return digest.digest()


class PostgresIdempotencyKeys:
    """`IdempotencyKeys` in PostgreSQL, shared by all who use the same database.

    Who claims a key has it for 60 s; if it did not end by then (its process died), the next one
    works. Who waits for another process's answer looks again after 50 ms, later once a second.
    `clock` is in Unix seconds.
    """

    def __init__(
        self,
        postgres: Postgres,
        *,
        window_seconds: float,
        clock: Callable[[], float],
        max_waiters: int = MAX_WAITERS,
    ) -> None:
        self._postgres = postgres
        self._window_seconds = window_seconds
        self._clock = clock
        self._max_waiters = max_waiters
        self._owner = os.urandom(16)
        self._working: set[Scope] = set()
        self._waiting: dict[Scope, set[asyncio.Future[None]]] = {}
        self._calls: Turn[_KeyCall] = postgres.turn(self._work, take=take_some(ROWS_PER_BATCH))

    async def aclose(self) -> None:
        """Keep the answers that wait, for two seconds at most; keys that are still at work are
        given up as their lease runs out."""
        await self._calls.aclose(CLOSE_SECONDS)

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Awaitable[Fresh | Replay | Wait]:
        """Who works on this key.

        Raises ValidationError where its body was another one, Unavailable. Cancelled, it gives the
        key up if it just got it.
        """
        call = _Claim(scope, _digest(scope), fingerprint, alone)
        self._calls.add(call)
        return call.future

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says. Raises Unavailable too."""
        if len(self._waiting.get(scope, ())) >= self._max_waiters:
            raise RateLimited(
                "Too many calls wait for the answer of one idempotency key.", retry_after=1
            )
        pause = _POLL_FIRST_SECONDS
        while True:
            # Listens before it claims, so that it misses no end that comes after that.
            ended = new_future()
            self._waiting.setdefault(scope, set()).add(ended)
            try:
                claim = await self.claim(scope, fingerprint)
                if not isinstance(claim, Wait):
                    return claim
                here = scope in self._working
                await asyncio.wait((ended,), timeout=_POLL_LONGEST_SECONDS if here else pause)
                pause = min(2 * pause, _POLL_LONGEST_SECONDS)
            finally:
                self._stop_waiting(scope, ended)

    def _stop_waiting(self, scope: Scope, ended: asyncio.Future[None]) -> None:
        waiting = self._waiting[scope]
        waiting.discard(ended)
        if not waiting:
            del self._waiting[scope]

    def keep(self, claim: Fresh, answer: KeptAnswer) -> Awaitable[None]:
        """What `Fresh.complete` says, of an answer that is kept. Raises Unavailable."""
        return self._end(claim, answer)

    def release(self, claim: Fresh) -> Awaitable[None]:
        """What `Fresh.abandon` says. Raises Unavailable: the key is free when its lease ends."""
        return self._end(claim, None)

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it, or leave it to its lease."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        # Whoever lost it waits for nothing; where this fails, the lease runs out.
        with suppress(Unavailable):
            self._end(claim, None).add_done_callback(asyncio.Future.exception)

    def _end(self, claim: Fresh, answer: KeptAnswer | None) -> asyncio.Future[None]:
        scope = claim.scope
        call = _End(scope, _digest(scope), answer)
        # Also where it never gets as far as the store.
        call.future.add_done_callback(lambda _: self._working.discard(scope))
        try:
            self._calls.add(call)
        except Unavailable:
            call.future.cancel()
            raise
        return call.future

    async def _work(self, batch: Sequence[_KeyCall]) -> None:
        """First what ends, then what begins, so that a key can go from one to the next."""
        ends = [call for call in batch if isinstance(call, _End)]
        claims = [call for call in batch if isinstance(call, _Claim)]
        if ends:
            await self._put_ends(ends)
        if claims:
            await self._give(claims)

    async def _put_ends(self, calls: Sequence[_End]) -> None:
        kept = [(call.digest, call.answer) for call in calls if call.answer is not None]
        released = [call.digest for call in calls if call.answer is None]

        async def work(connection: Connection) -> None:
            await connection.fetch(QUERIES["lock_keys"], [call.digest for call in calls])
            if kept:
                await connection.execute(
                    QUERIES["keep_answers"],
                    [digest for digest, _ in kept],
                    [answer.status for _, answer in kept],
                    [answer.body for _, answer in kept],
                    self._clock() + self._window_seconds,
                    self._owner,
                )
            if released:
                await connection.execute(QUERIES["release_keys"], released, self._owner)

        try:
            await self._postgres.transaction(work, calls=len(calls))
        finally:
            for call in calls:
                self._working.discard(call.scope)
        for call in calls:
            resolve(call.future, None)
            for waiter in self._waiting.get(call.scope, ()):
                resolve(waiter, None)

    async def _give(self, calls: Sequence[_Claim]) -> None:
        first: dict[bytes, _Claim] = {}
        for call in calls:
            first.setdefault(call.digest, call)
        now = self._clock()

        async def work(connection: Connection) -> tuple[set[bytes], dict[bytes, _Key]]:
            rows = await connection.fetch(
                QUERIES["claim_keys"],
                list(first),
                [call.fingerprint for call in first.values()],
                self._owner,
                now + LEASE_SECONDS,
                now,
                [digest for digest, call in first.items() if call.alone],
            )
            given = {row["scope"] for row in rows}
            taken = [digest for digest in first if digest not in given]
            known = {}
            if taken:
                for digest, fingerprint, status, body in await connection.fetch(
                    QUERIES["find_keys"], taken
                ):
                    answer = None if status is None else KeptAnswer(status, body)
                    known[digest] = _Key(fingerprint, answer)
            await connection.execute(QUERIES["forget_keys"], now, 2 * len(first))
            return given, known

        given, known = await self._postgres.transaction(work, calls=len(calls))
        for call in calls:
            self._answer(call, first[call.digest], given, known)

    def _answer(
        self, call: _Claim, first: _Claim, given: set[bytes], known: dict[bytes, _Key]
    ) -> None:
        if call.digest in given:
            if call is first:
                self._working.add(call.scope)
                # Where nobody takes it any more, it is lost and released.
                resolve(call.future, Fresh(self, call.scope))
                return
            key = _Key(first.fingerprint, None)
        else:
            # One that is gone again was released just now: whoever waits will get it.
            key = known.get(call.digest, _Key(call.fingerprint, None))
        if call.future.done():
            return
        if key.fingerprint != call.fingerprint:
            call.future.set_exception(
                ValidationError(
                    "This idempotency key was used for another body.",
                    field="idempotency_key",
                    constraint="one body for each key",
                )
            )
        elif key.answer is not None:
            call.future.set_result(Replay(key.answer))
        else:
            call.future.set_result(Wait(self, call.scope, call.fingerprint))
