from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from notifyd import wire
from notifyd.errors import RateLimited, ValidationError
from notifyd.notification import Audience, Priority
from notifyd.wire import Message
from tests.unit.connected import NOW, a_notification


def parsed(data: bytes) -> list[Frame]:
    """Frames as the `websockets` package reads them, from a server."""
    reader = StreamReader()
    reader.feed_data(data)
    frames = []
    while reader.buffer:
        parser = Frame.parse(reader.read_exact, mask=False)
        try:
            while True:
                next(parser)
        except StopIteration as parsed:
            frames.append(parsed.value)
    return frames


class TestFrames:
    @pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
    def test_text_of_any_length(self, length: int) -> None:
        data = b"x" * length
        (frame,) = parsed(wire.text_frame(data))
        assert (frame.opcode, bytes(frame.data), frame.fin) == (Opcode.TEXT, data, True)
        assert (frame.rsv1, frame.rsv2, frame.rsv3) == (False, False, False)

    @pytest.mark.parametrize("payload", [b"", b"\0\0\0\1", b"x" * 125])
    def test_ping_and_pong(self, payload: bytes) -> None:
        ping, pong = parsed(wire.ping_frame(payload) + wire.pong_frame(payload))
        assert (ping.opcode, bytes(ping.data)) == (Opcode.PING, payload)
        assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, payload)

    @given(st.lists(st.text(max_size=300), max_size=8), st.integers(0, 8))
    def test_texts_come_out_of_frames_as_they_went_in(self, texts: list[str], at: int) -> None:
        frames = [wire.text_frame(text.encode()) for text in texts]
        frames.insert(at, wire.ping_frame(b"1234"))
        assert list(wire.texts_of_frames(b"".join(frames))) == texts

    def test_texts_of_large_frames(self) -> None:
        texts = ["a" * 126, "b" * 65_535, "c" * 65_536, "d"]
        data = b"".join(wire.text_frame(text.encode()) for text in texts) + wire.ping_frame()
        assert list(wire.texts_of_frames(data)) == texts
        assert list(wire.texts_of_frames(b"")) == []


class TestMessage:
    def test_is_encoded_once_for_each_transport(self) -> None:
        message = Message("subscribed", b'{"type":"subscribed","payload":["orders"]}')
        assert message.websocket is message.websocket
        assert message.sse is message.sse
        assert parsed(message.websocket)[0].data == (b'{"type":"subscribed","payload":["orders"]}')
        assert message.sse == b'event: subscribed\ndata: {"payload":["orders"]}\n\n'

    def test_without_fields(self) -> None:
        assert wire.PONG.json == b'{"type":"pong"}'
        assert wire.HEARTBEAT.sse == b"event: heartbeat\ndata: {}\n\n"

    def test_fields_that_are_none_are_left_out(self) -> None:
        assert wire.message("x", a=None, b=0, c="").json == b'{"type":"x","b":0,"c":""}'

    @given(st.text())
    def test_no_text_breaks_an_event_in_two(self, text: str) -> None:
        event = wire.message("shutdown", reason=text).sse
        assert event.count(b"\n") == 3
        assert b"\r" not in event
        data = event.split(b"data: ", 1)[1]
        assert json.loads(data) == {"reason": text}

    def test_connected(self) -> None:
        message = wire.connected_message(
            "c1", "u1", expires_at=NOW, heartbeat_interval=30.0, subscriptions=["orders"]
        )
        assert json.loads(message.json) == {
            "type": "connected",
            "connection_id": "c1",
            "user_id": "u1",
            "session": {
                "expires_at": "2027-01-15T08:00:00Z",
                "heartbeat_interval": 30,
                "subscriptions": ["orders"],
            },
        }
        assert b'"heartbeat_interval":30,' in message.json
        endless = wire.connected_message(
            "c1", "u1", expires_at=None, heartbeat_interval=0.5, subscriptions=()
        )
        assert json.loads(endless.json)["session"] == {
            "heartbeat_interval": 0.5,
            "subscriptions": [],
        }

    def test_gap(self) -> None:
        assert json.loads(wire.gap_message("user:u1", "queue_overflow", 3, 7).json) == {
            "type": "gap",
            "stream": "user:u1",
            "from": 3,
            "to": 7,
            "reason": "queue_overflow",
        }

    def test_error(self) -> None:
        plain = wire.error_message(ValidationError("No.", field="x"))
        assert json.loads(plain.json) == {
            "type": "error",
            "code": "VALIDATION_ERROR",
            "message": "No.",
        }
        later = wire.error_message(RateLimited("Later.", retry_after=7))
        assert json.loads(later.json)["retry_after_seconds"] == 7

    def test_acked(self) -> None:
        def told(*given: Any, single: bool) -> dict[str, Any]:
            answer: dict[str, Any] = json.loads(wire.acked_message(*given, single=single).json)
            assert answer.pop("type") == "acked"
            return answer

        assert told(["a"], [], single=True) == {"notification_id": "a"}
        assert told(["a", "b"], [], single=False) == {
            "notification_id": "a",
            "notification_ids": ["a", "b"],
        }
        assert told([], ["c"], single=False) == {"notification_ids": [], "refused": ["c"]}

    def test_names(self) -> None:
        assert wire.names_message("subscribed", {"a": None, "b": None}).json == (
            b'{"type":"subscribed","payload":["a","b"]}'
        )

    def test_sse_extras(self) -> None:
        assert wire.sse_retry(1500) == b"retry: 1500\n\n"
        assert wire.sse_heartbeat(NOW) == (
            b'event: heartbeat\ndata: {"timestamp":"2027-01-15T08:00:00.000Z"}\n\n'
        )


class TestNotificationMessage:
    def test_has_every_field_and_not_the_members_of_its_audience(self) -> None:
        notification = a_notification(
            id="n1",
            payload=b'{"n":1.50,"m":12345678901234567890}',
            priority=Priority.HIGH,
            ttl=3600,
            correlation_id="c1",
            source="billing",
            audience=Audience("Users", frozenset({"secret-user"})),
        )
        message = wire.notification_message(notification)
        assert json.loads(message.json) == {
            "type": "notification",
            "id": "n1",
            "occurred_at": "2027-01-15T08:00:00.000Z",
            "event_type": "order.created",
            "payload": {"n": 1.5, "m": 12345678901234567890},
            "metadata": {
                "source": "billing",
                "priority": "High",
                "audience": {"type": "Users"},
                "ttl": 3600,
                "correlation_id": "c1",
            },
        }
        assert b'"payload":{"n":1.50,"m":12345678901234567890}' in message.json
        assert b"secret-user" not in message.json
        assert message.sse.startswith(b'event: notification\ndata: {"id":"n1"')

    def test_what_has_no_value_is_left_out_and_a_replay_is_marked(self) -> None:
        notification = a_notification(source="http-api")
        live = json.loads(wire.notification_message(notification).json)["metadata"]
        assert live == {"source": "http-api", "priority": "Normal", "audience": {"type": "All"}}
        again = json.loads(wire.notification_message(notification, replayed=True).json)
        assert again["metadata"] == {**live, "replayed": True}

    def test_over_64_kib_is_refused_unless_it_was_taken_before(self) -> None:
        def of(size: int) -> Message:
            return wire.notification_message(a_notification(payload=b'"%s"' % (b"x" * size)))

        fits = 65_536 - len(of(0).body)
        assert len(of(fits).body) == 65_536
        with pytest.raises(ValidationError) as caught:
            of(fits + 1)
        assert caught.value.field == "payload"
        largest = a_notification(payload=b'"%s"' % (b"x" * fits))
        assert len(wire.notification_message(largest, replayed=True).body) > 65_536


class TestClientMessages:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"type":"Ping"}', wire.Ping()),
            (
                '{"type":"Subscribe","payload":{"channels":["a","b"]}}',
                wire.Subscribe(wire.Channels(["a", "b"])),
            ),
            (
                ' {"payload":{"channels":[],"since":{}},"type":"Unsubscribe","new":[1]}\n',
                wire.Unsubscribe(wire.Channels([])),
            ),
            (
                '{"type":"Ack","payload":{"notification_id":"n"}}',
                wire.Ack(wire.AckPayload("n")),
            ),
            (
                '{"type":"Ack","payload":{"notification_ids":["n","m"]}}',
                wire.Ack(wire.AckPayload(None, ["n", "m"])),
            ),
            ('{"type":"Auth","payload":{"token":"t"}}', wire.Auth(wire.AuthPayload("t"))),
        ],
    )
    def test_are_read_and_unknown_fields_ignored(
        self, text: str, message: wire.ClientMessage
    ) -> None:
        assert wire.decode_client_message(text) == message
        assert wire.decode_client_message(text.encode()) == message

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "{",
            "[]",
            "null",
            '"Ping"',
            "{}",
            '{"type":1}',
            '{"type":"ping"}',
            '{"type":"Publish","payload":{}}',
            '{"type":"Subscribe"}',
            '{"type":"Subscribe","payload":{"channels":"a"}}',
            '{"type":"Subscribe","payload":{"channels":[1]}}',
            '{"type":"Subscribe","payload":{"channels":["\\ud800"]}}',
            '{"type":"Ack","payload":[]}',
            '{"type":"Auth","payload":{"token":null}}',
            '{"type":"Ping"}{"type":"Ping"}',
            '{"type":"Ping","x":' + "[" * 100_000 + "]" * 100_000 + "}",
        ],
    )
    def test_anything_else_is_refused_with_a_reason(self, text: str) -> None:
        with pytest.raises(wire.InvalidMessage) as caught:
            wire.decode_client_message(text)
        assert caught.value.code == "INVALID_MESSAGE"
        assert caught.value.message.endswith(".")
        assert len(caught.value.message) < 300

    def test_an_unknown_type_is_told_the_known_ones(self) -> None:
        with pytest.raises(wire.InvalidMessage, match=r"Known types: Subscribe, .*Auth"):
            wire.decode_client_message('{"type":"Publish"}')

    def test_a_token_is_not_shown(self) -> None:
        assert "secret" not in repr(wire.Auth(wire.AuthPayload("secret")))


class TestPayloads:
    def test_is_on_one_line_with_every_digit(self) -> None:
        raw = '{\n "a" :\t[1.50, 1e400, 12345678901234567890123], "b": "ä\\n\\u00e4 [}"\r\n}'
        assert bytes(wire.normalise_payload(raw.encode())) == (
            '{"a":[1.50,1e400,12345678901234567890123],"b":"ä\\n\\u00e4 [}"}'.encode()
        )

    @pytest.mark.parametrize("raw", [b"null", b"0", b'"x"', b"[]", b"true"])
    def test_any_json_is_a_payload(self, raw: bytes) -> None:
        assert bytes(wire.normalise_payload(msgspec.Raw(raw))) == raw

    @pytest.mark.parametrize("raw", [b"", b"{", b"{,}", b"NaN", b"'x'", b'"\\ud800"', b"1 2"])
    def test_what_is_no_json_is_refused(self, raw: bytes) -> None:
        with pytest.raises(ValidationError) as caught:
            wire.normalise_payload(raw, "variables.x")
        assert caught.value.field == "variables.x"

    @pytest.mark.parametrize("depth", [65, 1000, 100_000])
    def test_at_most_64_deep(self, depth: int) -> None:
        deep = b"[" * depth + b"]" * depth
        with pytest.raises(ValidationError) as caught:
            wire.normalise_payload(deep)
        assert caught.value.constraint == "nested at most 64 deep"

    @pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"k":', b"}")])
    def test_64_deep_is_taken(self, pair: tuple[bytes, bytes]) -> None:
        opening, closing = pair
        deep = opening * 64 + b"1" + closing * 64
        assert bytes(wire.normalise_payload(deep)) == deep
        assert wire.nested_too_deep(opening + deep + closing)

    def test_width_is_not_depth(self) -> None:
        assert not wire.nested_too_deep(b"[" + b"[],{}," * 1000 + b"[]]")

    @pytest.mark.parametrize(
        "text", ["[" * 100, '"' * 3 + "[" * 100, "\\" * 5 + "{" * 100, '\\"[' * 100]
    )
    def test_brackets_inside_strings_do_not_count(self, text: str) -> None:
        data = json.dumps({text: [text, text]}).encode()
        assert not wire.nested_too_deep(data)
        deep = b"[" * 64 + data + b"]" * 64
        assert wire.nested_too_deep(deep)

    @given(
        st.recursive(
            st.none() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        ),
        st.integers(0, 70),
    )
    def test_depth_is_that_of_the_value(self, value: Any, around: int) -> None:
        for _ in range(around):
            value = [value]

        def depth(value: Any) -> int:
            if isinstance(value, dict):
                return 1 + max(map(depth, value.values()), default=0)
            return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

        data = json.dumps(value, ensure_ascii=False).encode()
        assert wire.nested_too_deep(data) == (depth(value) > 64)
