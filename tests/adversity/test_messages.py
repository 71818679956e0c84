"""Client messages that are wrong, on both servers: an `error`, and the connection lives."""

from __future__ import annotations

import json

import pytest

from tests.adversity.hosting import Hosted
from tests.adversity.raw import BINARY, CONTINUATION, frame, text

NIL = "00000000-0000-0000-0000-000000000000"

WRONG = [
    (b"", "INVALID_MESSAGE"),
    (b"{", "INVALID_MESSAGE"),
    (b"hello", "INVALID_MESSAGE"),
    (b"null", "INVALID_MESSAGE"),
    (b"[]", "INVALID_MESSAGE"),
    (b"7", "INVALID_MESSAGE"),
    (b"{}", "INVALID_MESSAGE"),
    (b'{"type":"Ping"}{"type":"Ping"}', "INVALID_MESSAGE"),
    (b'{"type":7}', "INVALID_MESSAGE"),
    (b'{"type":null}', "INVALID_MESSAGE"),
    (b'{"type":"ping"}', "INVALID_MESSAGE"),
    (b'{"type":"Publish","payload":{}}', "INVALID_MESSAGE"),
    (b'{"type":"' + b"x" * 60_000 + b'"}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe"}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":[]}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":{}}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":{"channels":"orders"}}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":{"channels":[7]}}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":{"channels":["\\ud800"]}}', "INVALID_MESSAGE"),
    (b'{"type":"Subscribe","payload":{"channels":["a\\u0000"]}}', "SUBSCRIPTION_ERROR"),
    (b'{"type":"Subscribe","payload":{"channels":["a\\nb"]}}', "SUBSCRIPTION_ERROR"),
    (b'{"type":"Subscribe","payload":{"channels":[""]}}', "SUBSCRIPTION_ERROR"),
    (b'{"type":"Subscribe","payload":{"channels":["%b"]}}' % (b"c" * 65), "SUBSCRIPTION_ERROR"),
    (b'{"type":"Subscribe","payload":{"channels":["*"]}}', "SUBSCRIPTION_ERROR"),
    (b'{"type":"Ack"}', "INVALID_MESSAGE"),
    (b'{"type":"Ack","payload":{}}', "INVALID_ACK"),
    (b'{"type":"Ack","payload":{"notification_id":7}}', "INVALID_MESSAGE"),
    (b'{"type":"Ack","payload":{"notification_id":"x"}}', "INVALID_ACK"),
    (b'{"type":"Ack","payload":{"notification_id":"%b"}}' % NIL.encode(), "INVALID_ACK"),
    (b'{"type":"Ack","payload":{"notification_ids":[]}}', "INVALID_ACK"),
    (
        json.dumps({"type": "Ack", "payload": {"notification_ids": [NIL] * 101}}).encode(),
        "INVALID_ACK",
    ),
    (b'{"type":"Auth"}', "INVALID_MESSAGE"),
    (b'{"type":"Auth","payload":{"token":7}}', "INVALID_MESSAGE"),
    (b'{"type":"Auth","payload":{"token":"no token"}}', "UNAUTHORIZED"),
    (b'{"type":"Ping","payload":' + b"[" * 60_000 + b"}", "INVALID_MESSAGE"),
    (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, "INVALID_MESSAGE"),
]


@pytest.mark.parametrize(("data", "code"), WRONG, ids=[str(i) for i in range(len(WRONG))])
async def test_a_wrong_message_gets_an_error(server: Hosted, data: bytes, code: str) -> None:
    async with server.websocket() as client:
        await client.send(text(data))
        error = await client.message()
        assert (error["type"], error["code"]) == ("error", code), error
        assert len(error["message"]) < 500
        await client.pings()


async def test_all_wrong_messages_in_one_segment(server: Hosted) -> None:
    async with server.websocket() as client:
        await client.send(*[text(data) for data, _ in WRONG])
        assert [(await client.message())["code"] for _ in WRONG] == [code for _, code in WRONG]
        await client.pings()


async def test_what_is_odd_but_right(server: Hosted) -> None:
    async with server.websocket() as client:
        for data in (
            b' \n\t{ "type" : "Ping" }\r\n ',
            b'{"type":"Ping","type":"Ping"}',
            b'{"newer":{"field":[1]},"type":"Ping","payload":"whatever"}',
            b'{"type":"Pi\\u006eg"}',
            '{"type":"Ping","x":"\u2028\\u0000"}'.encode(),
        ):
            await client.send(text(data))
            assert (await client.message())["type"] == "pong"
        # Some granted, some refused: both are told.
        await client.say(type="Subscribe", payload={"channels": ["a", "b c", "a"], "more": 1})
        assert (await client.message())["payload"] == ["a"]
        assert "b c" in (await client.message())["message"]


async def test_more_subscriptions_than_one_connection_may_have(server: Hosted) -> None:
    names = [f"many-{number}" for number in range(60)]
    async with server.websocket() as client:
        await client.say(type="Subscribe", payload={"channels": names})
        assert len((await client.message())["payload"]) == 50
        assert (await client.message())["code"] == "SUBSCRIPTION_ERROR"


async def test_binary_messages_get_an_error(server: Hosted) -> None:
    async with server.websocket() as client:
        for data in (
            frame(BINARY, b'{"type":"Ping"}'),
            frame(BINARY, b""),
            frame(BINARY, b"\xff" * 60_000),
            frame(BINARY, b"\xff", fin=False) + frame(CONTINUATION, b"\xfe"),
        ):
            await client.send(data)
            error = await client.message()
            assert (error["type"], error["code"]) == ("error", "UNSUPPORTED_FORMAT")
        await client.pings()


async def test_a_message_over_64_kib_closes_1009(server: Hosted) -> None:
    async with server.websocket() as client:
        await client.send(text(b'{"type":"Ping"}'.ljust(65_536)))
        await client.message("pong")
        await client.send(text(b'{"type":"Ping"}'.ljust(65_537)))
        assert await client.close_code() == 1009
    async with server.websocket() as client:
        # … counted in bytes, not in characters
        wide = "€" * 21_900
        await client.send(text(json.dumps({"type": "Ping", "x": wide}, ensure_ascii=False)))
        assert await client.close_code() == 1009
