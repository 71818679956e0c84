"""What a tenant may have is counted over all nodes, and so is what is told of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from notifyd.identifiers import new_uuid
from tests.cluster.conftest import StartNodes, StartProcesses
from tests.cluster.processes import NodeProcess
from tests.front_door import ADMIN_KEY, WAIT, Host, WebSocketListener, channel, token

TENANTS = {"enabled": True, "max_connections": 5}


async def admitted(node: NodeProcess | Host, tenant: str = "acme") -> WebSocketListener | None:
    """A connection of a new user; None where his tenant has as many as it may have."""
    try:
        if isinstance(node, NodeProcess):
            return await node.websocket(new_uuid(), tenant_id=tenant)
        return await node.websocket(jwt=token(new_uuid(), tenant_id=tenant))
    except InvalidStatus as refused:
        if refused.response.status_code != 429:
            raise
        return None


async def until_refused(node: NodeProcess | Host) -> None:
    async with asyncio.timeout(WAIT):
        while (listener := await admitted(node)) is not None:
            await listener.close()


async def until_admitted(node: NodeProcess | Host) -> None:
    async with asyncio.timeout(WAIT):
        while await admitted(node) is None:
            pass


async def test_nodes_admit_as_many_of_a_tenant_as_it_may_have_together(
    start_processes: StartProcesses,
) -> None:
    # Beats are 20 s apart: nothing here waits for one.
    nodes = await start_processes(
        2,
        NOTIFYD_TENANT__ENABLED="true",
        NOTIFYD_TENANT__MAX_CONNECTIONS="5",
        NOTIFYD_CLUSTER__PRESENCE_TTL_SECONDS="60",
    )
    there = [await admitted(nodes[0]) for _ in range(5)]
    await until_refused(nodes[1])
    assert await admitted(nodes[1], "globex") is not None
    last = there.pop()
    assert last is not None
    await last.close()
    await until_admitted(nodes[1])
    await until_refused(nodes[0])
    # Its lease goes on to hold, and what it had is gone.
    await nodes[0].kill()
    for _ in range(4):
        await until_admitted(nodes[1])
    assert await admitted(nodes[1]) is None


async def test_a_node_that_begins_is_told_what_the_others_have(start_nodes: StartNodes) -> None:
    (first,) = await start_nodes(1, tenant=TENANTS)
    for _ in range(5):
        assert await admitted(first) is not None
    (later,) = await start_nodes(1, tenant=TENANTS)
    await until_refused(later)
    assert await admitted(later, "globex") is not None


async def test_the_room_of_a_node_that_ends_is_free_at_once(start_nodes: StartNodes) -> None:
    nodes = await start_nodes(2, tenant=TENANTS, cluster={"presence_ttl_seconds": 60})
    for _ in range(5):
        assert await admitted(nodes[0]) is not None
    await until_refused(nodes[1])
    await nodes[0].stop()
    for _ in range(5):
        await until_admitted(nodes[1])


async def test_figures_of_a_tenant_are_those_of_all_nodes(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await start_nodes(3, tenant={"enabled": True})
    await nodes[0].listen("websocket", "", "news", "sport", jwt=token("anna", tenant_id="acme"))
    await nodes[1].listen("sse", "", "news", jwt=token("anna", tenant_id="acme"))
    await nodes[1].listen("websocket", "", "news", jwt=token("ben", tenant_id="acme"))
    await nodes[2].listen("websocket", "", "news", jwt=token("anna", tenant_id="globex"))
    body = {"target": channel("news"), "event_type": "e", "payload": 1}
    headers = {"X-Tenant-ID": "acme"}
    assert (await nodes[2].post("/api/v1/notifications", body, headers=headers)).status_code == 200
    # A node answers with its own counts stored; the others store theirs every five seconds.
    await nodes[2].notifyd.tenants.sync()
    for host in nodes:
        one = await figures(host, "/api/v1/tenants/acme")
        assert (one["connections"], one["users"], one["channels"]) == (3, 2, 2)
        assert one["notifications"]["today"] == 1
        assert one["deliveries"]["today"] == 3
        stats = (await host.get("/stats", headers=headers)).json()["connections"]
        assert (stats["total_connections"], stats["unique_users"]) == (3, 2)
        every = await figures(host, "/api/v1/tenants")
        assert every["total"] == 2
        assert every["tenants"][0] == one
        globex = every["tenants"][1]
        assert globex == await figures(host, "/api/v1/tenants/globex")
        assert (globex["connections"], globex["users"], globex["channels"]) == (1, 1, 1)
    # Of channels that are not named each node's are added up.
    monkeypatch.setattr("notifyd.api.others.MAX_NAMED", 0)
    every = await figures(nodes[0], "/api/v1/tenants")
    assert [each["channels"] for each in every["tenants"]] == [3, 1]


async def figures(host: Host, path: str) -> Any:
    answer = await host.get(path, key=ADMIN_KEY)
    assert answer.status_code == 200
    return answer.json()
