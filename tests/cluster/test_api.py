"""The HTTP API answers for the whole cluster, and reaches users wherever they are."""

from __future__ import annotations

import pytest

from notifyd.errors import Unauthorized
from tests.cluster.conftest import StartNodes, cluster_of
from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, Host, channel, token, until, user


async def test_figures_are_those_of_all_nodes(nodes: list[Host]) -> None:
    await nodes[0].listen("websocket", "anna", "news", "sport")
    await nodes[1].listen("sse", "anna", "news")
    await nodes[2].listen("websocket", "ben", "news")
    await nodes[0].publish(channel("news"))
    for host in nodes:
        stats = (await host.get("/stats")).json()
        connections = stats["connections"]
        assert connections["channels"] == {"news": 3, "sport": 1}
        assert (connections["total_connections"], connections["unique_users"]) == (3, 2)
        assert (connections["websocket"], connections["sse"]) == (2, 1)
        assert stats["users"]["connected"] == 2
        assert stats["channels"] == {"active": 2, "subscriptions": 4}
        assert stats["notifications"]["total_sent"] == 1
        assert stats["notifications"]["total_delivered"] == 3

        listed = (await host.get("/api/v1/channels")).json()
        assert listed == {
            "channels": [
                {"name": "news", "subscriber_count": 3},
                {"name": "sport", "subscriber_count": 1},
            ],
            "total_channels": 2,
        }
        assert (await host.get("/api/v1/channels/sport")).json()["subscriber_count"] == 1
        assert (await host.get("/api/v1/channels/none")).status_code == 404


async def test_a_node_with_more_channels_than_it_can_name_is_counted_all_the_same(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifyd.cluster.bus.MAX_SENT_BYTES", 2500)
    monkeypatch.setattr("notifyd.api.others.MAX_NAMED", 20)
    nodes = await start_nodes(2)
    names = [f"{n:064}" for n in range(50)]
    await nodes[1].listen("websocket", "anna", *names)
    await nodes[1].listen("websocket", "ben", *names)
    for host, named in zip(nodes, (20, 50), strict=True):
        stats = (await host.get("/stats")).json()
        assert (stats["connections"]["total_connections"], stats["users"]["connected"]) == (2, 2)
        assert stats["channels"] == {"active": 50, "subscriptions": 100}
        listed = (await host.get("/api/v1/channels")).json()
        assert (len(listed["channels"]), listed["total_channels"]) == (named, 50)
        answer = (await host.get("/api/v1/cluster/status")).json()
        assert [node["connections"] for node in answer["nodes"]] in ([0, 2], [2, 0])
        assert answer["totals"]["channels"] == 50


async def test_the_status_names_every_node(nodes: list[Host]) -> None:
    await nodes[1].listen("websocket", "anna", "news")
    await nodes[2].listen("websocket", "anna")
    answer = (await nodes[0].get("/api/v1/cluster/status")).json()
    assert (answer["enabled"], answer["status"]) == (True, "healthy")
    assert answer["node_id"] == cluster_of(nodes[0]).id
    assert [node["name"] for node in answer["nodes"]] == ["node-0", "node-1", "node-2"]
    assert [node["connections"] for node in answer["nodes"]] == [0, 1, 1]
    assert answer["totals"] == {"nodes": 3, "connections": 2, "users": 1, "channels": 1}
    health = (await nodes[0].get("/health")).json()
    assert health["cluster"]["nodes"] == 3
    assert health["status"] == "healthy"
    assert await nodes[0].metric("cluster_nodes") == 3


async def test_a_user_is_found_where_he_is(nodes: list[Host]) -> None:
    await nodes[1].websocket("anna")
    await nodes[1].websocket("anna")
    await nodes[2].listen("sse", "anna", "news")
    answer = (await nodes[0].get("/api/v1/cluster/users/anna")).json()
    places = {cluster_of(nodes[1]).id: 2, cluster_of(nodes[2]).id: 1}
    assert answer["connections"] == 3
    assert {each["node_id"]: each["connections"] for each in answer["nodes"]} == places
    assert (await nodes[0].get("/api/v1/cluster/users/ben")).json()["nodes"] == []

    answer = await nodes[0].post("/api/v1/presence", {"user_ids": ["anna", "ben"]})
    assert answer.json() == {"online": {"anna": 3}}
    devices = (await nodes[0].get("/api/v1/users/anna/connections")).json()["connections"]
    assert [each["transport"] for each in devices] == ["websocket", "websocket", "sse"]
    subscribed = (await nodes[0].get("/api/v1/users/anna/subscriptions")).json()
    assert subscribed == {"user_id": "anna", "connection_count": 3, "subscriptions": ["news"]}


async def test_a_server_without_a_cluster_says_so(start_on: StartServer) -> None:
    host = await start_on()
    await host.listen("websocket", "anna", "news")
    answer = (await host.get("/api/v1/cluster/status")).json()
    assert (answer["enabled"], answer["status"], answer["nodes"]) == (False, "disabled", [])
    assert answer["totals"] == {"nodes": 1, "connections": 1, "users": 1, "channels": 1}
    answer = (await host.get("/api/v1/cluster/users/anna")).json()
    assert answer == {"user_id": "anna", "connections": 1, "nodes": []}


async def test_a_user_is_subscribed_and_unsubscribed_wherever_he_is(nodes: list[Host]) -> None:
    anna = await nodes[1].websocket("anna")
    path = "/api/v1/users/anna"
    answer = await nodes[0].post(f"{path}/subscribe", {"channels": ["news"]})
    assert answer.json() == {"user_id": "anna", "channels": ["news"], "changed": 1}
    await anna.expect("subscribed")
    assert (await nodes[2].publish(channel("news")))["delivered_to"] == 1
    await anna.expect("notification")
    answer = await nodes[2].post(f"{path}/unsubscribe", {"channels": ["news"]})
    assert answer.json()["changed"] == 1
    await anna.expect("unsubscribed")
    assert (await nodes[0].publish(channel("news")))["outcome"] == "nobody"


async def test_no_room_on_another_node_changes_nothing_anywhere(start_nodes: StartNodes) -> None:
    nodes = await start_nodes(2, websocket={"max_subscriptions_per_connection": 2})
    here = await nodes[0].websocket("anna")
    there = await nodes[1].listen("websocket", "anna", "a", "b")
    answer = await nodes[0].post("/api/v1/users/anna/subscribe", {"channels": ["c"]})
    assert answer.status_code == 422
    await here.nothing_came()
    await there.close()


async def test_a_connection_is_closed_from_another_node(nodes: list[Host]) -> None:
    anna = await nodes[1].websocket("anna")
    other = await nodes[1].websocket("anna")
    id = anna.connected["connection_id"]
    answer = await nodes[0].request("DELETE", f"/api/v1/connections/{id}", key=ADMIN_KEY)
    assert answer.status_code == 204
    assert (await anna.closed())[0] == 4003
    await other.nothing_came()
    answer = await nodes[0].request("DELETE", f"/api/v1/connections/{id}", key=ADMIN_KEY)
    assert answer.status_code == 404


async def test_a_user_is_disconnected_and_revoked_on_all_nodes_and_on_those_to_come(
    start_nodes: StartNodes,
) -> None:
    nodes = await start_nodes(2)
    old = token("anna")
    here = await nodes[0].websocket(jwt=old)
    there = await nodes[1].websocket(jwt=old)
    body = {"reason": "stolen", "revoke": True}
    answer = await nodes[0].post("/api/v1/users/anna/disconnect", body)
    assert answer.json() == {"user_id": "anna", "disconnected": 2, "revoked": True}
    assert (await here.closed())[0] == 4003
    assert (await there.closed())[0] == 4003
    nodes += await start_nodes(1)
    for host in nodes:
        answer = await host.get("/sse", key=None, headers={"Authorization": f"Bearer {old}"})
        assert answer.status_code == 401


async def test_a_node_that_ends_is_gone_at_once(nodes: list[Host]) -> None:
    anna = await nodes[2].websocket("anna")
    await nodes[2].stop()
    await anna.closed()
    await until(lambda: len(cluster_of(nodes[0]).alive()) == 2, "the node's end")
    assert (await nodes[0].get("/api/v1/cluster/status")).json()["totals"]["nodes"] == 2
    assert (await nodes[0].publish(user("anna")))["outcome"] == "queued"


async def test_a_node_may_be_alone(start_nodes: StartNodes) -> None:
    (node,) = await start_nodes(1)
    anna = await node.listen("websocket", "anna", "news")
    assert (await node.publish(user("anna")))["outcome"] == "delivered"
    assert (await node.publish(channel("news")))["outcome"] == "delivered"
    assert (await node.publish(channel("none")))["outcome"] == "nobody"
    await anna.notifications(2)


async def test_nodes_without_a_queue_share_templates_keys_and_limits(
    start_nodes: StartNodes,
) -> None:
    nodes = await start_nodes(2, queue={"enabled": False}, ack={"enabled": False})
    template = {"id": "t", "name": "t", "event_type": "e", "payload_template": {}}
    assert (await nodes[0].post("/api/v1/templates", template)).status_code == 201
    assert (await nodes[1].get("/api/v1/templates/t")).status_code == 200
    first = await nodes[0].publish(user("anna"), idempotency_key="once")
    assert await nodes[1].publish(user("anna"), idempotency_key="once") == first


async def test_many_revocations_of_one_tenant_let_no_revoked_token_in_where_a_node_begins(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifyd.cluster.router.MAX_REVOCATIONS", 20)
    (node,) = await start_nodes(1, tenant={"enabled": True})
    at = 4e9
    await cluster_of(node).revoke("globex", "anna", at)
    for number in range(60):
        await cluster_of(node).revoke("acme", f"u{number}", at + number)
    (later,) = await start_nodes(1, tenant={"enabled": True})
    verify = later.notifyd.verifier.verify
    for tenant, name in (("globex", "anna"), ("acme", "u0"), ("acme", "u59")):
        with pytest.raises(Unauthorized, match="revoked"):
            verify(token(name, tenant_id=tenant))
    verify(token("ben", tenant_id="globex"))
    verify(token("u0", tenant_id="initech"))
