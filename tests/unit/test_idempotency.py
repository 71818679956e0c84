from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from notifyd.errors import RateLimited, Unavailable, ValidationError
from notifyd.eventually import is_awaitable, settled
from notifyd.idempotency import (
    Answered,
    FallbackIdempotencyKeys,
    Fresh,
    KeptAnswer,
    MemoryIdempotencyKeys,
    Replay,
    Scope,
    Wait,
    answer_once,
    fingerprint,
    key_scope,
)
from notifyd.options import IdempotencySettings

OK = KeptAnswer(200, b'{"success":true}')
A, B = fingerprint(b"a"), fingerprint(b"b")
SCOPE = key_scope("acme", "backend", "send", "k1")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def memory(
    window: int = 60, max_keys: int = 100, clock: Clock | None = None, **limits: int
) -> MemoryIdempotencyKeys:
    settings = IdempotencySettings(window_seconds=window, max_keys=max_keys)
    return MemoryIdempotencyKeys(settings, clock=clock or Clock(), **limits)


def scope(number: int) -> Scope:
    return key_scope("acme", "backend", "send", f"k{number}")


def fresh(keys: MemoryIdempotencyKeys, where: Scope = SCOPE, body: bytes = A) -> Fresh:
    claim = keys.claim(where, body)
    assert isinstance(claim, Fresh)
    return claim


def waiting(keys: MemoryIdempotencyKeys, where: Scope = SCOPE, body: bytes = A) -> Wait:
    claim = keys.claim(where, body)
    assert isinstance(claim, Wait)
    return claim


async def started(coroutine: Coroutine[Any, Any, Fresh | Replay]) -> asyncio.Task[Fresh | Replay]:
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


class TestKeyScope:
    @pytest.mark.parametrize("key", ["", "x" * 257, "ä" * 129])
    def test_refuses_a_key_without_or_over_256_bytes(self, key: str) -> None:
        with pytest.raises(ValidationError) as caught:
            key_scope("acme", "backend", "send", key)
        assert caught.value.field == "idempotency_key"

    def test_takes_256_bytes(self) -> None:
        key_scope("acme", "backend", "send", "ä" * 128)


class TestClaim:
    def test_the_first_works_and_the_next_gets_its_answer(self) -> None:
        keys = memory()
        fresh(keys).complete(OK)
        claim = keys.claim(SCOPE, A)
        assert claim == Replay(OK)

    def test_another_body_is_refused_at_work_and_after(self) -> None:
        keys = memory()
        first = fresh(keys)
        with pytest.raises(ValidationError):
            keys.claim(SCOPE, B)
        first.complete(OK)
        with pytest.raises(ValidationError) as caught:
            keys.claim(SCOPE, B)
        assert caught.value.field == "idempotency_key"

    @pytest.mark.parametrize("part", range(4))
    def test_every_part_of_the_scope_counts(self, part: int) -> None:
        keys = memory()
        fresh(keys).complete(OK)
        parts = list(SCOPE)
        parts[part] += "x"
        fresh(keys, (parts[0], parts[1], parts[2], parts[3]), B).abandon()

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_what_is_to_be_tried_again_is_not_kept(self, status: int) -> None:
        keys = memory()
        fresh(keys).complete(KeptAnswer(status, b""))
        assert len(keys) == 0
        fresh(keys, body=B).abandon()

    @pytest.mark.parametrize("status", [200, 201, 404, 422])
    def test_every_other_answer_is_kept(self, status: int) -> None:
        keys = memory()
        fresh(keys).complete(KeptAnswer(status, b"x"))
        assert keys.claim(SCOPE, A) == Replay(KeptAnswer(status, b"x"))

    def test_an_abandoned_key_is_free_for_any_body(self) -> None:
        keys = memory()
        fresh(keys).abandon()
        fresh(keys, body=B).abandon()
        assert len(keys) == 0

    def test_a_claim_ends_once(self) -> None:
        keys = memory()
        first = fresh(keys)
        first.complete(OK)
        first.abandon()
        with pytest.raises(RuntimeError):
            first.complete(OK)
        assert keys.claim(SCOPE, A) == Replay(OK)

    def test_a_claim_that_is_dropped_frees_its_key(self) -> None:
        keys = memory()
        first = fresh(keys)
        del first
        gc.collect()
        fresh(keys).abandon()


class TestBounds:
    def test_answers_are_kept_for_the_window(self) -> None:
        clock = Clock()
        keys = memory(window=60, clock=clock)
        first = fresh(keys)
        clock.now += 10
        first.complete(OK)
        clock.now += 59.9
        assert keys.claim(SCOPE, A) == Replay(OK)
        clock.now += 0.1
        fresh(keys, body=B).abandon()

    def test_expired_answers_go_as_new_keys_come(self) -> None:
        clock = Clock()
        keys = memory(window=60, clock=clock)
        for number in range(50):
            fresh(keys, scope(number)).complete(OK)
        clock.now += 60
        for number in range(100, 130):
            fresh(keys, scope(number)).complete(OK)
        assert len(keys) == 30

    def test_the_oldest_answers_go_first_and_keys_at_work_stay(self) -> None:
        keys = memory(max_keys=3)
        at_work = fresh(keys, scope(0))
        for number in range(1, 6):
            fresh(keys, scope(number)).complete(OK)
        assert len(keys) == 3
        waiting(keys, scope(0))
        assert keys.claim(scope(4), A) == Replay(OK)
        assert keys.claim(scope(5), A) == Replay(OK)
        fresh(keys, scope(3)).abandon()
        at_work.abandon()

    def test_no_more_than_max_keys_are_at_work(self) -> None:
        keys = memory(max_keys=2)
        first, second = fresh(keys, scope(1)), fresh(keys, scope(2))
        with pytest.raises(Unavailable) as caught:
            keys.claim(scope(3), A)
        assert caught.value.retry_after == 1
        first.complete(OK)
        second.complete(OK)
        fresh(keys, scope(3)).abandon()

    def test_the_bytes_of_answers_are_bounded(self) -> None:
        keys = memory(max_bytes=100)
        for number in range(3):
            fresh(keys, scope(number)).complete(KeptAnswer(200, b"x" * 40))
        assert len(keys) == 2
        fresh(keys, scope(3)).complete(KeptAnswer(200, b"x" * 101))
        assert len(keys) == 0
        fresh(keys, scope(4)).complete(KeptAnswer(200, b"x" * 100))
        assert len(keys) == 1


class TestWait:
    async def test_those_who_wait_get_the_answer(self) -> None:
        keys = memory()
        first = fresh(keys)
        tasks = [await started(keys.wait(SCOPE, A)) for _ in range(3)]
        first.complete(OK)
        assert await asyncio.gather(*tasks) == [Replay(OK)] * 3

    async def test_a_wait_awaited_too_late_gets_the_answer(self) -> None:
        keys = memory()
        first = fresh(keys)
        claim = waiting(keys)
        first.complete(OK)
        assert await claim.outcome() == Replay(OK)

    async def test_without_an_answer_the_first_who_waits_works(self) -> None:
        keys = memory()
        first = fresh(keys)
        second, third = [await started(keys.wait(SCOPE, A)) for _ in range(2)]
        first.complete(KeptAnswer(503, b""))
        mine = await second
        assert isinstance(mine, Fresh)
        assert not third.done()
        mine.complete(OK)
        assert await third == Replay(OK)

    async def test_one_who_gave_up_waiting_is_passed_over(self) -> None:
        keys = memory()
        first = fresh(keys)
        second, third = [await started(keys.wait(SCOPE, A)) for _ in range(2)]
        second.cancel()
        first.abandon()
        mine = await third
        assert isinstance(mine, Fresh)
        mine.abandon()
        assert second.cancelled()
        assert len(keys) == 0

    async def test_a_key_handed_to_one_who_is_cancelled_goes_on(self) -> None:
        keys = memory()
        first = fresh(keys)
        second, third = [await started(keys.wait(SCOPE, A)) for _ in range(2)]
        first.abandon()
        second.cancel()
        mine = await third
        assert isinstance(mine, Fresh)
        mine.abandon()

    async def test_waiters_are_bounded_and_free_their_places(self) -> None:
        keys = memory(max_waiters=2)
        first = fresh(keys)
        second, third = [await started(keys.wait(SCOPE, A)) for _ in range(2)]
        with pytest.raises(RateLimited):
            await keys.wait(SCOPE, A)
        second.cancel()
        await asyncio.wait([second])
        fourth = await started(keys.wait(SCOPE, A))
        first.complete(OK)
        assert {await third, await fourth} == {Replay(OK)}


class Later:
    """A store that must be awaited, as Redis and Postgres are: the same keys behind `await`."""

    def __init__(self) -> None:
        self.keys = memory()

    async def claim(
        self, where: Scope, body: bytes, *, alone: bool = False
    ) -> Fresh | Replay | Wait:
        await asyncio.sleep(0)
        claim = self.keys.claim(where, body)
        if not isinstance(claim, Replay):
            claim._keys = self
        return claim

    async def wait(self, where: Scope, body: bytes) -> Fresh | Replay:
        claim = await self.keys.wait(where, body)
        if isinstance(claim, Fresh):
            claim._keys = self
        return claim

    async def keep(self, claim: Fresh, answer: KeptAnswer) -> None:
        await asyncio.sleep(0)
        self.keys.keep(claim, answer)

    async def release(self, claim: Fresh) -> None:
        await asyncio.sleep(0)
        self.keys.release(claim)

    def lost(self, claim: Fresh) -> None:
        self.keys.lost(claim)


@pytest.fixture(params=[memory, Later])
def keys(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    return make()


async def resolved(answer: Any) -> Any:
    return await answer if is_awaitable(answer) else answer


class TestAnswerOnce:
    def test_in_memory_nothing_is_awaited(self) -> None:
        keys = memory()
        assert answer_once(keys, SCOPE, A, lambda: OK) == Answered(OK, replayed=False)
        assert answer_once(keys, SCOPE, A, lambda: OK) == Answered(OK, replayed=True)

    async def test_works_once(self, keys: Any) -> None:
        calls: list[int] = []

        def work() -> KeptAnswer:
            calls.append(1)
            return OK

        assert await resolved(answer_once(keys, SCOPE, A, work)) == Answered(OK, replayed=False)
        assert await resolved(answer_once(keys, SCOPE, A, work)) == Answered(OK, replayed=True)
        assert calls == [1]

    async def test_calls_at_once_share_one_answer(self, keys: Any) -> None:
        gate = asyncio.Event()
        at_work = asyncio.Event()
        calls: list[int] = []

        async def work() -> KeptAnswer:
            calls.append(1)
            at_work.set()
            await gate.wait()
            return OK

        tasks = [
            asyncio.ensure_future(resolved(answer_once(keys, SCOPE, A, work))) for _ in range(5)
        ]
        await at_work.wait()
        gate.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.replayed for answer in answers) == [False, True, True, True, True]
        assert calls == [1]

    async def test_an_error_frees_the_key(self, keys: Any) -> None:
        def fail() -> KeptAnswer:
            raise LookupError("no")

        async def fail_later() -> KeptAnswer:
            await asyncio.sleep(0)
            raise LookupError("no")

        for work in (fail, fail_later):
            with pytest.raises(LookupError):
                await resolved(answer_once(keys, SCOPE, A, work))
        assert await resolved(answer_once(keys, SCOPE, B, lambda: OK)) == Answered(OK, False)

    async def test_a_cancelled_worker_hands_over(self, keys: Any) -> None:
        at_work = asyncio.Event()

        async def never() -> KeptAnswer:
            at_work.set()
            await asyncio.Event().wait()
            raise AssertionError

        first = asyncio.ensure_future(resolved(answer_once(keys, SCOPE, A, never)))
        await at_work.wait()
        second = asyncio.ensure_future(resolved(answer_once(keys, SCOPE, A, lambda: OK)))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == Answered(OK, replayed=False)
        with pytest.raises(asyncio.CancelledError):
            await first

    async def test_a_worker_cancelled_before_its_first_step_hands_over(self) -> None:
        keys = memory()
        pending = answer_once(keys, SCOPE, A, asyncio.get_running_loop().create_future)
        assert asyncio.iscoroutine(pending)
        first = asyncio.create_task(pending)
        first.cancel()
        await asyncio.wait([first])
        del first, pending
        gc.collect()
        assert answer_once(keys, SCOPE, A, lambda: OK) == Answered(OK, replayed=False)


class Store:
    """Keys that several nodes share, as Redis has them; `down` is a fault that a test switches."""

    def __init__(self) -> None:
        self.down = False
        self.asked = 0
        self._memory = memory()
        self._claims: dict[int, Fresh] = {}

    def _reach(self) -> None:
        self.asked += 1
        if self.down:
            raise Unavailable("The store is down.")

    def _shown(self, claim: Fresh | Replay | Wait, body: bytes) -> Fresh | Replay | Wait:
        if isinstance(claim, Replay):
            return claim
        if isinstance(claim, Wait):
            return Wait(self, claim._scope, body)
        shown = Fresh(self, claim.scope)
        self._claims[id(shown)] = claim
        return shown

    async def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Fresh | Replay | Wait:
        self._reach()
        await asyncio.sleep(0)
        if alone and self._memory._working.pop(scope, None) is not None:
            for each in self._claims.values():
                if each.scope == scope:
                    each._ended = True
        return self._shown(self._memory.claim(scope, fingerprint), fingerprint)

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        self._reach()
        shown = self._shown(await self._memory.wait(scope, fingerprint), fingerprint)
        assert not isinstance(shown, Wait)
        return shown

    async def keep(self, claim: Fresh, answer: KeptAnswer) -> None:
        self._reach()
        self._claims.pop(id(claim)).complete(answer)

    async def release(self, claim: Fresh) -> None:
        self._reach()
        self._claims.pop(id(claim)).abandon()

    def lost(self, claim: Fresh) -> None:
        # The claim on the memory behind goes with it, and says so itself.
        del self._claims[id(claim)]


async def claimed(
    keys: FallbackIdempotencyKeys, where: Scope = SCOPE, body: bytes = A
) -> Fresh | Replay | Wait:
    claim: Fresh | Replay | Wait = await settled(keys.claim(where, body))
    return claim


async def ours(keys: FallbackIdempotencyKeys, where: Scope = SCOPE, body: bytes = A) -> Fresh:
    claim = await claimed(keys, where, body)
    assert isinstance(claim, Fresh)
    return claim


async def others(keys: FallbackIdempotencyKeys, where: Scope = SCOPE, body: bytes = A) -> Wait:
    claim = await claimed(keys, where, body)
    assert isinstance(claim, Wait)
    return claim


class TestFallback:
    def nodes(self) -> tuple[Store, FallbackIdempotencyKeys, FallbackIdempotencyKeys]:
        store = Store()
        return (
            store,
            FallbackIdempotencyKeys(store, memory()),
            FallbackIdempotencyKeys(store, memory()),
        )

    async def test_an_answer_is_known_to_every_node(self) -> None:
        _, one, other = self.nodes()
        await settled((await ours(one)).complete(OK))
        for node in (one, other):
            assert await claimed(node) == Replay(OK)

    async def test_what_this_node_knows_it_says_at_once(self) -> None:
        store, one, _ = self.nodes()
        claim = await ours(one)
        asked = store.asked
        waiting = one.claim(SCOPE, A)
        assert isinstance(waiting, Wait)
        await settled(claim.complete(OK))
        assert one.claim(SCOPE, A) == Replay(OK)
        assert store.asked == asked + 1

    async def test_the_same_key_at_another_node_waits(self) -> None:
        _, one, other = self.nodes()
        claim = await ours(one)
        outcome = await started((await others(other)).outcome())  # type: ignore[arg-type]  # is one
        behind = await started((await others(other)).outcome())  # type: ignore[arg-type]  # is one
        await settled(claim.complete(OK))
        assert await outcome == Replay(OK)
        assert await behind == Replay(OK)

    async def test_who_is_alone_takes_over_what_another_left_and_waits_for_himself(self) -> None:
        _, dead, one = self.nodes()
        left = await ours(dead)
        assert isinstance(await claimed(one), Wait)
        claim = await settled(one.claim(SCOPE, A, alone=True))
        assert isinstance(claim, Fresh)
        behind = await settled(one.claim(SCOPE, A, alone=True))
        assert isinstance(behind, Wait)
        await settled(claim.complete(OK))
        assert await behind.outcome() == Replay(OK)
        del left

    async def test_who_waited_works_where_the_first_gave_up(self) -> None:
        _, one, other = self.nodes()
        claim = await ours(one)
        outcome = await started((await others(other)).outcome())  # type: ignore[arg-type]  # is one
        await settled(claim.abandon())
        again = await outcome
        assert isinstance(again, Fresh)
        await settled(again.complete(OK))
        assert await claimed(one) == Replay(OK)

    async def test_who_waits_at_this_node_works_where_the_first_gave_up(self) -> None:
        _, one, other = self.nodes()
        claim = await ours(one)
        outcome = await started((await others(one)).outcome())  # type: ignore[arg-type]  # is one
        await settled(claim.abandon())
        again = await outcome
        assert isinstance(again, Fresh)
        assert isinstance(await claimed(other), Wait)

    async def test_another_body_is_refused_by_either(self) -> None:
        _, one, other = self.nodes()
        await settled((await ours(one)).complete(OK))
        for node in (one, other):
            with pytest.raises(ValidationError):
                await claimed(node, body=B)
        assert await claimed(other) == Replay(OK)

    async def test_while_the_store_is_down_this_node_remembers(self) -> None:
        store, one, _ = self.nodes()
        await settled((await ours(one, scope(1))).complete(OK))
        store.down = True
        assert await claimed(one, scope(1)) == Replay(OK)
        claim = await ours(one, scope(2))
        outcome = await started((await others(one, scope(2))).outcome())  # type: ignore[arg-type]  # is one
        await settled(claim.complete(OK))
        assert await outcome == Replay(OK)
        assert await claimed(one, scope(2)) == Replay(OK)

    async def test_a_store_that_goes_away_meanwhile_keeps_nobody_from_his_answer(self) -> None:
        store, one, _ = self.nodes()
        claim, abandoned = await ours(one, scope(1)), await ours(one, scope(2))
        store.down = True
        assert isinstance(await claimed(one, scope(1)), Wait)
        await settled(claim.complete(OK))
        assert await claimed(one, scope(1)) == Replay(OK)
        await settled(abandoned.abandon())
        assert isinstance(await claimed(one, scope(2)), Fresh)

    async def test_who_would_wait_for_another_node_works_when_the_store_goes_away(self) -> None:
        store, one, other = self.nodes()
        claim = await ours(one)
        waiting = await others(other)
        store.down = True
        assert isinstance(await waiting.outcome(), Fresh)
        store.down = False
        await settled(claim.abandon())

    async def test_what_is_lost_is_free_again(self) -> None:
        _, one, other = self.nodes()
        claim: object = await ours(one)
        waiting: object = await others(other)
        del claim, waiting
        gc.collect()
        kept = await ours(other)
        assert isinstance(await claimed(one), Wait)
        await settled(kept.abandon())

    async def test_cancelled_while_the_store_is_asked_it_leaves_the_key_free(self) -> None:
        _, one, other = self.nodes()
        for node in (one, other):
            task = asyncio.ensure_future(claimed(node))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert isinstance(await claimed(one), Fresh)

    async def test_cancelled_while_it_waits_for_another_node(self) -> None:
        _, one, other = self.nodes()
        claim = await ours(one)
        outcome = await started((await others(other)).outcome())  # type: ignore[arg-type]  # is one
        outcome.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outcome
        await settled(claim.abandon())
        assert isinstance(await claimed(other), Fresh)

    async def test_answer_once_with_a_store_that_comes_and_goes(self) -> None:
        store, one, other = self.nodes()
        worked = 0

        async def work() -> KeptAnswer:
            nonlocal worked
            worked += 1
            store.down = True
            return OK

        for replayed in (False, True):
            answered = await settled(answer_once(one, SCOPE, A, work))
            assert answered == Answered(OK, replayed=replayed)
        assert worked == 1
        store.down = False
        # The lease of a store's claim that could not be ended runs out in the store.
        assert isinstance(await claimed(other), Wait)
