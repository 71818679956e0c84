from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.notification import EVERYONE, Audience, Notification, Priority
from notifyd.queue.codec import CorruptEntry, decode_entry, encode_entry

ID = "6f1de0fd-0000-4000-8000-000000000001"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PAYLOADS = [b"{}", b"null", b"12345678901234567890.10", '{"ä":["{{x}}",1e400]}'.encode()]

notifications = st.builds(
    Notification,
    id=st.uuids().map(str),
    occurred_at=st.floats(0, 4e9),
    event_type=texts,
    payload=st.sampled_from(PAYLOADS).map(msgspec.Raw),
    priority=st.sampled_from(Priority),
    ttl=st.none() | st.integers(0, 2**31),
    correlation_id=st.none() | texts,
    source=st.none() | texts,
    audience=st.just(EVERYONE)
    | st.builds(
        Audience, st.sampled_from(["Roles", "Users", "Channels"]), st.frozensets(texts, max_size=3)
    ),
    require_ack=st.booleans(),
)


@given(notifications)
def test_gives_back_what_it_was_given(notification: Notification) -> None:
    data = encode_entry(notification)
    assert b"\n" not in data
    assert decode_entry(data) == notification


def test_the_shape_is_settled() -> None:
    """What stands in stores; a change needs a new version and a reader for this one."""
    whole = Notification(
        ID,
        1.5,
        "order.created",
        msgspec.Raw(b'{"n":1}'),
        Priority.HIGH,
        60,
        "c",
        "billing",
        Audience("Roles", frozenset({"admin"})),
        True,
    )
    assert encode_entry(whole) == (
        b'{"v":1,"id":"%s","at":1.5,"event":"order.created","payload":{"n":1},"priority":"High",'
        b'"ttl":60,"correlation":"c","source":"billing",'
        b'"audience":{"type":"Roles","values":["admin"]},"ack":true}' % ID.encode()
    )
    plain = Notification(ID, 1.5, "e", msgspec.Raw(b"1"))
    assert encode_entry(plain) == b'{"v":1,"id":"%s","at":1.5,"event":"e","payload":1}' % (
        ID.encode()
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_json"),
        (b"\x00\xff", "not_json"),
        (b'{"v":1,"id":"x"', "not_json"),
        (b'{"v":1,"id":"x","at":1,"event":"e","payload":"\xff"}', "not_json"),
        (b"[]", "shape"),
        (b'{"id":"x","at":1,"event":"e","payload":1}', "shape"),
        (b'{"v":1,"id":"x","at":1,"event":"e"}', "shape"),
        (b'{"v":1,"id":7,"at":1,"event":"e","payload":1}', "shape"),
        (b'{"v":1,"id":"x","at":1,"event":"e","payload":1,"priority":"Urgent"}', "shape"),
        (b'{"v":1,"id":"x","at":1,"event":"e","payload":{\n"n":1}}', "shape"),
        (b'{"v":0,"id":"x","at":1,"event":"e","payload":1}', "version"),
        (b'{"v":2,"what":"ever"}', "version"),
    ],
)
def test_anything_else_is_corrupt_and_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptEntry) as caught:
        decode_entry(data)
    assert caught.value.reason == reason
    assert str(caught.value)
