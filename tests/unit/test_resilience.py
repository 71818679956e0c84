from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from notifyd.errors import NotFound, Unavailable
from notifyd.options import BreakerSettings
from notifyd.resilience import Backoff, BreakerState, CircuitBreaker, Guarded

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SETTINGS = BreakerSettings(
    failure_threshold=3,
    success_threshold=2,
    reset_timeout_seconds=30,
    backoff_initial_ms=1000,
    backoff_max_ms=60_000,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    """A breaker whose pauses are always the longest, and what it told."""

    def __init__(self, settings: BreakerSettings = SETTINGS, random: float = 1.0) -> None:
        self.clock = Clock()
        self.changes: list[BreakerState] = []
        self.breaker = CircuitBreaker(
            settings, clock=self.clock, random=lambda: random, on_change=self.changes.append
        )

    def open(self) -> CircuitBreaker:
        while self.breaker.state is CLOSED:
            assert self.breaker.allow()
            self.breaker.failed()
        return self.breaker

    def half_open(self) -> CircuitBreaker:
        self.open()
        self.clock.now += self.breaker.retry_after()
        assert self.breaker.allow()
        return self.breaker


class TestBackoff:
    @given(
        st.floats(0.001, 10),
        st.floats(0.001, 100),
        st.lists(st.floats(0, 1), min_size=1, max_size=50),
    )
    def test_each_pause_is_below_a_ceiling_that_doubles_up_to_the_maximum(
        self, initial: float, maximum: float, draws: list[float]
    ) -> None:
        drawn = iter(draws)
        backoff = Backoff(initial, maximum, lambda: next(drawn))
        ceilings = []
        for _ in draws:
            ceilings.append(backoff.ceiling)
            assert 0 <= backoff.next() <= ceilings[-1] <= maximum
        assert ceilings[0] == min(initial, maximum)
        assert all(after == min(before * 2, maximum) for before, after in pairwise(ceilings))
        backoff.reset()
        assert backoff.ceiling == ceilings[0]

    def test_the_whole_range_is_drawn_from(self) -> None:
        assert Backoff(8, 8, lambda: 0.0).next() == 0
        assert Backoff(8, 8, lambda: 0.25).next() == 2


class TestBreaker:
    def test_failures_in_a_row_open_it(self) -> None:
        world = World()
        for _ in range(2):
            world.breaker.failed()
        world.breaker.succeeded()
        for _ in range(2):
            world.breaker.failed()
        assert (world.breaker.state, world.breaker.allow()) == (CLOSED, True)
        world.breaker.failed()
        assert (world.breaker.state, world.breaker.allow()) == (OPEN, False)
        assert world.changes == [OPEN]

    def test_a_probe_after_the_pause_and_one_at_a_time(self) -> None:
        world = World()
        breaker = world.open()
        assert breaker.retry_after() == 1
        world.clock.now += 0.75
        assert not breaker.allow()
        assert breaker.retry_after() == 0.25
        world.clock.now += 0.25
        assert breaker.allow()
        assert (breaker.state, breaker.retry_after()) == (HALF_OPEN, 0)
        assert not breaker.allow()
        breaker.succeeded()
        assert breaker.allow()
        assert not breaker.allow()

    def test_enough_probes_close_it(self) -> None:
        world = World()
        breaker = world.half_open()
        breaker.succeeded()
        assert breaker.state is HALF_OPEN
        assert breaker.allow()
        breaker.succeeded()
        assert breaker.state is CLOSED
        assert world.changes == [OPEN, HALF_OPEN, CLOSED]
        world.open()
        assert breaker.retry_after() == 1

    def test_pauses_grow_while_probes_fail_and_have_a_bound(self) -> None:
        world = World()
        breaker = world.open()
        pauses = []
        for _ in range(7):
            pauses.append(breaker.retry_after())
            world.clock.now += pauses[-1]
            assert breaker.allow()
            breaker.failed()
        assert pauses == [1, 2, 4, 8, 16, 30, 30]

    def test_a_probe_that_was_given_up_makes_room_for_another(self) -> None:
        breaker = World().half_open()
        breaker.abandoned()
        assert breaker.allow()
        assert breaker.state is HALF_OPEN

    def test_calls_from_before_a_change_say_nothing_of_the_new_state(self) -> None:
        world = World()
        before = world.breaker.period
        breaker = world.half_open()
        for report in (breaker.succeeded, breaker.failed, breaker.abandoned):
            report(before)
            assert breaker.state is HALF_OPEN
            assert not breaker.allow()
        breaker.succeeded(breaker.period)
        assert breaker.allow()

    def test_what_comes_late_while_it_is_open_changes_nothing(self) -> None:
        breaker = World().open()
        breaker.succeeded()
        breaker.failed()
        breaker.abandoned()
        assert (breaker.state, breaker.retry_after()) == (OPEN, 1)

    def test_listeners_come_and_go(self) -> None:
        world = World()
        heard: list[BreakerState] = []
        listen = heard.append
        world.breaker.subscribe(listen)
        world.open()
        world.breaker.unsubscribe(listen)
        world.half_open()
        assert (heard, world.changes) == ([OPEN], [OPEN, HALF_OPEN])

    def test_the_states_are_the_numbers_of_the_metric(self) -> None:
        assert [int(state) for state in (CLOSED, OPEN, HALF_OPEN)] == [0, 1, 2]


class BreakerMachine(RuleBasedStateMachine):
    """Calls that overlap as they like: whatever happens, the rules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(random=0.5)
        self.calls: list[int] = []
        self.failures = 0

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.world.clock.now += seconds

    @rule()
    def call(self) -> None:
        breaker = self.world.breaker
        before, pause = breaker.state, breaker.retry_after()
        probing = before is HALF_OPEN and breaker.period in self.calls
        allowed = breaker.allow()
        assert allowed == (not probing and pause == 0)
        assert breaker.state is (HALF_OPEN if before is OPEN and allowed else before)
        if allowed:
            self.calls.append(breaker.period)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ending=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, data: st.DataObject, ending: str) -> None:
        breaker = self.world.breaker
        period = data.draw(st.sampled_from(self.calls))
        self.calls.remove(period)
        before, current = breaker.state, period == breaker.period
        getattr(breaker, ending)(period)
        if not current or ending == "abandoned":
            assert breaker.state is before
            return
        if before is CLOSED:
            self.failures = self.failures + 1 if ending == "failed" else 0
            assert breaker.state is (OPEN if self.failures == 3 else CLOSED)
        elif ending == "failed":
            assert breaker.state is OPEN
        if breaker.state is not before:
            self.failures = 0

    @invariant()
    def probes_are_single_and_pauses_bounded(self) -> None:
        breaker = self.world.breaker
        assert 0 <= breaker.retry_after() <= 30
        if breaker.state is HALF_OPEN:
            assert self.calls.count(breaker.period) <= 1


TestBreakerMachine = BreakerMachine.TestCase


async def forever() -> None:
    await asyncio.Event().wait()


async def answer() -> str:
    return "answer"


def failing(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


class DriverError(Exception):
    pass


def guard(world: World) -> tuple[Guarded, list[Exception]]:
    told: list[Exception] = []
    guarded = Guarded(world.breaker, "Redis", failures=(DriverError,), on_failure=told.append)
    return guarded, told


class TestGuarded:
    async def test_an_answer_comes_through(self) -> None:
        guarded, told = guard(World())
        assert await guarded.call(answer, 1) == "answer"
        assert told == []

    @pytest.mark.parametrize("error", [DriverError(), ConnectionResetError(), TimeoutError()])
    async def test_failures_are_unavailable_and_open_the_breaker(self, error: Exception) -> None:
        world = World()
        guarded, told = guard(world)
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                await guarded.call(failing(error), 1)
            assert caught.value.__cause__ is error
            assert caught.value.retry_after == 1
        assert (world.changes, told) == ([OPEN], [error] * 3)

    async def test_what_hangs_has_failed(self) -> None:
        world = World()
        guarded, told = guard(world)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await guarded.call(forever, 0.001)
        assert world.changes == [OPEN]
        assert [type(error) for error in told] == [TimeoutError] * 3

    async def test_an_open_breaker_refuses_without_a_call(self) -> None:
        world = World()
        guarded, told = guard(world)
        world.open()
        with pytest.raises(Unavailable) as caught:
            await guarded.call(failing(AssertionError("called")), 1)
        assert (caught.value.retry_after, told) == (1, [])

    async def test_the_pause_is_told_in_whole_seconds(self) -> None:
        world = World(BreakerSettings(failure_threshold=1, backoff_initial_ms=4200))
        guarded, _ = guard(world)
        with pytest.raises(Unavailable) as caught:
            await guarded.call(failing(OSError()), 1)
        assert caught.value.retry_after == 5

    async def test_calls_probe_where_nobody_watches(self) -> None:
        world = World()
        guarded, _ = guard(world)
        world.open()
        world.clock.now += 1
        assert await guarded.call(answer, 1) == "answer"
        assert await guarded.call(answer, 1) == "answer"
        assert world.changes == [OPEN, HALF_OPEN, CLOSED]

    async def test_a_no_is_an_answer_too(self) -> None:
        world = World()
        guarded, told = guard(world)
        world.half_open().abandoned()
        for _ in range(2):
            with pytest.raises(NotFound):
                await guarded.call(failing(NotFound("no such thing")), 1)
        assert (world.breaker.state, told) == (CLOSED, [])

    async def test_unavailable_from_within_is_a_failure(self) -> None:
        world = World()
        guarded, _ = guard(world)
        error = Unavailable("no connection is free", retry_after=7)
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                await guarded.call(failing(error), 1)
            assert caught.value is error
        assert world.breaker.state is OPEN

    @pytest.mark.parametrize("error", [KeyError("a bug"), asyncio.CancelledError()])
    async def test_faults_of_ours_and_cancellation_do_not_count(self, error: BaseException) -> None:
        world = World()
        guarded, told = guard(world)
        world.half_open().abandoned()
        for _ in range(5):
            with pytest.raises(type(error)):
                await guarded.call(failing(error), 1)
        assert (world.breaker.state, told) == (HALF_OPEN, [])
        assert world.breaker.allow()

    async def test_a_callers_cancellation_cancels_the_work(self) -> None:
        guarded, _ = guard(World())
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await forever()
            finally:
                ended.set()

        task = asyncio.create_task(guarded.call(work, 10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()


class TestWatching:
    async def test_probes_until_the_store_is_back_and_rests_then(self) -> None:
        world = World()
        guarded, told = guard(world)
        pauses: list[float] = []
        outcomes: list[Exception | None] = [OSError(), OSError(), None, OSError(), None, None]
        closed = asyncio.Event()
        world.breaker.subscribe(lambda state: closed.set() if state is CLOSED else None)

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            world.clock.now += seconds
            await asyncio.sleep(0)

        async def ping() -> None:
            if (outcome := outcomes.pop(0)) is not None:
                raise outcome

        watching = asyncio.create_task(guarded.watch(ping, 1, sleep=sleep))
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await guarded.call(failing(OSError()), 1)
        assert pauses == []
        with pytest.raises(Unavailable):
            await guarded.call(failing(OSError()), 1)
        await closed.wait()
        assert outcomes == []
        assert pauses == [1, 2, 4, 0.05, 8, 0.05]
        assert await guarded.call(answer, 1) == "answer"
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        assert len(told) == 6

    async def test_no_caller_probes_meanwhile(self) -> None:
        world = World()
        guarded, _ = guard(world)
        world.open()
        probing = asyncio.Event()

        async def ping() -> None:
            probing.set()
            await forever()

        async def sleep(seconds: float) -> None:
            world.clock.now += seconds

        watching = asyncio.create_task(guarded.watch(ping, 10, sleep=sleep))
        await probing.wait()
        with pytest.raises(Unavailable):
            await guarded.call(failing(AssertionError("called")), 1)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        assert world.breaker.state is HALF_OPEN
        assert await guarded.call(answer, 1) == "answer"
