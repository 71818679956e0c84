"""Bodies and what is wrong with them."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from notifyd.api.batches import BatchBody
from notifyd.api.notifications import ChannelBody, SendToUsersBody
from notifyd.compose import AudienceBody, NotificationBody
from notifyd.decoding import Decoder
from notifyd.errors import BadRequest, ValidationError

decode = Decoder(ChannelBody)


def refusal(data: bytes, decoder: Decoder[object] = decode) -> ValidationError:  # type: ignore[assignment]  # any will do
    with pytest.raises(ValidationError) as caught:
        decoder(data)
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"{",
        b'{"channel":"a"}x',
        b"\xef\xbb\xbf{}",
        b'{"channel":NaN}',
        b"{'a':1}",
        b'{"channel":"\\u00',
    ],
)
def test_what_is_not_json_is_a_bad_request(data: bytes) -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"channel":"a\xff"}',
        b'{"channel":"a","payload":"\xc3\x28"}',
        b'{"channel":"a","payload":"\xed\xa0\x80"}',  # a surrogate half, which UTF-8 has not
    ],
)
def test_what_is_not_utf8_is_a_bad_request_also_inside_a_payload(data: bytes) -> None:
    with pytest.raises(BadRequest, match="not UTF-8: byte"):
        decode(data)


@pytest.mark.parametrize(
    "data", [b'{"channel":"\\ud800"}', b'{"channel":"a","payload":{"x":"\\udc00"}}']
)
def test_half_a_surrogate_pair_is_no_text(data: bytes) -> None:
    assert "surrogate" in refusal(data).message


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        (b"{}", "channel", "channel is missing."),
        (b"[1]", None, "The body must be object, not array."),
        (b'{"channel":1}', "channel", "channel must be str, not int."),
        (b'{"channel":"a","ttl":true}', "ttl", "ttl must be int | null, not bool."),
        (b'{"channel":"a","ttl":-1}', "ttl", "ttl must be int >= 0."),
        (b'{"channel":"a","ttl":31536001}', "ttl", "ttl must be int <= 31536000."),
        (b'{"channel":"a","ttl":1.5}', "ttl", "ttl must be int | null, not float."),
        (b'{"channel":"a","event_type":""}', "event_type", "str of length >= 1"),
        (b'{"channel":"a","audience":{}}', "audience.type", "audience.type is missing."),
        (
            b'{"channel":"a","audience":{"type":"Roles","value":["a",2]}}',
            "audience.value[1]",
            "str",
        ),
    ],
)
def test_a_wrong_shape_names_its_field(data: bytes, field: str | None, message: str) -> None:
    error = refusal(data)
    assert error.field == field
    assert message in error.message
    assert error.constraint


@pytest.mark.parametrize(
    ("data", "field", "nearest"),
    [
        (b'{"chanel":"a"}', "chanel", '"channel"'),
        (b'{"channel":"a","evnt_type":"x"}', "evnt_type", '"event_type"'),
        (b'{"channel":"a","audience":{"tpe":1}}', "audience.tpe", '"type"'),
        (b'{"channel":"a","zzz":1}', "zzz", "nearest known"),
    ],
)
def test_an_unknown_field_names_the_nearest_known_one(
    data: bytes, field: str, nearest: str
) -> None:
    error = refusal(data)
    assert error.field == field
    assert nearest in error.message


def test_an_unknown_field_of_endless_length_is_told_short() -> None:
    error = refusal(b'{"' + b"x" * 10_000 + b'":1}')
    assert len(error.message) < 200
    assert error.field is not None
    assert len(error.field) <= 64


def test_unknown_fields_are_named_inside_lists_and_options() -> None:
    batch = Decoder(BatchBody)
    with pytest.raises(ValidationError) as caught:
        batch(b'{"notifications":[1],"options":{"stop_on_eror":true}}')
    assert caught.value.field == "options.stop_on_eror"
    assert '"stop_on_error"' in caught.value.message


def test_a_shape_that_msgspec_tells_in_other_words() -> None:
    class Odd(msgspec.Struct, forbid_unknown_fields=True):
        many: dict[str, list[AudienceBody]] = {}
        kind: Literal["a", "b"] = "a"

    decoder = Decoder(Odd)
    with pytest.raises(ValidationError) as caught:
        decoder(b'{"kind":"c"}')
    assert caught.value.field == "kind"
    assert "Invalid enum value" in caught.value.message
    with pytest.raises(ValidationError) as caught:
        decoder(b'{"many":{"x":[{"type":"All","tpye":1}]}}')
    assert caught.value.field == "many[...][0].tpye"
    assert caught.value.message == '"tpye" is no known field.'


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_nesting_without_end_is_refused_and_not_followed(depth: int) -> None:
    data = b'{"channel":"a","payload":' + b"[" * depth + b"]" * depth + b"}"
    assert "nested" in refusal(data).message


def test_lists_are_bounded() -> None:
    with pytest.raises(ValidationError, match="length <= 10000"):
        Decoder(SendToUsersBody)(b'{"target_user_ids":[' + b'"a",' * 10_000 + b'"a"]}')
    with pytest.raises(ValidationError, match="length >= 1"):
        Decoder(SendToUsersBody)(b'{"target_user_ids":[]}')


def test_an_item_of_a_batch_is_decoded_on_its_own() -> None:
    batch = Decoder(BatchBody)(b'{"notifications":[{"target":{"type":"user","value":"u"}},"x"]}')
    items = Decoder(NotificationBody)
    assert items.item(batch.notifications[0]).target.value == "u"
    with pytest.raises(ValidationError, match="must be object"):
        items.item(batch.notifications[1])
