"""Whoever is meant gets it once, wherever he is connected and whichever node was told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cluster.conftest import StartNodes
from tests.front_door import Host, Transport, channel, token, until, user


@pytest.mark.parametrize("sender", [0, 1, 2])
async def test_every_target_from_any_node_reaches_every_connection_once(
    nodes: list[Host], transport: Transport, sender: int
) -> None:
    anna = [await host.listen(transport, "anna", "news", "sport") for host in nodes]
    ben = await nodes[1].listen(transport, "ben", "news")
    publish = nodes[sender].publish

    answer = await publish(user("anna"), payload=1)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 3)
    answer = await publish({"type": "users", "value": ["anna", "ben"]}, payload=2)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 4)
    answer = await publish(channel("news"), payload=3)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 4)
    answer = await publish({"type": "channels", "value": ["news", "sport"]}, payload=4)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 4)
    answer = await publish({"type": "broadcast"}, payload=5)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 4)

    for connection in anna:
        got = await connection.notifications(5)
        assert [each["payload"] for each in got] == [1, 2, 3, 4, 5]
        assert not any("replayed" in each["metadata"] for each in got)
    assert [each["payload"] for each in await ben.notifications(4)] == [2, 3, 4, 5]


async def test_answers_of_the_api_count_what_is_elsewhere(nodes: list[Host]) -> None:
    for host in nodes:
        await host.websocket("anna")
    await nodes[2].listen("websocket", "ben", "news")
    answer = await nodes[0].post(
        "/api/v1/notifications/send-to-users",
        {"target_user_ids": ["anna", "ben", "carl"], "event_type": "e", "payload": {}},
    )
    body = answer.json()
    assert body["results"] == {
        "anna": {"outcome": "delivered", "connections": 3},
        "ben": {"outcome": "delivered", "connections": 1},
        "carl": {"outcome": "queued"},
    }
    assert (body["delivered_to"], body["queued"], body["routed"]) == (4, 1, 0)
    answer = await nodes[0].post(
        "/api/v1/notifications/channels",
        {"channels": ["news", "none"], "event_type": "e", "payload": {}},
    )
    assert answer.json()["channels"] == {"news": {"delivered_to": 1}, "none": {"delivered_to": 0}}


async def test_the_audience_holds_on_the_other_node(nodes: list[Host]) -> None:
    admin = await nodes[1].websocket(jwt=token("anna", roles=["admin"]))
    plain = await nodes[2].websocket(jwt=token("ben"))
    roles = {"type": "Roles", "value": ["admin"]}
    answer = await nodes[0].publish({"type": "broadcast"}, audience=roles)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    answer = await nodes[0].publish(user("ben"), audience=roles)
    assert answer["outcome"] == "filtered"
    await admin.expect("notification")
    await plain.nothing_came()


async def test_the_sender_s_own_connection_is_left_out_on_the_other_node(
    nodes: list[Host],
) -> None:
    own = await nodes[1].websocket("anna")
    exclude = own.connected["connection_id"]
    answer = await nodes[0].publish(user("anna"), exclude_connection=exclude)
    assert answer["outcome"] == "filtered"
    other = await nodes[2].websocket("anna")
    answer = await nodes[0].publish(user("anna"), exclude_connection=exclude)
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    await other.expect("notification")
    await own.nothing_came()


async def test_a_user_who_is_found_nowhere_is_queued_for_and_replayed_to_anywhere(
    nodes: list[Host],
) -> None:
    assert (await nodes[0].publish(user("anna")))["outcome"] == "queued"
    anna = await nodes[2].websocket("anna")
    assert (await anna.expect("notification"))["metadata"]["replayed"]
    await anna.expect("caught_up")


async def test_what_is_sent_to_one_stream_arrives_in_order_on_every_node(
    nodes: list[Host],
) -> None:
    listeners = [await host.listen("websocket", "anna", "news") for host in nodes]
    items: list[dict[str, Any]] = []
    for number in range(90):
        target = (user("anna"), {"type": "users", "value": ["anna", "x", "y"]}, channel("news"))
        items.append({"target": target[number % 3], "event_type": "e", "payload": number})
    answer = await nodes[0].post("/api/v1/notifications/batch", {"notifications": items})
    assert answer.json()["summary"]["succeeded"] == 90
    for listener in listeners:
        got = [each["payload"] for each in await listener.notifications(90)]
        own = [number for number in got if number % 3 != 2]
        assert own == sorted(own)
        news = [number for number in got if number % 3 == 2]
        assert news == sorted(news)
        assert len(set(got)) == 90


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_an_ack_on_one_node_settles_on_the_others(start_nodes: StartNodes, mode: str) -> None:
    nodes = await start_nodes(2, queue={"mode": mode})
    here = await nodes[0].websocket("anna", query="acks=1")
    there = await nodes[1].websocket("anna", query="acks=1")
    for host in nodes:
        # While a replay is on, what is stored first comes from the log.
        (connection,) = host.notifyd.lifecycle.registry.tenant("default").of_user("anna")
        await until(lambda connection=connection: not connection.outbox.holds_back)  # type: ignore[misc]  # bound now
    answer = await nodes[0].publish(user("anna"))
    assert answer["delivered_to"] == 2
    await here.expect("notification")
    await there.expect("notification")
    assert (await here.ack(answer["notification_id"]))["type"] == "acked"
    connections = nodes[1].notifyd.lifecycle.registry.tenant("default").of_user("anna")
    await until(lambda: connections[0].unconfirmed is None)
    await there.close()
    await here.close()
    later = await nodes[1].websocket("anna")
    await later.nothing_came()


async def test_an_ack_over_http_settles_what_another_node_holds(nodes: list[Host]) -> None:
    anna = await nodes[1].listen("sse", "anna")
    answer = await nodes[0].publish(user("anna"), payload=1)
    await anna.expect("notification")
    acked = await nodes[2].post(
        "/api/v1/acks",
        {"notification_id": answer["notification_id"]},
        key=None,
        headers={"Authorization": f"Bearer {token('anna')}"},
    )
    assert acked.json() == {"acked": [answer["notification_id"]], "refused": []}
    await anna.close()
    later = await nodes[0].websocket("anna")
    await later.nothing_came()


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_what_a_device_did_not_confirm_comes_to_the_other_one_marked(
    start_nodes: StartNodes, mode: str
) -> None:
    nodes = await start_nodes(2, queue={"mode": mode})
    first = await nodes[0].websocket("anna", query="acks=1")
    sent = await nodes[1].publish(user("anna"), payload=1)
    await first.expect("notification")
    second = await nodes[1].websocket("anna", query="acks=1")
    if mode == "offline":
        await second.nothing_came()
        await first.close()
    got = await second.expect("notification")
    assert (got["id"], got["metadata"]["replayed"]) == (sent["notification_id"], True)


async def test_a_handed_back_one_comes_not_twice_to_who_has_it(nodes: list[Host]) -> None:
    first = await nodes[0].websocket("anna", query="acks=1")
    second = await nodes[1].websocket("anna", query="acks=1")
    sent = await nodes[2].publish(user("anna"))
    await first.expect("notification")
    await second.expect("notification")
    await first.close()
    held = nodes[1].notifyd.lifecycle.registry.tenant("default").of_user("anna")[0].unconfirmed
    assert held is not None
    await until(lambda: held[sent["notification_id"]].in_log, "the hand-back")
    await second.nothing_came()
    await second.ack(sent["notification_id"])
    await second.close()
    third = await nodes[2].websocket("anna")
    await third.nothing_came()


async def test_connecting_and_enqueuing_race_and_nothing_is_lost(nodes: list[Host]) -> None:
    async def connect_and_read(number: int) -> None:
        listener = await nodes[number % 3].websocket(f"u{number}")
        message = await listener.expect("notification")
        assert message["payload"] == number

    for start in range(0, 60, 20):
        numbers = range(start, start + 20)
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(connect_and_read(number))
                group.create_task(
                    nodes[(number + 1) % 3].publish(user(f"u{number}"), payload=number)
                )
