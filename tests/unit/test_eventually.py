from __future__ import annotations

import asyncio

import pytest

from notifyd.eventually import Eventually, and_then, is_awaitable, settled, then


def later(value: int) -> Eventually[int]:
    async def awaited() -> int:
        await asyncio.sleep(0)
        return value

    return awaited()


def failing() -> Eventually[int]:
    async def awaited() -> int:
        await asyncio.sleep(0)
        raise ValueError("late")

    return awaited()


class TestIsAwaitable:
    async def test_what_must_be_awaited(self) -> None:
        coroutine = later(1)
        future: Eventually[int] = asyncio.get_running_loop().create_future()
        assert is_awaitable(future)
        assert is_awaitable(coroutine)
        await coroutine

    @pytest.mark.parametrize("value", [None, 0, "", (), {}, object()])
    def test_what_is_there(self, value: object) -> None:
        assert not is_awaitable(value)


class TestThen:
    async def test_at_once_or_later(self) -> None:
        assert then(2, lambda number: number + 1) == 3
        pending = then(later(2), lambda number: number + 1)
        assert is_awaitable(pending)
        assert await pending == 3

    async def test_what_is_raised_comes_out(self) -> None:
        def wrong(number: int) -> int:
            raise ValueError("now")

        with pytest.raises(ValueError, match="now"):
            then(1, wrong)
        with pytest.raises(ValueError, match="now"):
            await settled(then(later(1), wrong))
        with pytest.raises(ValueError, match="late"):
            await settled(then(failing(), lambda number: number))

    async def test_cancelling_cancels_what_is_awaited(self) -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        value: Eventually[int] = future
        task = asyncio.ensure_future(settled(then(value, lambda number: number)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert future.cancelled()


class TestAndThen:
    async def test_either_way_and_either_way_again(self) -> None:
        def plus_one(number: int) -> Eventually[int]:
            return number + 1

        def plus_one_later(number: int) -> Eventually[int]:
            return later(number + 1)

        assert and_then(2, plus_one) == 3
        assert await settled(and_then(later(2), plus_one)) == 3
        assert await settled(and_then(2, plus_one_later)) == 3
        assert await settled(and_then(later(2), plus_one_later)) == 3


class TestSettled:
    async def test_either_way(self) -> None:
        assert await settled(1) == 1
        assert await settled(later(1)) == 1
