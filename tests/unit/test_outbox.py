from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from notifyd import wire
from notifyd.connections.connection import Connection, Transport
from notifyd.connections.outbox import (
    LINGER_FOR,
    LINGER_SECONDS,
    MAX_FAN_OUTS,
    SLICE_SECONDS,
    WRITE_BYTES,
    Bounds,
    Flusher,
    Outbox,
    Recipients,
)
from notifyd.identity import Identity
from notifyd.wire import message
from tests.unit.connected import RecordingSink, manual_loop, outbox_of


class Outboxes:
    """A flusher on a manual loop; slow ones are closed and remembered."""

    def __init__(
        self, *, max_bytes: int = 1 << 20, max_messages: int = 1000, total_bytes: int = 1 << 30
    ) -> None:
        self.loop = manual_loop()
        self.slow: list[Outbox] = []
        self.flusher = Flusher(
            Bounds(max_bytes=max_bytes, max_messages=max_messages, total_bytes=total_bytes),
            on_slow=self._close,
        )
        self.flusher.start(self.loop)

    def _close(self, outbox: Outbox) -> None:
        self.slow.append(outbox)
        outbox.close()

    def new(self, sink: RecordingSink | None = None) -> Outbox:
        return outbox_of(self.flusher, sink)


def written(outbox: Outbox) -> list[bytes]:
    return cast(RecordingSink, outbox.sink).writes


class TestFlushing:
    def test_what_gathers_in_a_turn_is_one_write(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        assert outbox.put(b"one")
        assert outbox.put(b"two")
        assert written(outbox) == []
        assert len(outboxes.loop.ready) == 1
        outboxes.loop.turn()
        assert written(outbox) == [b"onetwo"]
        assert (outbox.size, outboxes.flusher.waiting_bytes) == (0, 0)

    def test_what_the_caller_will_flush_is_not_scheduled(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.will_flush()
        outbox.put(b"one")
        outbox.put(b"two")
        assert not outboxes.loop.ready
        outbox.flush()
        assert written(outbox) == [b"onetwo"]
        outbox.put(b"three")
        outboxes.loop.turn()
        assert written(outbox) == [b"onetwo", b"three"]

    def test_what_the_caller_could_not_flush_is_scheduled(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.will_flush()
        outbox.put(b"x" * WRITE_BYTES)
        outbox.put(b"y")
        outbox.flush()
        assert written(outbox) == [b"x" * WRITE_BYTES]
        outboxes.loop.settle()
        assert written(outbox)[1:] == [b"y"]

    def test_a_single_frame_is_handed_over_as_it_is(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        frame = b"x" * (WRITE_BYTES * 3)
        outbox.put(frame)
        outboxes.loop.turn()
        assert written(outbox)[0] is frame

    def test_joins_up_to_64_kib_and_never_splits_a_frame(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        frames = [bytes([n]) * 30_000 for n in range(5)] + [b"y" * 70_000, b"z"]
        for frame in frames:
            outbox.put(frame)
        outboxes.loop.settle()
        assert [len(each) for each in written(outbox)] == [60_000, 60_000, 30_000, 70_000, 1]
        assert b"".join(written(outbox)) == b"".join(frames)
        assert outbox.size == 0

    def test_exactly_64_kib_is_one_write(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        for _ in range(4):
            outbox.put(b"x" * (WRITE_BYTES // 4))
        outboxes.loop.settle()
        assert [len(each) for each in written(outbox)] == [WRITE_BYTES]

    def test_every_outbox_is_flushed_in_the_turn(self) -> None:
        outboxes = Outboxes()
        many = [outboxes.new() for _ in range(100)]
        for outbox in many:
            outbox.put(b"x")
        outboxes.loop.turn()
        assert all(written(outbox) == [b"x"] for outbox in many)
        many[0].put(b"y")
        outboxes.loop.turn()
        assert written(many[0]) == [b"x", b"y"]

    def test_a_long_flush_yields_to_the_loop(self) -> None:
        outboxes = Outboxes()

        class SlowSink(RecordingSink):
            def write(self, data: bytes) -> None:
                outboxes.loop.now += SLICE_SECONDS / 20
                super().write(data)

        many = [outboxes.new(SlowSink()) for _ in range(100)]
        for outbox in many:
            outbox.put(b"x")
        outboxes.loop.turn()
        done = sum(bool(written(outbox)) for outbox in many)
        assert 16 <= done < 100
        outboxes.loop.settle()
        assert all(written(outbox) for outbox in many)

    def test_a_sink_that_fails_does_not_stop_the_others(self) -> None:
        outboxes = Outboxes()

        class Broken(RecordingSink):
            def write(self, data: bytes) -> None:
                raise OSError("broken")

        broken, sound = outboxes.new(Broken()), outboxes.new()
        broken.put(b"x")
        sound.put(b"x")
        outboxes.loop.settle()
        assert written(sound) == [b"x"]
        assert [str(each["exception"]) for each in outboxes.loop.failures] == ["broken"]
        sound.put(b"y")
        outboxes.loop.settle()
        assert written(sound) == [b"x", b"y"]
        broken.put(b"x")
        outboxes.loop.settle()
        sound.put(b"z")
        outboxes.loop.settle()
        assert written(sound)[-1] == b"z"


class TestBounds:
    def test_a_burst_of_one_turn_is_written_and_is_not_slow(self) -> None:
        outboxes = Outboxes(max_messages=10, max_bytes=1000)
        outbox = outboxes.new()
        for n in range(100):
            assert outbox.put(b"%03d" % n)
        assert outbox.put(b"x" * 5000)
        outboxes.loop.settle()
        assert outboxes.slow == []
        assert b"".join(written(outbox)) == b"".join(b"%03d" % n for n in range(100)) + b"x" * 5000

    @pytest.mark.parametrize(("frames", "size"), [(11, 1), (1, 1001)])
    def test_paused_beyond_its_bounds_it_is_slow(self, frames: int, size: int) -> None:
        outboxes = Outboxes(max_messages=10, max_bytes=1000)
        outbox = outboxes.new()
        outbox.pause()
        taken = [outbox.put(b"x" * size) for _ in range(frames)]
        assert taken == [True] * (frames - 1) + [False]
        assert outboxes.slow == [outbox]
        assert outboxes.flusher.waiting_bytes == 0
        outboxes.loop.settle()
        assert written(outbox) == []

    def test_within_its_bounds_it_keeps_what_waits(self) -> None:
        outboxes = Outboxes(max_messages=10, max_bytes=1000)
        outbox = outboxes.new()
        outbox.pause()
        for _ in range(10):
            assert outbox.put(b"x" * 100)
        assert outboxes.slow == []
        outboxes.loop.settle()
        assert written(outbox) == []
        outbox.resume()
        outboxes.loop.settle()
        assert written(outbox) == [b"x" * 1000]

    def test_a_sink_that_pauses_while_a_burst_is_written_is_slow(self) -> None:
        outboxes = Outboxes(max_messages=10)
        outbox = outboxes.new(RecordingSink(pauses_after=1))
        taken = [outbox.put(b"x") for _ in range(30)]
        # Eleven were written, ten may wait, the one after that is too much.
        assert taken == [True] * 21 + [False] * 9
        assert outboxes.slow == [outbox]

    def test_what_is_held_back_cannot_be_written_and_is_bounded(self) -> None:
        outboxes = Outboxes(max_messages=10)
        outbox = outboxes.new()
        outbox.hold_back()
        assert all(outbox.put(b"x") for _ in range(10))
        assert not outbox.put(b"x")
        assert outboxes.slow == [outbox]

    def test_too_much_in_total_closes_the_largest_slow_one(self) -> None:
        outboxes = Outboxes(total_bytes=1000)
        small, large, eager = (outboxes.new() for _ in range(3))
        small.pause()
        large.pause()
        small.put(b"x" * 300)
        large.put(b"x" * 600)
        assert eager.put(b"x" * 101)
        assert outboxes.slow == [large]
        assert outboxes.flusher.waiting_bytes == 401
        assert not large.put(b"x")

    def test_the_largest_may_be_the_one_that_takes(self) -> None:
        outboxes = Outboxes(total_bytes=1000)
        outbox = outboxes.new()
        outbox.pause()
        assert outbox.put(b"x" * 1000)
        assert not outbox.put(b"x")
        assert outboxes.slow == [outbox]

    def test_without_a_slow_one_nobody_is_given_up(self) -> None:
        outboxes = Outboxes(total_bytes=1000)
        outbox = outboxes.new()
        assert outbox.put(b"x" * 2000)
        assert outboxes.slow == []
        outboxes.loop.settle()
        assert outboxes.flusher.waiting_bytes == 0

    def test_one_that_resumed_is_not_slow_any_more(self) -> None:
        outboxes = Outboxes(total_bytes=1000)
        outbox, other = outboxes.new(), outboxes.new()
        outbox.pause()
        outbox.put(b"x" * 900)
        outbox.resume()
        assert other.put(b"x" * 200)
        assert outboxes.slow == []

    def test_a_pause_after_the_close_is_forgotten(self) -> None:
        outboxes = Outboxes(total_bytes=10)
        outbox, other = outboxes.new(), outboxes.new()
        outbox.close()
        outbox.pause()
        assert other.put(b"x" * 20)
        assert outboxes.slow == []


class TestHoldingBack:
    def test_what_is_put_ahead_is_written_before_what_is_put(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.put(b"connected,")
        outbox.hold_back()
        outbox.put(b"live-1,")
        outbox.put_ahead(b"replay-1,")
        outboxes.loop.settle()
        assert written(outbox) == [b"connected,replay-1,"]
        outbox.put(b"live-2,")
        outbox.put_ahead(b"replay-2,")
        outbox.let_go()
        assert not outbox.holds_back
        outbox.put(b"live-3")
        outboxes.loop.settle()
        assert b"".join(written(outbox)) == (b"connected,replay-1,replay-2,live-1,live-2,live-3")
        assert (outbox.size, outboxes.flusher.waiting_bytes) == (0, 0)

    def test_the_first_of_what_is_held_back_can_go_while_the_rest_waits(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.let_first_go(1)
        outbox.hold_back()
        outbox.put(b"live-1,")
        outbox.put(b"live-2,")
        assert outbox.held_back == 2
        outbox.hold_back()
        outbox.put(b"live-3")
        outbox.put_ahead(b"replay,")
        outbox.let_first_go(2)
        outboxes.loop.settle()
        assert b"".join(written(outbox)) == b"replay,live-1,live-2,"
        assert (outbox.holds_back, outbox.held_back) == (True, 1)
        outbox.let_go()
        outboxes.loop.settle()
        assert b"".join(written(outbox)) == b"replay,live-1,live-2,live-3"
        assert (outbox.held_back, outbox.size) == (0, 0)

    def test_without_a_replay_put_ahead_is_put(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.put(b"1")
        outbox.put_ahead(b"2")
        outboxes.loop.settle()
        assert written(outbox) == [b"12"]

    def test_letting_go_of_nothing_changes_nothing(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.let_go()
        outboxes.loop.settle()
        assert written(outbox) == []

    def test_found_slow_while_put_ahead_it_stays_closed_and_counts_nothing(self) -> None:
        outboxes = Outboxes(max_bytes=100)
        outbox = outboxes.new()
        outbox.hold_back()
        outbox.pause()
        outbox.put(b"x" * 50)
        assert not outbox.put_ahead(b"x" * 51)
        assert outbox.closed
        assert not outbox.holds_back
        assert (outbox.size, outboxes.flusher.waiting_bytes) == (0, 0)
        outboxes.loop.settle()
        assert written(outbox) == []


class TestClosing:
    def test_what_was_not_written_is_dropped(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.hold_back()
        outbox.put(b"x")
        outbox.put_ahead(b"y")
        outbox.close()
        assert not outbox.put(b"x")
        assert not outbox.put_ahead(b"x")
        outboxes.loop.settle()
        assert written(outbox) == []
        assert outboxes.flusher.waiting_bytes == 0

    def test_flush_all_writes_everything_in_order(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new()
        outbox.hold_back()
        outbox.put(b"c" * 70_000)
        outbox.put_ahead(b"a" * 70_000)
        outbox.put_ahead(b"b")
        outbox.flush_all()
        assert b"".join(written(outbox)) == b"a" * 70_000 + b"b" + b"c" * 70_000

    def test_flush_all_writes_nothing_to_one_that_takes_nothing(self) -> None:
        outboxes = Outboxes()
        outbox = outboxes.new(RecordingSink(pauses_after=1))
        outbox.put(b"a" * 70_000)
        outbox.put(b"b" * 70_000)
        outbox.flush_all()
        assert [len(each) for each in written(outbox)] == [70_000]


class TestDrained:
    """On a real loop: somebody waits."""

    @staticmethod
    def outboxes() -> Outboxes:
        outboxes = Outboxes()
        outboxes.flusher.start(asyncio.get_running_loop())
        return outboxes

    async def test_at_once_where_nothing_waits(self) -> None:
        await self.outboxes().new().drained()

    async def test_when_what_waited_is_written(self) -> None:
        outbox = self.outboxes().new()
        outbox.put(b"x")
        await outbox.drained()
        assert written(outbox) == [b"x"]

    async def test_ahead_of_what_is_held_back(self) -> None:
        outbox = self.outboxes().new()
        outbox.hold_back()
        outbox.put(b"live")
        outbox.put_ahead(b"replay")
        await outbox.drained()
        assert written(outbox) == [b"replay"]
        await outbox.drained()

    async def test_only_once_the_transport_takes_again(self) -> None:
        outbox = self.outboxes().new()
        outbox.pause()
        waiting = asyncio.ensure_future(outbox.drained())
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox.resume()
        await waiting

    async def test_also_where_only_live_ones_wait_behind_the_replay(self) -> None:
        outbox = self.outboxes().new()
        outbox.hold_back()
        outbox.pause()
        waiting = asyncio.ensure_future(outbox.drained())
        await asyncio.sleep(0)
        outbox.put(b"live")
        outbox.resume()
        async with asyncio.timeout(5):
            await waiting
        assert written(outbox) == []

    async def test_ends_with_the_connection(self) -> None:
        outbox = self.outboxes().new()
        outbox.pause()
        outbox.put(b"x")
        waiting = asyncio.ensure_future(outbox.drained())
        await asyncio.sleep(0)
        outbox.close()
        await waiting
        await outbox.drained()

    async def test_one_who_gave_up_waiting_is_passed_over(self) -> None:
        outbox = self.outboxes().new()
        outbox.pause()
        waiting = asyncio.ensure_future(outbox.drained())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        outbox.resume()
        await outbox.drained()


class TestPutAll:
    """The fan-out's own loop does what `put` does."""

    @staticmethod
    def connections(outboxes: Outboxes, *transports: Transport) -> list[Connection]:
        return [
            outbox_of(outboxes.flusher, transport=transport).connection for transport in transports
        ]

    def test_each_transport_gets_its_own_encoding_of_the_same_bytes(self) -> None:
        outboxes = Outboxes()
        many = self.connections(outboxes, "websocket", "sse", "websocket", "sse")
        outboxes.flusher.put_all(Recipients(many), wire.PONG)
        assert len(outboxes.loop.ready) == 1
        outboxes.loop.settle()
        frames = [written(each.outbox)[0] for each in many]
        assert frames[0] is frames[2] is wire.PONG.websocket
        assert frames[1] is frames[3] is wire.PONG.sse
        assert outboxes.flusher.waiting_bytes == 0

    def test_gives_up_those_that_do_not_take_it(self) -> None:
        outboxes = Outboxes(max_messages=2)
        many = self.connections(outboxes, "websocket", "websocket", "sse", "websocket")
        gone, slow, eager, waiting = (each.outbox for each in many)
        gone.close()
        slow.pause()
        slow.put(b"1")
        slow.put(b"2")
        eager.put(b"1")
        eager.put(b"2")
        waiting.pause()
        outboxes.flusher.put_all(Recipients(many), wire.PONG)
        outboxes.loop.settle()
        assert outboxes.slow == [slow]
        assert outboxes.flusher.waiting_bytes == waiting.size > 0
        assert b"".join(written(eager)) == b"12" + wire.PONG.sse

    def test_goes_behind_a_replay(self) -> None:
        outboxes = Outboxes()
        (connection,) = self.connections(outboxes, "websocket")
        connection.outbox.hold_back()
        outboxes.flusher.put_all(Recipients([connection]), wire.PONG)
        connection.outbox.put_ahead(b"replay")
        outboxes.loop.settle()
        assert written(connection.outbox) == [b"replay"]
        connection.outbox.let_go()
        outboxes.loop.settle()
        assert written(connection.outbox) == [b"replay", wire.PONG.websocket]

    def test_too_much_in_total_gives_up_as_many_as_it_takes(self) -> None:
        outboxes = Outboxes(total_bytes=10_000)
        transports: list[Transport] = ["websocket"] * 100
        many = self.connections(outboxes, *transports)
        for n, each in enumerate(many):
            each.outbox.pause()
            each.outbox.put(b"x" * n)
        message = wire.message("pong", padding="x" * 100)
        outboxes.flusher.put_all(Recipients(many), message)
        outboxes.loop.settle()
        assert outboxes.flusher.waiting_bytes <= 10_000
        # The largest first, and none more than it takes.
        slow = len(outboxes.slow)
        assert outboxes.slow == [each.outbox for each in reversed(many[-slow:])]
        last = len(message.websocket) + 100 - slow
        assert outboxes.flusher.waiting_bytes + last > 10_000

    def test_what_goes_to_the_same_in_one_turn_is_joined_once(self) -> None:
        outboxes = Outboxes()
        recipients = Recipients(self.connections(outboxes, "websocket", "websocket", "sse"))
        for _ in range(3):
            outboxes.flusher.put_all(recipients, wire.PONG)
        outboxes.loop.settle()
        one, two, stream = (written(each.outbox) for each in recipients.connections)
        assert one == [wire.PONG.websocket * 3]
        assert one[0] is two[0]
        assert stream == [wire.PONG.sse * 3]

    def test_order_holds_whatever_else_is_put(self) -> None:
        outboxes = Outboxes()
        many = self.connections(outboxes, "websocket", "websocket")
        everybody, first = Recipients(many), Recipients(many[:1])
        outboxes.flusher.put_all(everybody, message("1"))
        outboxes.flusher.put_all(first, message("2"))
        many[1].outbox.put(message("3").websocket)
        outboxes.flusher.put_all(everybody, message("4"))
        many[0].outbox.put_ahead(message("5").websocket)
        outboxes.flusher.put_all(everybody, message("6"))
        many[1].outbox.flush_all()
        outboxes.flusher.put_all(everybody, message("7"))
        outboxes.loop.settle()
        types = [cast(RecordingSink, each.outbox.sink).types() for each in many]
        assert types == [list("124567"), list("13467")]

    def test_what_gathers_while_a_replay_is_on_stays_behind_it(self) -> None:
        outboxes = Outboxes()
        (connection,) = self.connections(outboxes, "websocket")
        outbox = connection.outbox
        outbox.hold_back()
        outboxes.flusher.put_all(Recipients([connection]), message("live"))
        outbox.put_ahead(message("replay-1").websocket)
        outboxes.flusher.put_all(Recipients([connection]), message("later"))
        outbox.put_ahead(message("replay-2").websocket)
        outbox.let_go()
        outboxes.loop.settle()
        types = cast(RecordingSink, outbox.sink).types()
        assert types == ["replay-1", "replay-2", "live", "later"]

    def test_more_than_a_write_does_not_gather_any_longer(self) -> None:
        outboxes = Outboxes()
        (connection,) = self.connections(outboxes, "websocket")
        recipients = Recipients([connection])
        large = wire.message("x", padding="x" * 30_000)
        for _ in range(4):
            outboxes.flusher.put_all(recipients, large)
        outboxes.loop.settle()
        size = len(large.websocket)
        assert [len(each) for each in written(connection.outbox)] == [3 * size, size]

    def test_messages_are_counted_although_they_are_joined(self) -> None:
        outboxes = Outboxes(max_messages=10)
        (connection,) = self.connections(outboxes, "websocket")
        connection.outbox.pause()
        for _ in range(11):
            assert outboxes.slow == []
            outboxes.flusher.put_all(Recipients([connection]), wire.PONG)
        outboxes.loop.settle()
        assert outboxes.slow == [connection.outbox]

    def test_what_is_put_into_one_takes_what_was_on_its_way_to_it_along_and_no_more(self) -> None:
        outboxes, many = self.of_tenants("acme", 100)
        recipients = Recipients(many)
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.loop.turn()
        first, last = many[0].outbox, many[-1].outbox
        assert written(first)
        assert not written(last)
        first.put(message("2").websocket)
        last.put(message("2").websocket)
        outboxes.flusher.put_all(recipients, message("3"))
        last.put_ahead(message("4").websocket)
        assert [each for each in many if each.outbox.size] == [many[0], many[-1]]
        outboxes.loop.settle()
        assert self.types(many[0]) == list("123")
        assert self.types(many[-1]) == list("1234")
        assert all(self.types(each) == list("13") for each in many[1:-1])
        assert outboxes.flusher.waiting_bytes == 0

    def test_what_is_for_one_does_not_wait_for_what_is_for_many(self) -> None:
        outboxes, many = self.of_tenants("acme", 100)
        other = outboxes.new()
        outboxes.flusher.put_all(Recipients(many), message("1"))
        outboxes.loop.turn()
        other.put(b"x")
        outboxes.loop.turn()
        assert written(other) == [b"x"]
        assert not written(many[-1].outbox)

    def test_tenants_take_turns(self) -> None:
        outboxes, many = self.of_tenants("acme", 200)
        others = self.more(outboxes, "globex", 3)
        outboxes.flusher.put_all(Recipients(many), message("1"))
        outboxes.flusher.put_all(Recipients(many), message("2"))
        outboxes.loop.turn()
        outboxes.flusher.put_all(Recipients(others), message("3"))
        outboxes.loop.turn()
        outboxes.loop.turn()
        assert all(self.types(each) == ["3"] for each in others)
        assert not written(many[-1].outbox)
        outboxes.loop.settle()
        assert all(self.types(each) == ["1", "2"] for each in many)

    def test_who_sends_faster_than_is_written_waits_for_his_oldest(self) -> None:
        outboxes, many = self.of_tenants("acme", 100)
        for n in range(MAX_FAN_OUTS + 2):
            # Never the same set, so that nothing is joined.
            outboxes.flusher.put_all(Recipients(many), message(str(n)))
        assert len({each.outbox.messages for each in many}) == 1
        assert many[0].outbox.messages == 1
        outboxes.loop.settle()
        expected = [str(n) for n in range(MAX_FAN_OUTS + 2)]
        assert all(self.types(each) == expected for each in many)

    def test_one_that_ended_on_the_way_is_passed_over(self) -> None:
        outboxes, many = self.of_tenants("acme", 100)
        outboxes.flusher.put_all(Recipients(many), message("1"))
        outboxes.loop.turn()
        many[-1].outbox.close()
        many[-1].outbox.let_connection_go()
        assert not many[-1].outbox.put(b"x")
        outboxes.loop.settle()
        assert not written(many[-1].outbox)
        assert self.types(many[-2]) == ["1"]

    def test_under_load_it_waits_for_what_other_nodes_have_for_the_same(self) -> None:
        outboxes, many, recipients = self.under_load()
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.flusher.put_all(recipients, message("2"))
        outboxes.loop.settle()
        assert not written(many[0].outbox)
        outboxes.flusher.put_all(recipients, message("from elsewhere"))
        outboxes.flusher.answer_came()
        outboxes.loop.settle()
        assert all(self.types(each) == ["1", "2", "from elsewhere"] for each in many)
        assert all(len(written(each.outbox)) == 1 for each in many)

    def test_what_comes_behind_the_first_answer_waits_for_the_next(self) -> None:
        outboxes, many, recipients = self.under_load()
        for number in range(2):
            outboxes.flusher.answer_is_due()
            outboxes.flusher.put_all(recipients, message(f"{number}a"))
            outboxes.flusher.put_all(recipients, message(f"{number}b"))
            outboxes.loop.settle()
            assert len(written(many[0].outbox)) == number
            outboxes.flusher.answer_came()
            outboxes.loop.settle()
            assert len(written(many[0].outbox)) == number + 1

    def test_where_no_answer_comes_it_waits_no_longer_than_it_may(self) -> None:
        outboxes, many, recipients = self.under_load()
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.flusher.put_all(recipients, message("2"))
        outboxes.loop.advance(LINGER_SECONDS * 0.9)
        assert not written(many[0].outbox)
        outboxes.loop.advance(LINGER_SECONDS * 0.2)
        assert all(self.types(each) == ["1", "2"] for each in many)

    def test_one_message_after_the_other_waits_for_nobody(self) -> None:
        outboxes, many, recipients = self.under_load()
        for number in range(3):
            outboxes.flusher.put_all(recipients, message(str(number)))
            outboxes.loop.settle()
            assert len(written(many[-1].outbox)) == number + 1

    def test_one_that_follows_several_waits(self) -> None:
        outboxes, many, recipients = self.under_load()
        for kind in ("1", "2"):
            outboxes.flusher.put_all(recipients, message(kind))
        outboxes.loop.advance(LINGER_SECONDS)
        assert self.types(many[-1]) == ["1", "2"]
        outboxes.flusher.put_all(recipients, message("3"))
        outboxes.loop.settle()
        assert self.types(many[-1]) == ["1", "2"]
        outboxes.flusher.answer_came()
        outboxes.loop.settle()
        assert self.types(many[-1]) == ["1", "2", "3"]

    @pytest.mark.parametrize("case", ["no answer is due", "few recipients"])
    def test_there_is_nothing_to_wait_for_where(self, case: str) -> None:
        outboxes, many, recipients = self.under_load()
        if case == "no answer is due":
            outboxes.flusher.answer_came()
        else:
            recipients = Recipients(many[1:])
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.flusher.put_all(recipients, message("2"))
        outboxes.loop.settle()
        assert self.types(many[-1]) == ["1", "2"]

    def test_what_waits_keeps_its_place_before_what_is_for_one(self) -> None:
        outboxes, many, recipients = self.under_load()
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.flusher.put_all(recipients, message("2"))
        outboxes.loop.settle()
        many[0].outbox.put(message("3").websocket)
        outboxes.loop.settle()
        assert self.types(many[0]) == ["1", "2", "3"]
        # Joined for him, it waits for nobody any more.
        assert all(self.types(each) == ["1", "2"] for each in many[1:])

    def test_other_tenants_do_not_wait_with_it(self) -> None:
        outboxes, many, recipients = self.under_load()
        others = self.more(outboxes, "globex", 200)
        outboxes.flusher.put_all(Recipients(others), message("x"))
        outboxes.flusher.put_all(recipients, message("1"))
        outboxes.flusher.put_all(recipients, message("2"))
        outboxes.loop.turn()
        outboxes.loop.settle()
        assert all(self.types(each) == ["x"] for each in others)
        assert not written(many[0].outbox)
        outboxes.flusher.answer_came()
        outboxes.loop.settle()
        assert self.types(many[-1]) == ["1", "2"]

    def under_load(self) -> tuple[Outboxes, list[Connection], Recipients]:
        """So many that it is worth waiting; an answer of other nodes is due."""
        outboxes = Outboxes()
        connections = [outboxes.new().connection for _ in range(LINGER_FOR)]
        for connection in connections:
            connection.identity = Identity(user_id="u", tenant="acme")
        outboxes.flusher.answer_is_due()
        return outboxes, connections, Recipients(connections)

    def of_tenants(self, tenant: str, count: int) -> tuple[Outboxes, list[Connection]]:
        """Connections of which a slice writes twenty."""
        outboxes = Outboxes()
        return outboxes, self.more(outboxes, tenant, count)

    @staticmethod
    def more(outboxes: Outboxes, tenant: str, count: int) -> list[Connection]:
        class SlowSink(RecordingSink):
            def write(self, data: bytes) -> None:
                outboxes.loop.now += SLICE_SECONDS / 20
                super().write(data)

        connections = [outboxes.new(SlowSink()).connection for _ in range(count)]
        for connection in connections:
            connection.identity = Identity(user_id="u", tenant=tenant)
        return connections

    @staticmethod
    def types(connection: Connection) -> list[str]:
        return cast(RecordingSink, connection.outbox.sink).types()

    def test_one_that_keeps_up_although_never_all_at_once_is_not_slow(self) -> None:
        outboxes = Outboxes(max_messages=10)
        sink = RecordingSink()
        outbox = outboxes.new(sink)
        frame = b"x" * (WRITE_BYTES // 2)
        for _ in range(4):
            outbox.put(frame)
        for _ in range(50):
            # Two frames are taken, four wait at most; it is never empty.
            outbox.resume()
            outbox.flush()
            outbox.pause()
            assert outbox.put(frame)
            assert outbox.put(frame)
            assert outbox.messages <= 4
        assert outboxes.slow == []


class TestDescriptors:
    """Fan-outs go past the transport, unless something is in the way."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            yield ours, theirs

    @staticmethod
    def _connection(outboxes: Outboxes, descriptor: int) -> Connection:
        connection = outbox_of(outboxes.flusher).connection
        connection.outbox.write_to(descriptor)
        return connection

    def test_a_fan_out_is_written_to_the_descriptor(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        outboxes = Outboxes()
        connection = self._connection(outboxes, pair[0].fileno())
        outboxes.flusher.put_all(Recipients([connection]), wire.PONG)
        outboxes.loop.settle()
        assert pair[1].recv(1000) == wire.PONG.websocket
        assert written(connection.outbox) == []

    def test_what_the_socket_does_not_take_goes_to_the_transport(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        outboxes = Outboxes()
        connection = self._connection(outboxes, pair[0].fileno())
        pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        big = message("big", text="x" * 60_000)
        sent = b""
        while not written(connection.outbox):
            outboxes.flusher.put_all(Recipients([connection]), big)
            outboxes.loop.settle()
            sent += big.websocket
        rest = b"".join(written(connection.outbox))
        assert 0 < len(rest) < len(sent)
        pair[0].close()
        pair[1].setblocking(True)
        received = b"".join(iter(lambda: pair[1].recv(1 << 20), b""))
        assert received + rest == sent

    def test_an_error_is_left_to_the_transport(self) -> None:
        outboxes = Outboxes()
        reading, writing = os.pipe()
        os.close(reading)
        try:
            connection = self._connection(outboxes, writing)
            outboxes.flusher.put_all(Recipients([connection]), wire.PONG)
            outboxes.loop.settle()
            assert written(connection.outbox) == [wire.PONG.websocket]
        finally:
            os.close(writing)

    def test_not_while_it_is_paused_or_when_it_is_closed(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        outboxes = Outboxes()
        paused = self._connection(outboxes, pair[0].fileno())
        closed = self._connection(outboxes, pair[0].fileno())
        paused.outbox.pause()
        closed.outbox.close()
        outboxes.flusher.put_all(Recipients([paused, closed]), wire.PONG)
        outboxes.loop.settle()
        with pytest.raises(BlockingIOError):
            pair[1].recv(1000)
        assert paused.outbox.size == len(wire.PONG.websocket)


def test_what_comes_while_a_fan_out_goes_on_is_one_write_behind_it() -> None:
    outboxes = Outboxes()
    many = [outbox_of(outboxes.flusher).connection for _ in range(40)]
    recipients = Recipients(many)
    first, second, third = (message(name) for name in ("first", "second", "third"))
    sink = cast(RecordingSink, many[0].outbox.sink)

    def slow(data: bytes) -> None:
        outboxes.loop.now += SLICE_SECONDS
        sink.writes.append(data)

    many[0].outbox._write = slow
    outboxes.flusher.put_all(recipients, first)
    outboxes.loop.turn()
    assert written(many[-1].outbox) == []
    outboxes.flusher.put_all(recipients, second)
    outboxes.flusher.put_all(recipients, third)
    outboxes.loop.settle()
    both = second.websocket + third.websocket
    assert {tuple(written(each.outbox)) for each in many} == {(first.websocket, both)}
