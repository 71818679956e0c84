"""Bodies of publishing calls that are wrong, each through a socket, on both servers."""

from __future__ import annotations

import json

import pytest

from tests.adversity.hosting import Hosted
from tests.adversity.raw import Response

API = "/api/v1/notifications"
SEND = f"{API}/send"
USERS = f"{API}/send-to-users"
CHANNEL = f"{API}/channel"
CHANNELS = f"{API}/channels"
BROADCAST = f"{API}/broadcast"
BATCH = f"{API}/batch"


def send_body(payload: str = "{}", **more: object) -> bytes:
    """A body for `send` whose payload is this very text."""
    fields = {"target_user_id": "u1", "event_type": "e", **more}
    return json.dumps(fields)[:-1].encode() + b', "payload": ' + payload.encode() + b"}"


def nested(depth: int) -> str:
    """Lists in lists."""
    return "[" * depth + "]" * depth


GOOD = send_body()

NOT_JSON = [
    pytest.param(b"", id="empty"),
    pytest.param(b"{", id="open"),
    pytest.param(b"hello", id="word"),
    pytest.param(GOOD + b"x", id="more behind"),
    pytest.param(GOOD + GOOD, id="twice"),
    pytest.param(b'{"target_user_id": "u1", "event_type": "e", "payload": NaN}', id="NaN"),
    pytest.param(b'{"target_user_id": "u1", "event_type": "e", "payload": {"a" 1}}', id="inside"),
    pytest.param(b'{"target_user_id": "u1", "event_type": "e", "payload": [1,]}', id="comma"),
    pytest.param(GOOD.replace(b"u1", b"u\x00"), id="raw NUL"),
    pytest.param(send_body('"\x01"'), id="raw control character in the payload"),
    pytest.param(GOOD.replace(b"u1", b"u\xff"), id="invalid UTF-8"),
    pytest.param(send_body('"%"').replace(b"%", b"\xc3\x28"), id="invalid UTF-8 in the payload"),
    pytest.param(send_body('"%"').replace(b"%", b"\xed\xa0\x80"), id="a surrogate as UTF-8"),
    pytest.param(send_body('"%"').replace(b"%", b"\xc0\x80"), id="overlong NUL"),
    pytest.param("\ufeff".encode() + GOOD, id="byte order mark"),
    pytest.param(GOOD.decode().encode("utf-16"), id="UTF-16"),
]


@pytest.mark.parametrize("body", NOT_JSON)
async def test_what_is_not_json_in_utf8_is_a_400(server: Hosted, body: bytes) -> None:
    answer = await server.call("POST", SEND, body)
    assert (answer.status, answer.code) == (400, "BAD_REQUEST"), answer.body
    assert answer.header("x-request-id")


INVALID = [
    # wrong types
    (SEND, b"[]", None),
    (SEND, b"null", None),
    (SEND, b'"text"', None),
    (SEND, b'{"target_user_id": 7, "event_type": "e", "payload": {}}', "target_user_id"),
    (SEND, send_body(event_type=["e"]), "event_type"),
    (SEND, send_body(ttl="60"), "ttl"),
    (SEND, send_body(ttl=1.5), "ttl"),
    (SEND, send_body(ttl=-1), "ttl"),
    (SEND, send_body(ttl=31_536_001), "ttl"),
    (SEND, send_body(ttl=10**30), "ttl"),
    (SEND, send_body(priority=3), "priority"),
    (SEND, send_body(priority="Urgent"), "priority"),
    (SEND, send_body(require_ack="yes"), "require_ack"),
    (SEND, send_body(id="not-a-uuid"), "id"),
    (SEND, send_body(audience={"type": "Nobody"}), "audience.type"),
    (SEND, send_body(event_type=""), "event_type"),
    (SEND, send_body(event_type="e" * 129), "event_type"),
    (SEND, send_body(idempotency_key="k" * 257), "idempotency_key"),
    (SEND, send_body(idempotency_key=""), "idempotency_key"),
    # missing
    (SEND, b"{}", "target_user_id"),
    (SEND, b'{"event_type": "e", "payload": {}}', "target_user_id"),
    (SEND, b'{"target_user_id": "u1", "payload": {}}', "event_type"),
    (SEND, b'{"target_user_id": "u1", "event_type": "e"}', "payload"),
    (CHANNEL, b'{"event_type": "e", "payload": {}}', "channel"),
    (BATCH, b"{}", "notifications"),
    # names
    (SEND, send_body(target_user_id="u" * 300), "target_user_id"),
    (SEND, send_body(target_user_id=""), "target_user_id"),
    (SEND, send_body(target_user_id="u\0"), "target_user_id"),
    (SEND, send_body(target_user_id="u\n1"), "target_user_id"),
    (SEND, send_body(target_user_id="\u202eu"), "target_user_id"),
    (CHANNEL, b'{"channel": "a\\u0000", "event_type": "e", "payload": {}}', "channel"),
    (CHANNEL, b'{"channel": "a b", "event_type": "e", "payload": {}}', "channel"),
    (CHANNEL, b'{"channel": "orders\\n", "event_type": "e", "payload": {}}', "channel"),
    (CHANNEL, b'{"channel": ":a", "event_type": "e", "payload": {}}', "channel"),
    (CHANNEL, b'{"channel": "%b", "event_type": "e", "payload": {}}' % (b"c" * 65), "channel"),
    (CHANNELS, b'{"channels": [], "event_type": "e", "payload": {}}', "channels"),
    (CHANNELS, b'{"channels": ["a", "b c"], "event_type": "e", "payload": {}}', "channels"),
    (
        CHANNELS,
        json.dumps(
            {"channels": [f"c{i}" for i in range(101)], "event_type": "e", "payload": {}}
        ).encode(),
        "channels",
    ),
    (USERS, b'{"target_user_ids": [], "event_type": "e", "payload": {}}', "target_user_ids"),
    (USERS, b'{"target_user_ids": ["u", 7], "event_type": "e", "payload": {}}', "target_user_ids"),
    (
        USERS,
        json.dumps(
            {"target_user_ids": [f"u{i}" for i in range(10_001)], "event_type": "e", "payload": {}}
        ).encode(),
        "target_user_ids",
    ),
    # items
    (BATCH, b'{"notifications": []}', "notifications"),
    (BATCH, b'{"notifications": [%b]}' % b",".join([b"{}"] * 101), "notifications"),
    (BATCH, b'{"notifications": {}}', "notifications"),
    (BATCH, b'{"notifications": [{}], "options": {"stop": true}}', "options.stop"),
    # nesting
    (SEND, send_body(nested(65)), "payload"),
    (SEND, send_body('{"a":' * 65 + "1" + "}" * 65), "payload"),
    (SEND, send_body(nested(30_000)), None),
    (SEND, send_body("[" * 60_000), None),
]


@pytest.mark.parametrize(
    ("path", "body", "field"), INVALID, ids=[f"{each[2]}-{i}" for i, each in enumerate(INVALID)]
)
async def test_json_of_the_wrong_shape_is_a_422_that_names_the_field(
    server: Hosted, path: str, body: bytes, field: str | None
) -> None:
    answer = await server.call("POST", path, body)
    if body.endswith(b"[" * 100 + b"}"):
        # Deeper than anybody looks: either refusal is true.
        assert answer.status in (400, 422)
        return
    assert (answer.status, answer.code) == (422, "VALIDATION_ERROR"), answer.body
    if field is not None:
        told = answer.json["error"].get("details", {}).get("field", "")
        assert told.startswith(field), answer.body


@pytest.mark.parametrize(
    ("body", "near"),
    [
        (send_body(target_user="u1"), "target_user_id"),
        (send_body(prioritty="High"), "priority"),
        (GOOD[:-1] + b', "%b": 1}' % (b"x" * 1000), ""),
    ],
)
async def test_an_unknown_field_is_told_with_the_nearest_known_one(
    server: Hosted, body: bytes, near: str
) -> None:
    answer = await server.call("POST", SEND, body)
    assert (answer.status, answer.code) == (422, "VALIDATION_ERROR")
    assert near in answer.json["error"]["message"]
    assert len(answer.body) < 500


@pytest.mark.parametrize(
    "body",
    [
        send_body('"\\ud800"'),
        send_body('{"a": ["\\udc00\\ud800"]}'),
        send_body('{"\\ud83d": 1}'),
        GOOD.replace(b"u1", b"u\\ud800"),
        GOOD.replace(b'"e"', b'"e\\udfff"'),
    ],
)
async def test_half_a_surrogate_pair_is_a_422(server: Hosted, body: bytes) -> None:
    answer = await server.call("POST", SEND, body)
    assert (answer.status, answer.code) == (422, "VALIDATION_ERROR"), answer.body


@pytest.mark.parametrize(
    ("path", "limit"), [(SEND, 65536), (BATCH, 1 << 20), (USERS, 4 << 20), (BROADCAST, 65536)]
)
async def test_a_body_over_its_limit_is_a_413(server: Hosted, path: str, limit: int) -> None:
    answer = await server.call("POST", path, b" " * (limit + 1))
    assert (answer.status, answer.code) == (413, "PAYLOAD_TOO_LARGE")
    # … and one at its limit is read: it is no JSON.
    answer = await server.call("POST", path, b" " * limit)
    assert (answer.status, answer.code) == (400, "BAD_REQUEST")


async def test_a_body_of_65_kib_and_a_batch_over_1_mib(server: Hosted) -> None:
    body = send_body(json.dumps("x" * (65 * 1024)))
    assert (await server.call("POST", SEND, body)).status == 413
    item = {"target": {"type": "user", "value": "u1"}, "event_type": "e", "payload": "x" * 10_000}
    batch = json.dumps({"notifications": [item] * 100}).encode()
    assert (await server.call("POST", BATCH, batch.ljust((1 << 20) + 1))).status == 413
    answer = await server.call("POST", BATCH, batch.ljust(1 << 20))
    assert answer.status == 200
    assert answer.json["summary"]["total"] == 100


async def test_nesting_of_64_is_taken_and_100_000_is_not(server: Hosted) -> None:
    assert (await server.call("POST", SEND, send_body(nested(64)))).status == 200
    item = send_body(nested(100_000)).replace(
        b'"target_user_id": "u1"', b'"target": {"type": "broadcast"}'
    )
    good = item.replace(nested(100_000).encode(), b"1")
    answer = await server.call("POST", BATCH, b'{"notifications": [%b, %b]}' % (item, good))
    if answer.status == 200:
        bad, sent = answer.json["results"]
        assert "deep" in bad["error"]
        assert "error" not in sent
    else:
        assert (answer.status, answer.code) == (422, "VALIDATION_ERROR"), answer.body


async def test_a_bad_item_is_an_error_of_that_item_alone(server: Hosted) -> None:
    good = b'{"target":{"type":"user","value":"u1"},"event_type":"e","payload":1}'
    bad = [
        b"7",
        b"null",
        b"{}",
        good.replace(b"user", b"nobody"),
        good.replace(b'"u1"', b'"u\\u0000"'),
        good.replace(b'"u1"', b'["u1"]'),
        good.replace(b'"u1"', b'"%b"' % (b"u" * 300)),
        good.replace(b":1}", b":%b}" % nested(65).encode()),
        good.replace(b":1}", b':1,"tt1":3}'),
        good.replace(b":1}", b':"%b"}' % (b"x" * 66_000)),
    ]
    body = b'{"notifications": [%b]}' % b",".join([*bad, good])
    answer = await server.call("POST", BATCH, body)
    assert answer.status == 200, answer.body
    *refused, sent = answer.json["results"]
    assert [each["index"] for each in refused] == list(range(len(bad)))
    assert all(each["error"] and not each["success"] for each in refused)
    assert all(
        each["notification_id"] == "00000000-0000-0000-0000-000000000000" for each in refused
    )
    assert "error" not in sent


async def test_a_notification_over_64_kib_once_encoded_is_a_422(server: Hosted) -> None:
    # The body is within its limit, the notification with its metadata is not.
    body = send_body(json.dumps("x" * (65_536 - 150)))
    assert len(body) <= 65_536
    answer = await server.call("POST", SEND, body)
    assert (answer.status, answer.code) == (422, "VALIDATION_ERROR")


async def test_a_template_that_grows_past_64_kib_is_a_422(server: Hosted) -> None:
    template = {
        "id": f"grows-{server.lane}",
        "name": "grows",
        "event_type": "e",
        "payload_template": {f"k{i}": "{{a}}{{a}}{{a}}{{a}}" for i in range(500)},
    }
    answer = await server.call("POST", "/api/v1/templates", json.dumps(template).encode())
    assert answer.status == 201, answer.body

    def filled_in(length: int) -> bytes:
        variables = {"a": "x" * length}
        return json.dumps(
            {"target_user_id": "u1", "template_id": template["id"], "variables": variables}
        ).encode()

    answer = await server.call("POST", SEND, filled_in(60_000))
    assert (answer.status, answer.code) == (422, "VALIDATION_ERROR")
    assert (await server.call("POST", SEND, filled_in(10))).status == 200
    answer = await server.call("DELETE", f"/api/v1/templates/{template['id']}")
    assert answer.status in (200, 204)


ODD_PAYLOAD = (
    '{\r\n\t"a" :\n[1 ,\n 2],"nul":"\\u0000","text":"one\\ntwo\u2028\u0085","n":1.0E+2\n}\n'
)
ODD_CANONICAL = '{"a":[1,2],"nul":"\\u0000","text":"one\\ntwo\u2028\u0085","n":1.0E+2}'


async def test_newlines_between_tokens_reach_nobody(server: Hosted) -> None:
    """One WebSocket message, one line of an event, whatever the caller's JSON looks like."""
    async with server.websocket("odd") as websocket, server.stream("odd") as stream:
        answer = await server.call("POST", SEND, send_body(ODD_PAYLOAD, target_user_id="odd"))
        assert answer.status == 200
        assert answer.json["delivered_to"] == 2
        frame = await websocket.frame()
        while b'"notification"' not in frame.payload:
            frame = await websocket.frame()
        assert f'"payload":{ODD_CANONICAL}'.encode() in frame.payload
        (line,) = await stream.event("notification")
        assert line.startswith(b"data: {")
        assert f'"payload":{ODD_CANONICAL}'.encode() in line
        assert b"\r" not in line


async def test_names_in_paths(server: Hosted) -> None:
    async def status(path: str) -> Response:
        return await server.call("GET", path)

    assert (await status("/api/v1/users/u%00/subscriptions")).status in (404, 422)
    assert (await status(f"/api/v1/users/{'u' * 300}/subscriptions")).status in (404, 422)
    assert (await status("/api/v1/users/%ff/subscriptions")).status == 400
    assert (await status("/api/v1/users/%zz/subscriptions")).status == 400
    assert (await status("/api/v1/users/%ed%a0%80/subscriptions")).status == 400
    assert (await status("/api/v1/channels/a%0Ab")).status in (404, 422)
    assert (await status("/api/v1/users/a%2Fb/subscriptions")).status == 404
    async with server.websocket("a/b ü"):
        answer = await status("/api/v1/users/a%2Fb%20%C3%BC/subscriptions")
        assert answer.json["user_id"] == "a/b ü"
