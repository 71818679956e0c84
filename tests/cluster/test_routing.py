"""Whoever is meant gets it once, wherever he is connected and whichever node was told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from notifyd.connections.outbox import LINGER_FOR
from notifyd.eventually import settled
from notifyd.queue.redis_keys import member
from tests.cluster.conftest import StartNodes, cluster_of
from tests.front_door import WAIT, Host, Message, Transport, channel, token, until, user


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


async def test_many_at_once_reach_many_once_and_in_order_whichever_node_was_told(
    start_nodes: StartNodes,
) -> None:
    nodes = await start_nodes(2)
    # So many that a node waits for what the other has for them.
    listeners = [await nodes[0].listen("websocket", f"u{n}", "news") for n in range(LINGER_FOR)]

    def items(sender: int) -> dict[str, Any]:
        marks = [{"by": sender, "number": number} for number in range(50)]
        sends = [{"target": channel("news"), "event_type": "e", "payload": each} for each in marks]
        return {"notifications": sends}

    calls = [
        nodes[number % 2].post("/api/v1/notifications/batch", items(number)) for number in range(4)
    ]
    for answer in await asyncio.gather(*calls):
        assert answer.json()["summary"]["succeeded"] == 50
    for listener in listeners:
        got = [each["payload"] for each in await listener.notifications(200)]
        for sender in range(4):
            assert [each["number"] for each in got if each["by"] == sender] == list(range(50))


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


async def test_what_a_device_holds_no_longer_comes_to_the_one_on_another_node(
    start_nodes: StartNodes,
) -> None:
    """Beyond `ack.max_pending` it is in the log alone, so that no end of the first would tell."""
    nodes = await start_nodes(2, ack={"max_pending": 1})
    first = await nodes[0].websocket("anna", query="acks=1")
    ids = [(await nodes[0].publish(user("anna")))["notification_id"]]
    second = await nodes[1].websocket("anna", query="acks=1")
    replaying = nodes[1].notifyd._replayer._again
    await until(lambda: bool(nodes[1].notifyd._registry) and not replaying, "the end of the replay")
    ids.append((await nodes[0].publish(user("anna")))["notification_id"])
    assert [each["id"] for each in await first.notifications(2)] == ids
    got = await second.notifications(2)
    assert {each["id"]: each["metadata"].get("replayed", False) for each in got} == {
        ids[0]: True,
        ids[1]: False,
    }


async def test_what_is_stored_though_a_device_here_has_it_is_settled_with_its_ack(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node was sent it, and never said that it has it."""
    monkeypatch.setattr("notifyd.cluster.bus.AFTER_SECONDS", 0.1)
    nodes = await start_nodes(2)
    here = await nodes[0].websocket("anna", query="acks=1")
    await nodes[1].websocket("anna", query="acks=1")
    with monkeypatch.context() as lost:
        lost.setattr(
            cluster_of(nodes[1]).receiver, "take_for_users", lambda *a, **how: [("nobody", 0)]
        )
        lost.setattr(cluster_of(nodes[1]).bus, "to_node", lambda node, body: None)
        id = (await nodes[0].publish(user("anna")))["notification_id"]
        await here.expect("notification")
        # No page brings it here before the ack.
        lost.setattr(nodes[0].notifyd, "_returned", lambda *a, **how: None)
        logs = nodes[0].notifyd._logs
        assert logs is not None

        async def stored() -> bool:
            depth: int = (await nodes[0].get("/stats")).json()["queue"]["total_messages"]
            return depth == 1

        while not await stored():
            pass
        assert (await here.ack(id))["type"] == "acked"
    assert (await nodes[0].get("/stats")).json()["queue"]["total_messages"] == 0


async def test_what_one_node_replays_and_another_is_told_the_ack_of_is_confirmed(
    nodes: list[Host],
) -> None:
    """The node that replays notes later that it did, where the ledger had forgotten of it."""
    id = (await nodes[2].publish(user("anna")))["notification_id"]
    keys = nodes[0].notifyd._backends.redis_keys.ledger
    await cluster_of(nodes[0])._redis.command("DEL", keys.record + member("default", id))
    anna = await nodes[0].websocket("anna", query="acks=1")
    await anna.expect("notification")
    header = {"Authorization": f"Bearer {token('anna')}"}
    body = {"notification_ids": [id]}
    answer = await nodes[1].post("/api/v1/acks", body, key=None, headers=header)
    assert answer.json() == {"acked": [id], "refused": []}
    report = (await nodes[2].get(f"/api/v1/notifications/{id}/acks")).json()
    assert [(each["user_id"], each["state"]) for each in report["recipients"]] == [
        ("anna", "confirmed")
    ]


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


async def test_what_nodes_say_to_each_other_is_of_the_tenant_that_it_is_of(
    start_nodes: StartNodes,
) -> None:
    nodes = await start_nodes(2, tenant={"enabled": True})
    of_acme = {"X-Tenant-ID": "acme"}
    jwt = token("anna", tenant_id="acme")
    here = await nodes[0].websocket(jwt=jwt, query="acks=1")
    there = await nodes[1].websocket(jwt=jwt, query="acks=1")
    strangers = [
        await nodes[1].websocket(jwt=token("anna", tenant_id=name))
        for name in ("default", "globex")
    ]
    for connection in (here, there, *strangers):
        await connection.subscribe("news")

    async def publish(target: dict[str, Any]) -> Message:
        body = {"target": target, "event_type": "e", "payload": 1}
        answer = await nodes[0].post("/api/v1/notifications", body, headers=of_acme)
        message: Message = answer.json()
        assert (message["outcome"], message["delivered_to"]) == ("delivered", 2)
        await here.expect("notification")
        await there.expect("notification")
        return message

    await publish(channel("news"))
    sent = await publish(user("anna"))
    assert (await here.ack(sent["notification_id"]))["type"] == "acked"
    (held,) = nodes[1].notifyd.lifecycle.registry.tenant("acme").of_user("anna")
    await until(lambda: held.unconfirmed is None, "the settlement")

    # What a device did not confirm goes to those elsewhere that came later.
    await there.close()
    answer = await nodes[0].post(
        "/api/v1/notifications",
        {"target": user("anna"), "event_type": "e", "payload": 2},
        headers=of_acme,
    )
    assert answer.json()["delivered_to"] == 1
    await here.expect("notification")
    later = await nodes[1].websocket(jwt=jwt)
    await later.nothing_came()
    await here.close()
    got = await later.expect("notification")
    assert got["id"] == answer.json()["notification_id"]

    for stranger in strangers:
        await stranger.nothing_came()
    # The other node is told of it in the order in which it was said.
    path = "/api/v1/users/anna/disconnect"
    answer = await nodes[0].post(path, {"revoke": True}, headers=of_acme)
    assert answer.json()["disconnected"] == 1
    with pytest.raises(InvalidStatus) as refused:
        await nodes[1].websocket(jwt=jwt)
    assert refused.value.response.status_code == 401
    await nodes[1].websocket(jwt=token("anna", tenant_id="globex"))


async def test_a_log_is_read_when_others_can_find_its_user(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await start_nodes(2)
    cluster = cluster_of(nodes[1])
    redis, presence = cluster._redis, cluster.presence
    run = redis.run
    known = asyncio.Event()

    def run_late(script: Any, *given: Any) -> Any:
        async def late() -> Any:
            await known.wait()
            return await run(script, *given)

        return asyncio.ensure_future(late()) if script is presence._write else run(script, *given)

    monkeypatch.setattr(redis, "run", run_late)
    monkeypatch.setattr("notifyd.connections.replay.STORE_SECONDS", WAIT)
    anna = await nodes[1].websocket("anna")
    sent = await nodes[0].publish(user("anna"))
    assert sent["outcome"] == "queued"
    known.set()
    assert (await anna.expect("notification"))["id"] == sent["notification_id"]


async def test_who_came_while_something_was_queued_for_him_is_replayed_to(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await start_nodes(2)
    logs = nodes[0].notifyd._logs
    assert logs is not None
    enqueue = logs.enqueue
    asked, came = asyncio.Event(), asyncio.Event()

    async def enqueue_later(*given: Any) -> Any:
        asked.set()
        await came.wait()
        return await settled(enqueue(*given))

    monkeypatch.setattr(logs, "enqueue", enqueue_later)
    sending = asyncio.ensure_future(nodes[0].publish(user("anna")))
    await asked.wait()
    anna = await nodes[1].websocket("anna")
    (connection,) = nodes[1].notifyd.lifecycle.registry.tenant("default").of_user("anna")
    await until(lambda: not connection.outbox.holds_back, "the end of her replay")
    came.set()
    sent = await sending
    assert sent["outcome"] == "queued"
    assert (await anna.expect("notification"))["id"] == sent["notification_id"]


async def test_nodes_that_queue_in_postgres_are_one_server(
    start_nodes: StartNodes, postgres_url: str
) -> None:
    nodes = await start_nodes(
        2,
        queue={"backend": "postgres"},
        ack={"backend": "postgres"},
        postgres={"url": postgres_url},
    )
    queued = await nodes[0].publish(user("anna"))
    assert queued["outcome"] == "queued"
    first = await nodes[1].websocket("anna", query="acks=1")
    assert (await first.expect("notification"))["id"] == queued["notification_id"]
    await first.expect("caught_up")
    assert (await first.ack(queued["notification_id"]))["type"] == "acked"
    sent = await nodes[0].publish(user("anna"))
    assert (sent["outcome"], sent["delivered_to"]) == ("delivered", 1)
    await first.expect("notification")
    second = await nodes[0].websocket("anna", query="acks=1")
    await second.nothing_came()
    await first.close()
    got = await second.expect("notification")
    assert (got["id"], got["metadata"]["replayed"]) == (sent["notification_id"], True)
    assert (await second.ack(sent["notification_id"]))["type"] == "acked"
    acks = await nodes[1].get(f"/api/v1/notifications/{sent['notification_id']}/acks")
    assert acks.json()["confirmed"] == 1
    await second.close()
    later = await nodes[1].websocket("anna")
    await later.nothing_came()


@pytest.mark.parametrize("target", [user("anna"), {"type": "users", "value": ["anna", "ben"]}])
async def test_what_a_device_on_one_node_confirmed_is_settled_on_another_whoever_sent_it(
    nodes: list[Host], target: dict[str, Any]
) -> None:
    first = await nodes[1].websocket("anna", query="acks=1")
    second = await nodes[2].websocket("anna", query="acks=1")
    answer = await nodes[0].publish(target)
    assert answer["delivered_to"] == 2
    await second.expect("notification")
    await first.expect("notification")
    assert (await first.ack(answer["notification_id"]))["type"] == "acked"
    await until(lambda: not nodes[2].notifyd._confirmations.held, "word of it")
    await first.close()
    await second.close()
    again = await nodes[0].websocket("anna")
    await again.nothing_came()


async def test_an_ack_of_what_only_another_node_knows_is_answered_when_that_node_has_said_so(
    start_nodes: StartNodes,
) -> None:
    """No ledger would say so instead."""
    nodes = await start_nodes(2, ack={"enabled": False})
    anna = await nodes[1].websocket("anna", query="acks=1")
    id = (await nodes[1].publish(user("anna")))["notification_id"]
    await anna.expect("notification")
    header = {"Authorization": f"Bearer {token('anna')}"}
    body = {"notification_ids": [id]}
    answer = await nodes[0].post("/api/v1/acks", body, key=None, headers=header)
    assert answer.json() == {"acked": [id], "refused": []}
