"""What users are promised: order, nothing lost before it is confirmed, and told what was."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest

from tests.conftest import StartServer, sections_of
from tests.front_door import (
    WAIT,
    Host,
    Lane,
    Listener,
    Message,
    Transport,
    channel,
    token,
    until,
    user,
)

T = TypeVar("T")


@pytest.fixture(params=["sockets", "asgi", "redis", "postgres"])
def place(request: pytest.FixtureRequest) -> str:
    """All tests here run with everything in memory in both lanes, and with everything in each store
    on our own sockets."""
    return str(request.param)


# Redis goes by a clock of its own, which no test can move.
MOVABLE_CLOCK = pytest.mark.parametrize("place", ["sockets", "asgi", "postgres"], indirect=True)


@pytest.fixture
def kept(request: pytest.FixtureRequest, place: str) -> dict[str, dict[str, Any]]:
    """Settings of one who keeps everything there."""
    return sections_of(request, place) if place in {"redis", "postgres"} else {}


@pytest.fixture
def start(place: str, kept: dict[str, dict[str, Any]], start_on: StartServer) -> StartServer:
    """Start a server there; `host` is one with no other settings."""
    here: Lane = "asgi" if place == "asgi" else "sockets"

    async def start(lane: Lane | None = here, **given: Any) -> Host:
        names = {*kept, *given}
        return await start_on(
            lane, **{name: {**kept.get(name, {}), **given.get(name, {})} for name in names}
        )

    return start


def ids_of(messages: Sequence[Message]) -> list[str]:
    """The ids of notifications, in order."""
    return [message["id"] for message in messages]


async def publish_many(host: Host, user_id: str, count: int) -> list[str]:
    """The ids of so many notifications, sent one after the other."""
    answers = [await host.publish(user(user_id), payload=n) for n in range(count)]
    return [answer["notification_id"] for answer in answers]


async def replayed_to(listener: Listener, ids: Sequence[str]) -> None:
    """These ids come, in order, marked, and then `caught_up`."""
    messages = await listener.notifications(len(ids))
    assert ids_of(messages) == list(ids)
    assert all(message["metadata"]["replayed"] is True for message in messages)
    assert (await listener.expect("caught_up"))["replayed"] == len(ids)


async def state_of(host: Host, notification_id: str, user_id: str = "ada") -> str:
    """What the ledger says of one recipient: `pending`, or by what he confirmed."""
    report = (await host.get(f"/api/v1/notifications/{notification_id}/acks")).json()
    for each in report.get("recipients", ()):
        if each["user_id"] == user_id:
            return str(each.get("by") or each["state"])
    return "unknown"


async def queued(host: Host) -> int:
    """How many notifications all logs have."""
    return int(await host.metric("queue_messages"))


async def becomes(ask: Callable[[], Awaitable[T]], wanted: T) -> None:
    """What `ask` answers comes to be this: a store may hear of a thing later than clients do."""
    deadline = time.monotonic() + WAIT
    while (found := await ask()) != wanted:
        assert time.monotonic() < deadline, f"{found} did not become {wanted} in {WAIT:g} s"


async def vanished(host: Host) -> None:
    """Nobody is connected any more, and what they held is stored."""
    await until(lambda: not host.notifyd._registry, "the end of all connections")
    await until(lambda: not host.notifyd._writes._under_way, "the storing of what they held")


# --- order ---


async def test_what_one_caller_sends_arrives_in_its_order(host: Host) -> None:
    websocket = await host.listen("websocket", "ada", "orders")
    stream = await host.listen("sse", "ada", "orders")
    for n in range(50):
        priority = ("Low", "Critical")[n % 2]
        await host.publish(user("ada"), payload=[n, "user"], priority=priority)
        await host.publish(channel("orders"), payload=[n, "channel"])
        await host.publish({"type": "broadcast"}, payload=[n, "broadcast"])
    expected = [[n, kind] for n in range(50) for kind in ("user", "channel", "broadcast")]
    for listener in (websocket, stream):
        messages = await listener.notifications(150)
        assert [message["payload"] for message in messages] == expected


async def test_what_was_queued_comes_in_order_before_anything_live(
    host: Host, transport: Transport
) -> None:
    ids = await publish_many(host, "ada", 20)
    listener = await host.listen(transport, "ada")
    await replayed_to(listener, ids)
    live = await host.publish(user("ada"))
    message = await listener.expect("notification")
    assert message["id"] == live["notification_id"]
    assert "replayed" not in message["metadata"]


async def test_channels_of_the_query_are_told_before_the_replay_is_over(host: Host) -> None:
    ids = await publish_many(host, "ada", 2)
    stream = await host.sse("ada", query="channels=orders")
    await replayed_to(stream, ids)
    assert (await stream.expect("subscribed"))["payload"] == ["orders"]


# --- holding until confirmed ---


async def test_what_was_not_acked_comes_again_and_what_was_does_not(host: Host) -> None:
    first = await host.websocket("ada", query="acks=1")
    ids = await publish_many(host, "ada", 3)
    await first.notifications(3)
    assert await first.ack(ids[1]) == {"type": "acked", "notification_id": ids[1]}
    await becomes(lambda: state_of(host, ids[1]), "ack")
    await first.close()
    await vanished(host)
    await becomes(lambda: state_of(host, ids[0]), "queued")
    second = await host.websocket("ada", query="acks=1")
    await replayed_to(second, [ids[0], ids[2]])
    answer = await second.ack(ids[2], ids[0])
    assert answer["type"] == "acked"
    assert answer["notification_ids"] == [ids[2], ids[0]]
    await second.close()
    await vanished(host)
    third = await host.websocket("ada")
    await third.nothing_came()


async def test_a_killed_socket_loses_nothing(host: Host) -> None:
    dead = await host.raw_websocket("ada")
    held = await publish_many(host, "ada", 5)
    dead.vanish()
    await vanished(host)
    queued = await publish_many(host, "ada", 2)
    listener = await host.websocket("ada")
    await replayed_to(listener, [*held, *queued])


async def test_a_pong_confirms_what_was_written_before_its_ping(start_on: StartServer) -> None:
    host = await start_on("sockets", websocket={"heartbeat_interval": 0.05, "idle_timeout": 600})
    websocket = await host.raw_websocket("ada")
    (first,) = await publish_many(host, "ada", 1)
    pings: list[bytes] = []
    while not any(pings):
        opcode, payload = await websocket.receive_frame()
        if opcode == 9:
            pings.append(payload)
    # A second one is written behind that Ping: its Pong does not speak for it.
    (second,) = await publish_many(host, "ada", 1)
    await becomes(lambda: state_of(host, first), "pending")
    websocket.send_frame(10, b"not the counter")
    websocket.send_frame(10, pings[-1])
    websocket.send("Ping")
    while (await websocket.receive())["type"] != "pong":
        pass
    await becomes(lambda: state_of(host, first), "transport")
    await becomes(lambda: state_of(host, second), "pending")
    websocket.vanish()
    await vanished(host)
    await replayed_to(await host.websocket("ada"), [second])


async def test_a_client_that_answers_pings_needs_no_acks(start_on: StartServer) -> None:
    host = await start_on("sockets", websocket={"heartbeat_interval": 0.05, "idle_timeout": 600})
    websocket = await host.websocket("ada")
    (id,) = await publish_many(host, "ada", 1)
    await websocket.notifications(1)
    confirmations = host.notifyd._confirmations
    await until(lambda: confirmations.held == 0, "the confirmation")
    await becomes(lambda: state_of(host, id), "transport")


async def test_a_client_that_acks_is_not_confirmed_by_its_pongs(start_on: StartServer) -> None:
    host = await start_on("sockets", websocket={"heartbeat_interval": 0.05, "idle_timeout": 600})
    asked = await host.websocket("ada", query="acks=1")
    (id,) = await publish_many(host, "ada", 1)
    await asked.notifications(1)
    beats = host.notifyd.metrics.loop_lag_seconds
    for _ in range(2):
        before = beats.count
        await until(lambda before=before: beats.count >= before + 2)  # type: ignore[misc]  # bound now
        await asked.nothing_came()
    await becomes(lambda: state_of(host, id), "pending")


async def test_a_connection_that_lives_on_confirms_where_nothing_answers_pings(
    start: StartServer,
) -> None:
    host = await start(websocket={"heartbeat_interval": 0.05, "idle_timeout": 60})
    silent: tuple[Transport, ...] = ("sse",) if host.lane == "sockets" else ("sse", "websocket")
    for transport in silent:
        listener = await host.listen(transport, "ada")
        (id,) = await publish_many(host, "ada", 1)
        state = partial(state_of, host, id)
        await listener.notifications(1)
        await becomes(state, "pending")
        host.clock.advance(61)
        await until(lambda: host.notifyd._confirmations.held == 0, "the confirmation")
        await becomes(state, "transport")
        await listener.close()
        await vanished(host)


async def test_one_device_confirms_for_all(host: Host, transport: Transport) -> None:
    phone = await host.websocket("ada", query="acks=1")
    laptop = (
        await host.websocket("ada", query="acks=1")
        if transport == "websocket"
        else await host.sse("ada", query="acks=1")
    )
    (id,) = await publish_many(host, "ada", 1)
    for device in (phone, laptop):
        assert (await device.expect("notification"))["id"] == id
    assert (await phone.ack(id))["type"] == "acked"
    await phone.close()
    await laptop.close()
    await vanished(host)
    later = await host.websocket("ada")
    await later.nothing_came()


async def test_a_half_open_socket_withholds_nothing(host: Host) -> None:
    half_open = await host.raw_websocket("ada", query="acks=1")
    ids = await publish_many(host, "ada", 3)
    device = await host.websocket("ada", query="acks=1")
    await replayed_to(device, ids)
    assert (await device.ack(*ids))["type"] == "acked"
    half_open.vanish()
    await until(lambda: len(host.notifyd._registry) == 1, "the end of the half-open one")
    await device.nothing_came()
    await device.close()
    await vanished(host)
    later = await host.websocket("ada")
    await later.nothing_came()


async def test_a_half_open_socket_passes_on_nothing_that_is_over(host: Host) -> None:
    half_open = await host.raw_websocket("ada", query="acks=1")
    await host.publish(user("ada"), payload="now or never", ttl=0)
    await host.publish(user("ada"), payload="five seconds", ttl=5)
    lasting = await host.publish(user("ada"), payload="lasting")
    host.clock.advance(10)
    device = await host.websocket("ada", query="acks=1")
    await replayed_to(device, [lasting["notification_id"]])
    half_open.vanish()


async def test_what_both_devices_held_is_queued_once(host: Host) -> None:
    first = await host.raw_websocket("ada", query="acks=1")
    second = await host.raw_websocket("ada", query="acks=1")
    ids = await publish_many(host, "ada", 2)
    first.vanish()
    second.vanish()
    await vanished(host)
    await replayed_to(await host.websocket("ada"), ids)


async def test_what_returns_goes_to_a_device_that_is_there(host: Host) -> None:
    """The one that is there was not yet admitted by the audience; the one that got it died."""
    dead = await host.raw_websocket(jwt=token("ada", roles=["admin"]), query="acks=1")
    other = await host.websocket(jwt=token("ada"), query="acks=1")
    audience = {"type": "Roles", "value": ["admin"]}
    sent = await host.publish(user("ada"), audience=audience)
    assert sent["delivered_to"] == 1
    await other.send("Auth", {"token": token("ada", roles=["admin"])})
    await other.expect("refreshed")
    dead.vanish()
    message = await other.expect("notification")
    assert message["id"] == sent["notification_id"]
    assert message["metadata"]["replayed"] is True


async def test_what_returns_does_not_go_to_its_own_sender(host: Host) -> None:
    sender = await host.websocket("ada", query="acks=1")
    dead = await host.raw_websocket("ada", query="acks=1")
    sent = await host.publish(user("ada"), exclude_connection=sender.connected["connection_id"])
    assert sent["delivered_to"] == 1
    dead.vanish()
    await becomes(lambda: queued(host), 1)
    await sender.nothing_came()
    await replayed_to(await host.websocket("ada", query="acks=1"), [sent["notification_id"]])


async def test_beyond_max_pending_the_oldest_held_move_to_the_queue(start: StartServer) -> None:
    host = await start(ack={"max_pending": 2})
    websocket = await host.websocket("ada", query="acks=1")
    ids = await publish_many(host, "ada", 5)
    assert ids_of(await websocket.notifications(5)) == ids
    await becomes(lambda: queued(host), 3)
    await websocket.close()
    await vanished(host)
    await replayed_to(await host.websocket("ada"), ids)


async def test_what_moved_to_the_queue_is_confirmed_by_a_pong_too(start_on: StartServer) -> None:
    host = await start_on("sockets", ack={"max_pending": 1})
    websocket = await host.raw_websocket("ada")
    await publish_many(host, "ada", 4)
    await becomes(lambda: queued(host), 3)
    opcode = 0
    while opcode != 9:
        opcode, payload = await websocket.receive_frame()
    websocket.send_frame(10, payload)
    await becomes(lambda: queued(host), 0)
    assert host.notifyd._confirmations.held == 0


async def test_what_moved_to_the_queue_is_confirmed_by_the_life_of_a_stream(
    start: StartServer,
) -> None:
    host = await start(
        ack={"max_pending": 1}, websocket={"heartbeat_interval": 0.05, "idle_timeout": 60}
    )
    stream = await host.sse("ada")
    await publish_many(host, "ada", 4)
    await stream.notifications(4)
    await becomes(lambda: queued(host), 3)
    host.clock.advance(61)
    await becomes(lambda: queued(host), 0)


async def test_what_comes_back_is_in_order_with_what_another_device_holds(host: Host) -> None:
    first = await host.websocket("ada", query="acks=1")
    second = await host.raw_websocket("ada", query="acks=1")
    earlier = await host.publish(user("ada"))
    assert (await first.expect("notification"))["id"] == earlier["notification_id"]
    host.clock.advance(1)
    later = await host.publish(user("ada"), exclude_connection=first.connected["connection_id"])
    assert (earlier["delivered_to"], later["delivered_to"]) == (2, 1)
    ids = [earlier["notification_id"], later["notification_id"]]
    second.vanish()
    await becomes(lambda: queued(host), 2)
    await first.nothing_came()
    await replayed_to(await host.websocket("ada", query="acks=1"), ids)


async def test_what_comes_back_is_in_order_with_what_came_between_to_another_device(
    host: Host,
) -> None:
    dying = await host.raw_websocket("ada", query="acks=1", greeted=False)
    its_id = (await dying.receive())["connection_id"]
    other = await host.websocket("ada", query="acks=1")
    others_id = other.connected["connection_id"]
    ids = []
    for left_out in (others_id, its_id, others_id):
        host.clock.advance(1)
        sent = await host.publish(user("ada"), exclude_connection=left_out)
        ids.append(sent["notification_id"])
    dying.vanish()
    await becomes(lambda: queued(host), 3)
    await replayed_to(await host.websocket("ada", query="acks=1"), ids)


async def test_what_is_queued_stays_until_it_is_confirmed(host: Host) -> None:
    ids = await publish_many(host, "ada", 2)
    for _ in range(2):
        unlucky = await host.raw_websocket("ada", query="acks=1", greeted=False)
        await unlucky.receive()
        assert (await unlucky.receive())["id"] == ids[0]
        unlucky.vanish()
        await vanished(host)
    await becomes(lambda: queued(host), 2)
    websocket = await host.websocket("ada", query="acks=1")
    await replayed_to(websocket, ids)
    await websocket.ack(*ids)
    await becomes(lambda: queued(host), 0)


# --- what is not kept ---


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_a_full_queue_gives_up_the_lowest_priority_and_tells(
    start: StartServer, transport: Transport, mode: str
) -> None:
    host = await start(queue={"max_size_per_user": 3, "mode": mode})
    answers = [
        await host.publish(user("ada"), priority=priority)
        for priority in ("Normal", "Low", "Critical", "High", "Low")
    ]
    assert [answer["outcome"] for answer in answers] == ["queued"] * 4 + ["failed"]
    assert answers[4]["reason"] == "queue_full"
    assert (answers[4]["success"], answers[4]["failed"], answers[4]["queued"]) == (False, 1, 0)
    listener = await host.listen(transport, "ada")
    gap = await listener.expect("gap")
    # The store gives the offsets.
    assert gap.pop("from") == gap.pop("to") >= 2
    assert gap == {"type": "gap", "stream": "user:ada", "reason": "queue_overflow"}
    kept = [answers[n]["notification_id"] for n in (0, 2, 3)]
    await replayed_to(listener, kept)
    assert await host.metric("queue_dropped_total") == 1
    assert await host.metric("delivery_failures_total", reason="queue_full") == 1


async def test_what_comes_back_to_a_full_queue_and_is_refused_is_told(
    start: StartServer, transport: Transport
) -> None:
    host = await start(queue={"max_size_per_user": 1}, ack={"max_pending": 1})
    unlucky = await host.raw_websocket("ada", query="acks=1")
    high = await host.publish(user("ada"), priority="High")
    low = await host.publish(user("ada"), priority="Low")
    assert [each["outcome"] for each in (high, low)] == ["delivered"] * 2
    await becomes(lambda: queued(host), 1)
    unlucky.vanish()
    await becomes(lambda: host.metric("queue_dropped_total"), 1.0)
    listener = await host.listen(transport, "ada")
    gap = await listener.expect("gap")
    assert gap.pop("from") == gap.pop("to") >= 2
    assert gap == {"type": "gap", "stream": "user:ada", "reason": "queue_overflow"}
    await replayed_to(listener, [high["notification_id"]])


@MOVABLE_CLOCK
async def test_what_outlived_its_ttl_is_not_replayed(start: StartServer) -> None:
    host = await start(queue={"cleanup_interval_seconds": 0.05})
    await host.publish(user("ada"), ttl=60, payload="short")
    await host.publish(user("ada"), ttl=6000, payload="long")
    host.clock.advance(61)
    await until(lambda: host.notifyd.metrics.queue_expired_total.value == 1, "the cleaning")
    websocket = await host.websocket("ada")
    assert [each["payload"] for each in await websocket.notifications(1)] == ["long"]
    await websocket.expect("caught_up")


async def test_a_held_one_that_outlived_its_ttl_does_not_return(host: Host) -> None:
    websocket = await host.websocket("ada", query="acks=1")
    await host.publish(user("ada"), ttl=60)
    await websocket.notifications(1)
    host.clock.advance(61)
    await websocket.close()
    await vanished(host)
    await (await host.websocket("ada")).nothing_came()
    assert await host.metric("queue_expired_total") == 1
    assert await host.metric("queue_dropped_total") == 0


async def test_a_ttl_of_nothing_is_only_for_who_is_there(host: Host) -> None:
    answer = await host.publish(user("ada"), ttl=0)
    assert (answer["outcome"], answer["success"]) == ("nobody", False)
    websocket = await host.websocket("ada")
    await websocket.nothing_came()
    assert (await host.publish(user("ada"), ttl=0))["outcome"] == "delivered"
    assert (await websocket.expect("notification"))["metadata"]["ttl"] == 0
    await websocket.close()
    await vanished(host)
    await (await host.websocket("ada")).nothing_came()


async def test_a_ttl_of_nothing_is_not_for_who_comes_later(host: Host) -> None:
    first = await host.websocket("ada", query="acks=1")
    assert (await host.publish(user("ada"), ttl=0))["outcome"] == "delivered"
    id = (await first.expect("notification"))["id"]
    # It is over at once by any clock but one that was set back.
    host.clock.advance(-5)
    await (await host.websocket("ada")).nothing_came()
    assert (await first.ack(id))["type"] == "acked"


async def test_without_a_queue_nobody_is_nobody(start: StartServer) -> None:
    host = await start(queue={"enabled": False})
    answer = await host.publish(user("ada"))
    assert answer["outcome"] == "nobody"
    assert "queue.enabled" in answer["hint"]
    websocket = await host.websocket("ada")
    await websocket.nothing_came()


# --- acks ---


async def test_an_ack_twice_is_acked_twice(host: Host) -> None:
    websocket = await host.websocket("ada")
    (id,) = await publish_many(host, "ada", 1)
    await websocket.notifications(1)
    for _ in range(2):
        assert await websocket.ack(id) == {"type": "acked", "notification_id": id}
    assert (await host.get("/api/v1/stats/acks")).json()["total_acked"] == 1


async def test_an_ack_of_what_is_not_ones_own_is_refused(host: Host) -> None:
    ada = await host.websocket("ada")
    bob = await host.websocket("bob")
    (id,) = await publish_many(host, "ada", 1)
    await ada.notifications(1)
    assert (await bob.ack(id))["code"] == "INVALID_ACK"
    unknown = str(uuid.uuid4())
    assert (await ada.ack(unknown))["code"] == "INVALID_ACK"
    answer = await ada.ack(unknown, id.upper(), "nonsense")
    assert answer["notification_ids"] == [id]
    assert answer["refused"] == [unknown, "nonsense"]
    await ada.send("Ack", {"notification_ids": [str(uuid.uuid4()) for _ in range(101)]})
    assert (await ada.expect("error"))["code"] == "INVALID_ACK"


async def test_a_stream_acks_by_http(host: Host) -> None:
    stream = await host.sse("ada", query="acks=1")
    ids = await publish_many(host, "ada", 3)
    await stream.notifications(3)
    ada = {"Authorization": f"Bearer {token('ada')}"}
    response = await host.post("/api/v1/acks", {"notification_id": ids[0]}, key=None, headers=ada)
    assert response.json() == {"acked": [ids[0]], "refused": []}
    unknown = str(uuid.uuid4())
    several = {"notification_ids": [ids[1], unknown]}
    response = await host.post("/api/v1/acks", several, key=None, headers=ada)
    assert response.json() == {"acked": [ids[1]], "refused": [unknown]}
    bob = {"Authorization": f"Bearer {token('bob')}"}
    response = await host.post("/api/v1/acks", {"notification_id": ids[2]}, key=None, headers=bob)
    assert response.json() == {"acked": [], "refused": [ids[2]]}
    for nobody in ({}, {"Authorization": "Bearer nonsense"}):
        response = await host.post("/api/v1/acks", several, key=None, headers=nobody)
        assert response.status_code == 401
    await stream.close()
    await vanished(host)
    await replayed_to(await host.websocket("ada"), [ids[2]])


async def test_an_ack_without_a_connection_settles_what_is_queued(host: Host) -> None:
    ids = await publish_many(host, "ada", 2)
    ada = {"Authorization": f"Bearer {token('ada')}"}
    response = await host.post("/api/v1/acks", {"notification_id": ids[0]}, key=None, headers=ada)
    assert response.json() == {"acked": [ids[0]], "refused": []}
    await replayed_to(await host.websocket("ada"), [ids[1]])


async def test_who_was_expected_to_ack_and_who_has(host: Host) -> None:
    ada = await host.websocket("ada", query="acks=1")
    await host.websocket("bob", query="acks=1")
    sent = await host.publish({"type": "users", "value": ["ada", "bob", "cleo"]})
    id = sent["notification_id"]
    await ada.expect("notification")
    await ada.ack(id)
    await becomes(lambda: state_of(host, id, "cleo"), "queued")
    report = (await host.get(f"/api/v1/notifications/{id}/acks")).json()
    assert (report["notification_id"], report["expected"], report["confirmed"]) == (id, 3, 1)
    recipients = {each.pop("user_id"): each for each in report["recipients"]}
    assert recipients["ada"].pop("confirmed_at").endswith("Z")
    assert recipients == {
        "ada": {"state": "confirmed", "by": "ack"},
        "bob": {"state": "pending"},
        "cleo": {"state": "queued"},
    }
    unknown = await host.get(f"/api/v1/notifications/{uuid.uuid4()}/acks")
    assert unknown.status_code == 404


async def test_acks_of_a_channel_are_counted_and_no_more(host: Host) -> None:
    ada = await host.websocket("ada")
    await ada.subscribe("orders")
    id = (await host.publish(channel("orders")))["notification_id"]
    await ada.notifications(1)
    assert (await ada.ack(id))["type"] == "acked"
    report = (await host.get(f"/api/v1/notifications/{id}/acks")).json()
    assert (report["expected"], report["recipients"], report["acks"]) == (0, [], 1)
    await ada.close()
    await vanished(host)
    await (await host.websocket("ada")).nothing_came()


async def test_a_channel_that_requires_acks_expects_each_recipient(host: Host) -> None:
    ada = await host.websocket("ada")
    await ada.subscribe("orders")
    bob = await host.websocket("bob")
    await bob.subscribe("orders")
    eve = await host.websocket("eve")
    id = (await host.publish(channel("orders"), require_ack=True))["notification_id"]
    await ada.notifications(1)
    await ada.ack(id)
    assert (await eve.ack(id))["code"] == "INVALID_ACK"
    report = (await host.get(f"/api/v1/notifications/{id}/acks")).json()
    assert (report["expected"], report["confirmed"]) == (2, 1)


@MOVABLE_CLOCK
async def test_an_ack_that_comes_late_is_counted_as_expired_and_still_settles(
    start: StartServer,
) -> None:
    host = await start(ack={"timeout_seconds": 30, "cleanup_interval_seconds": 0.05})
    websocket = await host.websocket("ada", query="acks=1")
    (id,) = await publish_many(host, "ada", 1)
    await websocket.notifications(1)
    await becomes(lambda: state_of(host, id), "pending")
    stats = (await host.get("/api/v1/stats/acks")).json()
    assert (stats["total_tracked"], stats["pending_count"], stats["total_acked"]) == (1, 1, 0)
    host.clock.advance(31)
    await until(lambda: host.notifyd.metrics.ack_expired_total.value == 1, "the expiry")
    await becomes(lambda: state_of(host, id), "expired")
    assert (await websocket.ack(id))["type"] == "acked"
    await becomes(lambda: state_of(host, id), "ack")
    await websocket.close()
    await vanished(host)
    await (await host.websocket("ada")).nothing_came()
    stats = (await host.get("/api/v1/stats/acks")).json()
    assert stats["enabled"] is True
    assert (stats["total_acked"], stats["pending_count"], stats["total_expired"]) == (1, 0, 1)
    assert stats["avg_latency_ms"] >= 31_000


async def test_without_a_ledger_what_is_held_is_still_acked(start: StartServer) -> None:
    host = await start(ack={"enabled": False})
    websocket = await host.websocket("ada", query="acks=1")
    ids = await publish_many(host, "ada", 2)
    await websocket.notifications(2)
    assert (await websocket.ack(ids[0]))["type"] == "acked"
    assert (await host.get(f"/api/v1/notifications/{ids[0]}/acks")).status_code == 404
    assert (await host.get("/api/v1/stats/acks")).json()["enabled"] is False
    await websocket.close()
    await vanished(host)
    await replayed_to(await host.websocket("ada"), [ids[1]])
