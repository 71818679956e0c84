from __future__ import annotations

from collections.abc import Callable

import pytest

from notifyd import wire
from notifyd.connections.connection import MAX_UNANSWERED, State
from notifyd.connections.lifecycle import NOTHING_HEARD, TOKEN_EXPIRED
from notifyd.identity import Identity
from tests.unit.connected import NOW, Connected, RecordingStream, World


def beats(connected: Connected) -> int:
    return connected.read_types().count("heartbeat")


class TestBeating:
    def test_each_gets_one_an_interval_beginning_one_interval_after_it_came(self) -> None:
        world = World(heartbeat_interval=30)
        early = world.connect("u1")
        world.manual.advance(10)
        late = world.connect("u2")
        early.read()
        late.read()
        world.manual.advance(19)
        assert (beats(early), beats(late)) == (0, 0)
        world.manual.advance(1)
        assert (beats(early), beats(late)) == (1, 0)
        world.manual.advance(10)
        assert (beats(early), beats(late)) == (0, 1)
        world.manual.advance(30)
        assert (beats(early), beats(late)) == (1, 1)

    def test_the_slots_spread_them_over_the_interval(self) -> None:
        world = World(heartbeat_interval=10)
        clients = []
        for n in range(30):
            clients.append(world.connect(f"u{n}"))
            world.manual.advance(1)
        for client in clients:
            client.read()
        for _ in range(10):
            world.manual.advance(1)
            assert sum(beats(client) for client in clients) == 3

    @pytest.mark.parametrize("interval", [0.2, 0.6, 1.5, 2.5])
    def test_an_interval_that_is_no_whole_second(self, interval: float) -> None:
        world = World(heartbeat_interval=interval, idle_timeout=1000)
        client = world.connect()
        client.read()
        world.manual.advance(interval * 10 + 0.01)
        assert beats(client) == 10

    def test_a_websocket_gets_a_message_and_a_ping(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        world.manual.advance(30)
        assert client.sink.data == wire.HEARTBEAT.websocket + b"\x89\x00"

    def test_a_ping_that_is_out_is_repeated_and_not_overtaken(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        world.send("u1")
        world.manual.advance(30)
        first, beat = client.sink.pinged()
        assert first == beat != b""
        # Answering the last one only is enough (RFC 6455, section 5.5.3).
        client.pong_last()
        assert client.held() == []
        client.sink.clear()
        world.manual.advance(30)
        assert client.sink.pinged() == [b""]

    def test_a_stream_gets_an_event_with_the_time(self) -> None:
        world = World()
        stream = world.connect(transport="sse")
        stream.read()
        world.manual.advance(30)
        assert stream.read() == [{"type": "heartbeat", "timestamp": "2027-01-15T08:00:30.000Z"}]

    def test_a_websocket_without_pings_gets_the_message_alone(self) -> None:
        world = World()
        client = world.connect(sink=RecordingStream())
        client.read()
        world.manual.advance(30)
        assert client.sink.data == wire.HEARTBEAT.websocket

    def test_it_does_not_wait_behind_a_replay(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        client.connection.outbox.hold_back()
        client.connection.outbox.put(wire.PONG.websocket)
        world.manual.advance(30)
        assert client.read_types() == ["heartbeat"]

    def test_one_that_left_gets_none_and_is_not_kept(self) -> None:
        world = World()
        client = world.connect(expires_at=NOW + 1000)
        world.manual.advance(1)
        client.lose()
        heartbeat = world.heartbeat
        assert not any(heartbeat._slots)
        assert heartbeat._expiring == {}
        client.sink.clear()
        world.manual.advance(300)
        assert client.sink.data == b""

    def test_one_that_is_closed_by_a_heartbeat_does_not_hurt_the_others(self) -> None:
        world = World()
        slow, other = world.connect("u1"), world.connect("u2")
        other.read()
        slow.read()
        slow.connection.outbox.pause()
        slow.connection.outbox.put(b"x" * (1 << 20))
        world.manual.advance(30)
        assert slow.sink.closed == (4008, "too slow")
        assert beats(other) == 1

    def test_how_late_each_tick_came_is_told(self) -> None:
        world = World()
        world.manual.advance(2)
        assert world.lateness == [0, 0]
        # Held up for five seconds, it goes on from there and makes up for one that it missed.
        world.manual.now += 5
        world.manual.advance(0)
        assert world.lateness[2:] == [4, 0]
        world.manual.advance(0.99)
        assert len(world.lateness) == 4
        world.manual.advance(0.01)
        assert len(world.lateness) == 5

    def test_after_stop_no_tick_comes(self) -> None:
        world = World()
        world.heartbeat.stop()
        world.heartbeat.stop()
        world.manual.advance(100)
        assert world.lateness == []


class TestSilence:
    @pytest.mark.parametrize("idle_timeout", [31, 45, 59, 90, 120, 135])
    def test_closes_in_the_second_in_which_it_is_over(self, idle_timeout: float) -> None:
        world = World(heartbeat_interval=30, idle_timeout=idle_timeout)
        client = world.connect()
        world.manual.advance(idle_timeout - 0.5)
        assert client.connection.state is State.OPEN
        world.manual.advance(1.6)
        assert client.sink.closed == (NOTHING_HEARD, "nothing heard")

    def test_any_sign_of_life_puts_it_off(self) -> None:
        world = World(heartbeat_interval=30, idle_timeout=45)
        client = world.connect()
        signs: list[Callable[[], None]] = [
            lambda: world.lifecycle.heard(client.connection),
            lambda: world.lifecycle.pong(client.connection, b""),
            lambda: client.say("Ping"),
            lambda: client.say("Nonsense"),
        ]
        for sign in signs:
            world.manual.advance(44)
            sign()
        world.manual.advance(44)
        assert client.sink.closed is None
        world.manual.advance(3)
        assert client.connection.state is State.CLOSED

    def test_who_is_not_read_from_is_not_silent(self) -> None:
        world = World(heartbeat_interval=30, idle_timeout=45)
        client = world.connect()
        client.connection.unanswered = MAX_UNANSWERED
        world.manual.advance(1000)
        assert client.sink.closed is None
        client.connection.answered(1)
        world.manual.advance(100)
        assert client.sink.closed == (NOTHING_HEARD, "nothing heard")

    def test_without_pings_silence_means_nothing(self) -> None:
        world = World(heartbeat_interval=30, idle_timeout=45)
        stream = world.connect(transport="sse")
        world.manual.advance(1000)
        assert stream.connection.state is State.OPEN
        assert stream.connection.last_heard > NOW + 900

    def test_a_stream_that_takes_nothing_was_not_heard(self) -> None:
        world = World(heartbeat_interval=30)
        stream = world.connect(transport="sse")
        stream.connection.outbox.pause()
        world.manual.advance(100)
        assert stream.connection.last_heard == NOW

    def test_nothing_remembers_the_silent_for_long(self) -> None:
        world = World(heartbeat_interval=30, idle_timeout=45)
        client = world.connect()
        world.manual.advance(31)
        client.lose()
        world.manual.advance(60)
        assert world.heartbeat._silent == {}


class TestExpiry:
    def test_closes_when_the_leeway_is_over(self) -> None:
        world = World(idle_timeout=1000)
        client = world.connect(expires_at=NOW + 100)
        world.manual.advance(129)
        assert client.connection.state is State.OPEN
        client.read()
        world.manual.advance(3)
        assert client.sink.closed == (TOKEN_EXPIRED, "The token expired.")
        assert client.read()[-1]["code"] == "TOKEN_EXPIRED"

    def test_a_stream_is_told_too(self) -> None:
        world = World()
        stream = world.connect(transport="sse", expires_at=NOW + 100)
        world.manual.advance(140)
        assert stream.read()[-1]["code"] == "TOKEN_EXPIRED"

    def test_without_an_exp_it_never_does(self) -> None:
        world = World(idle_timeout=10_000)
        client = world.connect()
        world.manual.advance(5000)
        assert client.connection.state is State.OPEN

    def test_a_new_token_counts_from_its_own(self) -> None:
        refreshed = Identity("u1", expires_at=NOW + 500)
        world = World(idle_timeout=10_000, verify=lambda token: refreshed)
        client = world.connect(expires_at=NOW + 100)
        other = world.connect(expires_at=NOW + 100)
        world.manual.advance(90)
        (answer,) = client.ask("Auth", token="new")
        assert answer["type"] == "refreshed"
        world.manual.advance(100)
        assert client.sink.closed is None
        assert other.connection.state is State.CLOSED
        world.manual.advance(400)
        assert client.connection.state is State.CLOSED
        assert world.heartbeat._expiring == {}


class TestConfirming:
    def test_what_was_delivered_is_asked_for_within_a_second(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        world.manual.advance(0.5)
        world.send("u1")
        world.manual.advance(0.5)
        assert len(client.sink.pinged()) == 1
        client.pong_last()
        assert client.held() == []

    def test_a_stream_that_lives_on_confirms(self) -> None:
        world = World(heartbeat_interval=30, idle_timeout=120)
        stream = world.connect(transport="sse")
        world.send("u1")
        world.manual.advance(100)
        assert len(stream.held()) == 1
        world.manual.advance(50)
        assert stream.held() == []
