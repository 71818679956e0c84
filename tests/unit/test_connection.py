from __future__ import annotations

from notifyd import wire
from notifyd.connections.connection import UNIDENTIFIED, Connection, Held, State, Transport
from notifyd.connections.outbox import Bounds, Flusher
from tests.unit.connected import (
    NOW,
    RecordingSink,
    a_notification,
    manual_loop,
    outbox_of,
)


def a_connection(transport: Transport = "websocket") -> tuple[Connection, RecordingSink]:
    flusher = Flusher(
        Bounds(max_bytes=1000, max_messages=100, total_bytes=10_000), on_slow=lambda outbox: None
    )
    flusher.start(manual_loop())
    sink = RecordingSink()
    return outbox_of(flusher, sink, transport=transport).connection, sink


class TestConnection:
    def test_begins_unknown(self) -> None:
        connection, _ = a_connection()
        assert connection.state is State.AUTHENTICATING
        assert connection.identity is UNIDENTIFIED
        assert connection.outbox.connection is connection
        assert (connection.opened_at, connection.last_heard) == (NOW, NOW)
        assert (connection.subscriptions, connection.unconfirmed, connection.asked) == (
            (),
            None,
            None,
        )

    def test_speaks_as_its_transport_does(self) -> None:
        for transport, data in (
            ("websocket", wire.PONG.websocket),
            ("sse", wire.PONG.sse),
        ):
            connection, sink = a_connection("websocket" if transport == "websocket" else "sse")
            assert connection.offer(wire.PONG)
            connection.outbox.flush()
            assert sink.data == data

    def test_a_reply_does_not_wait_behind_a_replay(self) -> None:
        connection, sink = a_connection()
        connection.outbox.hold_back()
        connection.offer(wire.HEARTBEAT)
        connection.reply(wire.PONG)
        connection.outbox.flush()
        assert sink.types() == ["pong"]
        connection.outbox.let_go()
        connection.outbox.flush()
        assert sink.types() == ["pong", "heartbeat"]

    def test_holds_in_order(self) -> None:
        connection, _ = a_connection()
        held = [Held(a_notification(), (connection,), NOW) for _ in range(3)]
        for each in held:
            connection.hold(each)
        assert list((connection.unconfirmed or {}).values()) == held
