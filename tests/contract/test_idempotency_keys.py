"""What `IdempotencyKeys` promises, whatever keeps it. Memory's own bounds: tests/unit."""

from __future__ import annotations

import asyncio

import pytest

from notifyd.errors import ValidationError
from notifyd.eventually import settled
from notifyd.idempotency import (
    Answered,
    Fresh,
    IdempotencyKeys,
    KeptAnswer,
    MemoryIdempotencyKeys,
    Replay,
    Scope,
    Wait,
    answer_once,
    fingerprint,
    key_scope,
)
from tests.contract.backends import Backend, Clock

OK = KeptAnswer(200, '{"text":"ä"}'.encode())
A, B = fingerprint(b"a"), fingerprint(b"b")
SCOPE = key_scope("acme", "backend", "/send", "k1")


async def fresh(keys: IdempotencyKeys, scope: Scope = SCOPE, body: bytes = A) -> Fresh:
    claim = await settled(keys.claim(scope, body))
    assert isinstance(claim, Fresh)
    return claim


class TestClaims:
    async def test_the_first_works_the_next_gets_its_answer(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        await settled((await fresh(keys)).complete(OK))
        for _ in range(2):
            assert await settled(keys.claim(SCOPE, A)) == Replay(OK)

    async def test_another_body_is_refused_at_work_and_after(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        claim = await fresh(keys)
        with pytest.raises(ValidationError):
            await settled(keys.claim(SCOPE, B))
        await settled(claim.complete(OK))
        with pytest.raises(ValidationError):
            await settled(keys.claim(SCOPE, B))

    @pytest.mark.parametrize("part", range(4))
    async def test_every_part_of_the_scope_counts(self, backend: Backend, part: int) -> None:
        keys = await backend.idempotency_keys()
        await settled((await fresh(keys)).complete(OK))
        parts = list(SCOPE)
        parts[part] = "other"
        await settled((await fresh(keys, (parts[0], parts[1], parts[2], parts[3]))).abandon())

    async def test_parts_do_not_run_into_each_other(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        await settled((await fresh(keys, key_scope("a", "b:c", "/r", "k"))).complete(OK))
        await settled((await fresh(keys, key_scope("a", "b", "c:/r", "k"))).abandon())

    @pytest.mark.parametrize("status", [429, 500, 503])
    async def test_what_is_to_be_tried_again_is_not_kept(
        self, backend: Backend, status: int
    ) -> None:
        keys = await backend.idempotency_keys()
        await settled((await fresh(keys)).complete(KeptAnswer(status, b"{}")))
        await settled((await fresh(keys, body=B)).abandon())

    @pytest.mark.parametrize("status", [200, 404, 422])
    async def test_every_other_answer_is(self, backend: Backend, status: int) -> None:
        keys = await backend.idempotency_keys()
        answer = KeptAnswer(status, b"{}")
        await settled((await fresh(keys)).complete(answer))
        assert await settled(keys.claim(SCOPE, A)) == Replay(answer)

    async def test_an_abandoned_key_is_free(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        await settled((await fresh(keys)).abandon())
        await settled((await fresh(keys, body=B)).abandon())

    async def test_answers_are_kept_for_the_window(self, backend: Backend, clock: Clock) -> None:
        keys = await backend.idempotency_keys(window_seconds=60)
        await settled((await fresh(keys)).complete(OK))
        clock.now += 59
        assert await settled(keys.claim(SCOPE, A)) == Replay(OK)
        clock.now += 1
        await settled((await fresh(keys, body=B)).abandon())


class TestAlone:
    """What other processes left at work on a route that is this one's alone."""

    @pytest.fixture
    async def both(self, backend: Backend) -> tuple[IdempotencyKeys, IdempotencyKeys]:
        dead, keys = await backend.idempotency_keys(), await backend.idempotency_keys()
        if isinstance(keys, MemoryIdempotencyKeys):
            pytest.skip("memory is one process's")
        return dead, keys

    async def test_it_is_taken_over(self, both: tuple[IdempotencyKeys, IdempotencyKeys]) -> None:
        dead, keys = both
        left = await fresh(dead)
        assert isinstance(await settled(keys.claim(SCOPE, A)), Wait)
        claim = await settled(keys.claim(SCOPE, A, alone=True))
        assert isinstance(claim, Fresh)
        # He was only frozen, and his answer is nobody's.
        await settled(left.complete(KeptAnswer(200, b"late")))
        await settled(claim.complete(OK))
        assert await settled(keys.claim(SCOPE, A, alone=True)) == Replay(OK)

    async def test_another_body_is_refused_all_the_same(
        self, both: tuple[IdempotencyKeys, IdempotencyKeys]
    ) -> None:
        dead, keys = both
        left = await fresh(dead)
        with pytest.raises(ValidationError):
            await settled(keys.claim(SCOPE, B, alone=True))
        await settled(left.abandon())


class TestWaiting:
    async def test_who_comes_meanwhile_waits_for_the_answer(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        claim = await fresh(keys)
        second = await settled(keys.claim(SCOPE, A))
        assert isinstance(second, Wait)
        outcome = asyncio.ensure_future(second.outcome())
        await asyncio.sleep(0)
        assert not outcome.done()
        await settled(claim.complete(OK))
        assert await outcome == Replay(OK)

    async def test_without_an_answer_he_works(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        claim = await fresh(keys)
        second = await settled(keys.claim(SCOPE, A))
        assert isinstance(second, Wait)
        outcome = asyncio.ensure_future(second.outcome())
        await asyncio.sleep(0)
        await settled(claim.abandon())
        handed = await outcome
        assert isinstance(handed, Fresh)
        await settled(handed.complete(OK))
        assert await settled(keys.claim(SCOPE, A)) == Replay(OK)

    async def test_work_is_done_once_for_calls_at_once(self, backend: Backend) -> None:
        keys = await backend.idempotency_keys()
        done = 0
        go = asyncio.Event()

        async def work() -> KeptAnswer:
            nonlocal done
            done += 1
            await go.wait()
            return OK

        async def call() -> Answered:
            return await settled(answer_once(keys, SCOPE, A, work))

        calls = [asyncio.ensure_future(call()) for _ in range(10)]
        await asyncio.sleep(0)
        go.set()
        answers = await asyncio.gather(*calls)
        assert done == 1
        assert sorted(each.replayed for each in answers) == [False] + [True] * 9
        assert {each.answer for each in answers} == {OK}
