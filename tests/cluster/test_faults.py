"""Redis hangs, dies, comes back and speaks nonsense; a cluster goes on with what it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from statistics import median
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import redis.asyncio

from notifyd.cluster import messages
from notifyd.cluster.messages import KINDS, encode, wired
from notifyd.errors import Unavailable
from notifyd.eventually import settled
from notifyd.notification import Notification
from notifyd.queue.redis_keys import bucket_of, member
from tests.cluster.conftest import (
    StartNodes,
    _starter,
    beside,
    cluster_of,
    knowing_each_other,
)
from tests.front_door import WAIT, Host, channel, token, until, user
from tests.stores import RedisServer, proxy

pack = msgspec.msgpack.encode


@pytest.fixture
async def start_breakable(redis_server: RedisServer) -> AsyncIterator[StartNodes]:
    """Start nodes on a Redis that the test may break."""
    async with AsyncExitStack() as stack:
        try:
            yield _starter(stack, redis_server.url, f"test-{uuid4().hex}")
        finally:
            # Or the nodes' end would wait for it.
            redis_server.recover()


async def test_local_deliveries_go_on_while_redis_hangs_and_the_cluster_is_whole_again_after(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    nodes = await start_breakable(2)
    here = await nodes[0].listen("websocket", "anna", "news")
    there = await nodes[1].listen("websocket", "ben", "news")
    await asyncio.to_thread(redis_server.stop)
    took = []
    for number in range(30):
        started = time.monotonic()
        answer = await nodes[0].publish(user("anna"), payload=number)
        assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
        answer = await nodes[0].publish(channel("news"), payload=number)
        assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
        took.append(time.monotonic() - started)
    assert median(took) < 1.0
    await here.notifications(60)
    await until(lambda: not cluster_of(nodes[0]).well, "the breaker", 10)
    took = []
    for _ in range(5):
        started = time.monotonic()
        assert (await nodes[0].publish(user("anna")))["outcome"] == "delivered"
        took.append(time.monotonic() - started)
    # The best, so that it is the server that is measured and not what else the machine does.
    assert min(took) < 0.15
    await here.notifications(5)
    assert (await nodes[0].get("/health")).json()["status"] == "degraded"
    assert (await nodes[0].get("/api/v1/cluster/status")).json()["status"] == "degraded"
    newcomer = await nodes[0].websocket("carl")
    await newcomer.expect("gap")

    await asyncio.to_thread(redis_server.cont)
    await until(lambda: all(cluster_of(host).well for host in nodes), "Redis", 20)
    await found_on(nodes[1], "carl")
    answer = await nodes[1].publish(user("carl"))
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    answer = await nodes[0].publish(channel("news"), payload="again")
    assert answer["delivered_to"] == 2
    got = [await there.receive()]
    while got[-1].get("payload") != "again":
        got.append(await there.receive())


async def test_who_comes_and_goes_while_redis_is_away_takes_no_room_for_ever(
    start_breakable: StartNodes, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifyd.cluster.presence.MAX_UNWRITTEN", 3)
    lasting = {"cluster": {"presence_ttl_seconds": 60}}
    here, there = await start_breakable(2, **lasting)
    anna, gone = await here.websocket("anna"), await here.websocket("gone")
    await found_on(there, "gone")
    cluster = cluster_of(here)
    await asyncio.to_thread(redis_server.stop)
    await gone.close()
    for number in range(20):
        if number == 10:
            await until(lambda: not cluster.well, "the breaker", 10)
        await (await here.websocket(f"u{number}")).close()
    carl = await here.websocket("carl")
    registry = here.notifyd.lifecycle.registry
    await until(lambda: registry.users == 2, "the others' ends")
    assert len(cluster.presence._unwritten) <= 3
    await asyncio.to_thread(redis_server.cont)
    for name in ("anna", "carl"):
        await found_on(there, name)
    # Nobody is known who has gone, though the lease of this node never ended.
    asked = {"user_ids": ["anna", "carl", "gone", *(f"u{number}" for number in range(20))]}
    online = (await there.post("/api/v1/presence", asked)).json()["online"]
    assert online == {"anna": 1, "carl": 1}
    for listener in (anna, carl):
        await listener.close()


async def found_on(node: Host, user_id: str) -> None:
    """Where a user is connected is known to this node."""
    async with asyncio.timeout(10):
        while not (await node.get(f"/api/v1/cluster/users/{user_id}")).json().get("nodes"):
            pass


def lose_everything(server: RedisServer, node: Host) -> None:
    server.command("FLUSHALL")


def lose_users(server: RedisServer, node: Host) -> None:
    """As when their node is silent for as long as its lease."""
    cluster = cluster_of(node)
    for bucket in cluster._keys.buckets:
        server.command("DEL", bucket.on + cluster.id)


def lose_place(server: RedisServer, node: Host) -> None:
    cluster = cluster_of(node)
    for bucket in cluster._keys.buckets:
        server.command("ZREM", bucket.nodes, cluster.id)


Lose = Callable[[RedisServer, Host], None]


@pytest.mark.parametrize("lose", [lose_everything, lose_users, lose_place])
async def test_a_redis_that_lost_who_is_where_learns_it(
    start_breakable: StartNodes, redis_server: RedisServer, lose: Lose
) -> None:
    nodes = await start_breakable(2)
    anna = await nodes[1].websocket("anna")
    await anna.nothing_came()
    lose(redis_server, nodes[1])
    queued = await nodes[0].publish(user("anna"))
    assert queued["outcome"] == "queued"
    # The subscriptions live on, so that nothing but presence tells node and user of one another.
    assert (await anna.expect("notification"))["id"] == queued["notification_id"]
    await delivered_again(nodes[0], "anna")


@pytest.mark.parametrize("lose", [lose_everything, lose_users])
async def test_a_redis_that_learned_of_a_newcomer_alone_learns_of_the_others(
    start_breakable: StartNodes,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    lose: Lose,
) -> None:
    nodes = await start_breakable(2)
    anna = await nodes[1].websocket("anna")
    await anna.nothing_came()
    with monkeypatch.context() as between_renewals:
        between_renewals.setattr(cluster_of(nodes[1]).presence, "renew", nothing_renewed)
        lose(redis_server, nodes[1])
        await nodes[1].websocket(beside("anna"))
        queued = await nodes[0].publish(user("anna"))
        assert queued["outcome"] == "queued"
    assert (await anna.expect("notification"))["id"] == queued["notification_id"]
    await delivered_again(nodes[0], "anna")


def lose_revocations(server: RedisServer, node: Host) -> None:
    assert server.command("DEL", cluster_of(node)._cluster_keys.revoked)


@pytest.mark.parametrize("lose", [lose_everything, lose_revocations])
async def test_what_is_revoked_is_known_to_later_nodes_though_redis_lost_it(
    start_breakable: StartNodes, redis_server: RedisServer, lose: Lose
) -> None:
    (node,) = await start_breakable(1)
    old = token("anna")
    await node.post("/api/v1/users/anna/disconnect", {"revoke": True})
    node.notifyd.verifier.revoke_all("acme", 4e9)
    lose(redis_server, node)

    async def status(host: Host) -> int:
        acks = {"notification_ids": [str(uuid4())]}
        header = {"Authorization": f"Bearer {old}"}
        return (await host.post("/api/v1/acks", acks, key=None, headers=header)).status_code

    # One that begins before it is there again is told, one that begins after finds it.
    (second,) = await start_breakable(1)
    deadline = time.monotonic() + WAIT
    while await status(second) != 401:
        assert time.monotonic() < deadline
    (third,) = await start_breakable(1)
    assert await status(third) == 401
    known = {(tenant, user_id) for tenant, user_id, _ in third.notifyd.verifier.revocations()}
    assert known == {("default", "anna"), ("acme", "")}


async def test_a_short_lease_does_not_end_the_longer_ones_of_other_nodes(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    (patient,) = await start_breakable(1, cluster={"presence_ttl_seconds": 60})
    (hasty,) = await start_breakable(1)
    await patient.websocket("anna")
    await hasty.websocket(beside("anna"))
    cluster = cluster_of(hasty)
    await cluster.nodes.beat()
    bucket = cluster._keys.buckets[bucket_of(member("default", "anna"))]
    keys = (bucket.nodes, cluster._cluster_keys.nodes, cluster._cluster_keys.said)
    assert all(redis_server.command("PTTL", key) > 60_000 for key in keys)


async def nothing_renewed() -> None:
    pass


async def delivered_again(node: Host, user_id: str) -> None:
    """Redis knows where he is."""
    deadline = time.monotonic() + WAIT
    while (await node.publish(user(user_id), ttl=0))["outcome"] == "nobody":
        assert time.monotonic() < deadline


async def test_what_is_queued_while_a_node_hears_nothing_is_replayed_when_it_does(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    nodes = await start_breakable(2)
    anna = await nodes[1].websocket("anna")
    redis_server.command("CLIENT", "KILL", "TYPE", "pubsub")
    answer = await nodes[0].publish(user("anna"))
    got = await anna.expect("notification")
    assert got["id"] == answer["notification_id"]
    await anna.nothing_came()


@pytest.mark.parametrize(
    "target", [user("anna"), {"type": "users", "value": ["anna", "carl", "nobody"]}]
)
async def test_a_node_that_does_not_answer_in_time_gives_routed_and_nothing_is_lost(
    nodes: list[Host], monkeypatch: pytest.MonkeyPatch, target: dict[str, Any]
) -> None:
    anna = await nodes[1].websocket("anna")
    await nodes[1].websocket("carl")
    monkeypatch.setattr("notifyd.cluster.bus.AFTER_SECONDS", 0.1)
    await nodes[1].listen("websocket", "ben", "news")
    there = cluster_of(nodes[1]).bus
    with monkeypatch.context() as deaf:
        deaf.setattr(there, "to_node", lambda node, body: None)
        started = time.monotonic()
        answer = await nodes[0].publish(target)
        routed = 1 if target["type"] == "user" else 2
        assert (answer["outcome"], answer["routed"]) == ("routed", routed)
        assert answer["delivered_to"] == 0
        assert 0.15 < time.monotonic() - started < 5
        answer = await nodes[0].publish(channel("news"))
        assert (answer["outcome"], answer["routed"]) == ("routed", 1)
    assert await nodes[0].metric("cluster_unanswered_total") >= 2
    assert await nodes[1].metric("cluster_unanswered_total") == 0
    await anna.expect("notification")
    # Once it counts as lost it goes to the log; who has it by then gets it not twice.
    with monkeypatch.context() as lost:
        lost.setattr(
            cluster_of(nodes[1]).receiver, "take_for_users", lambda *a, **how: [("nobody", 0)]
        )
        lost.setattr(there, "to_node", lambda node, body: None)
        answer = await nodes[0].publish(target)
        assert answer["outcome"] == "routed"
    got = await anna.expect("notification")
    assert (got["id"], got["metadata"]["replayed"]) == (answer["notification_id"], True)


@pytest.mark.parametrize(
    "target", [channel("news"), {"type": "channels", "value": ["news", "x"]}, {"type": "broadcast"}]
)
async def test_what_redis_was_slow_to_pass_on_is_routed(
    start_breakable: StartNodes, redis_server: RedisServer, target: dict[str, Any]
) -> None:
    async with proxy(redis_server.port) as slow:
        url = f"redis://127.0.0.1:{slow.port}/0"
        (here,) = await start_breakable(1, redis={"url": url, "command_timeout_seconds": WAIT})
        (there,) = await start_breakable(1)
        await knowing_each_other([here, there])
        anna = await there.listen("websocket", "anna", "news")
        slow.hold()
        answer = await here.publish(target)
        assert (answer["outcome"], answer["routed"], answer["success"]) == ("routed", 1, True)
        slow.release()
        assert (await anna.expect("notification"))["id"] == answer["notification_id"]
        await here.stop()


@pytest.mark.parametrize("target", [user("anna"), {"type": "users", "value": ["anna", "ben"]}])
async def test_what_redis_was_slow_to_pass_on_is_settled_for_all_devices(
    start_breakable: StartNodes, redis_server: RedisServer, target: dict[str, Any]
) -> None:
    async with proxy(redis_server.port) as slow:
        url = f"redis://127.0.0.1:{slow.port}/0"
        (here,) = await start_breakable(1, redis={"url": url, "command_timeout_seconds": WAIT})
        (there,) = await start_breakable(1)
        await knowing_each_other([here, there])
        first = await here.websocket("anna", query="acks=1")
        await here.websocket("ben")
        second = await there.websocket("anna", query="acks=1")
        for host in (here, there):
            await nobody_is_replayed_to(host)
        slow.hold()
        # Nobody knows by then that she has another device.
        answer = await here.publish(target)
        assert answer["outcome"] == "delivered"
        await first.expect("notification")
        slow.release()
        assert (await second.expect("notification"))["id"] == answer["notification_id"]
        assert (await first.ack(answer["notification_id"]))["type"] == "acked"
        await first.close()
        held = there.notifyd._confirmations
        await until(lambda: not held.held, "what the other device need not confirm any more")
        await second.close()
        await nothing_is_replayed(there)
        await here.stop()


async def say(server: RedisServer, channel_name: str, what: list[bytes]) -> None:
    """Publish these."""
    client = redis.asyncio.Redis(port=server.port)
    async with client, client.pipeline(transaction=False) as pipeline:
        for data in what:
            pipeline.publish(channel_name, data)
        assert all(await pipeline.execute())


def shapes() -> list[tuple[str, bytes]]:
    """Messages of every wrong shape, with the reason for which each is ignored."""
    notification = wired(Notification(str(uuid4()), time.time(), "e", msgspec.Raw(b'{"a":1}')))

    def item(kind: str, body: object) -> bytes:
        return b"\0" + pack([1, "stranger", [[kind, body]]])

    def routed(**changed: Any) -> bytes:
        body = messages.Routed(0, "default", ("anna",), notification)
        return b"\0" + encode("stranger", [msgspec.structs.replace(body, **changed)])

    def payload(data: bytes) -> bytes:
        return routed(notification=msgspec.structs.replace(notification, payload=data))

    bad = [
        ("not_msgpack", b""),
        ("not_msgpack", b"hello"),
        ("not_msgpack", b"\0"),
        ("not_msgpack", b"\2" + pack([1, "stranger", []])),
        ("not_msgpack", b"\0\xc1"),
        ("not_msgpack", routed()[:-3]),
        ("shape", b"\0" + pack({"version": 1})),
        ("shape", b"\0" + pack("hello")),
        ("shape", b"\0" + pack([1])),
        ("shape", b"\0" + pack(["one", "stranger", []])),
        ("shape", b"\0" + pack([1, "stranger", {}])),
        ("shape", b"\0" + pack([1, "stranger", ["routed"]])),
        ("unknown", item("of a time to come", [1, 2, 3])),
        ("unknown", b"\0" + pack([99, "stranger", [["of a time to come", {}]], "more"])),
        ("payload", payload(b'{"a":\n1}')),
        ("payload", payload(b'{"a":1')),
        ("payload", payload(b'"\xff"')),
        ("payload", payload(b"")),
        ("shape", routed(tenant=7)),
        ("shape", routed(users="anna")),
        ("shape", routed(notification=None)),
        # Over the limit with what goes with it.
        ("failed", payload(b'"' + b"x" * 65_500 + b'"')),
    ]
    wrong: list[dict[str, Any]] = [
        {"at": float("nan")},
        {"at": float("inf")},
        {"at": 1e300},
        {"at": -1.0},
        {"id": "not-a-uuid"},
        {"id": "x" * 36},
        {"event": ""},
        {"event": "e" * 129},
        {"payload": b'"' + b"x" * 65_535 + b'"'},
    ]
    for changed in wrong:
        content = msgspec.structs.replace(notification, **changed)
        bad.append(("shape", routed(notification=content)))
    for kind in KINDS:
        if kind != "alive":
            bad.append(("shape", item(kind, [])))
            bad.append(("shape", item(kind, [None] * 12)))
            bad.append(("shape", item(kind, {"seq": 1})))
        bad.append(("shape", item(kind, "text")))
        bad.append(("shape", item(kind, 7)))
    return bad


async def test_messages_of_every_wrong_shape_are_counted_and_change_nothing(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    nodes = await start_breakable(2)
    anna = await nodes[0].websocket("anna")
    await anna.subscribe("news")
    keys = cluster_of(nodes[0])._cluster_keys
    bad = shapes()
    await say(redis_server, keys.all, [data for _, data in bad])
    await say(redis_server, keys.node + cluster_of(nodes[0]).id, [data for _, data in bad])
    reasons = {reason for reason, _ in bad}
    for reason in reasons:
        expected = 2 * sum(each == reason for each, _ in bad)
        counter = nodes[0].notifyd.metrics.cluster_bad_messages_total.labels(reason)
        await until(lambda c=counter, e=expected: c.value == e, f"{reason} {expected}", 20)  # type: ignore[misc]  # bound now
    await anna.nothing_came()
    answer = await nodes[1].publish(channel("news"))
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    await anna.expect("notification")


async def test_messages_of_a_later_version_are_understood_as_far_as_they_go(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    (node,) = await start_breakable(1)
    anna = await node.websocket("anna")
    content = wired(Notification(str(uuid4()), time.time(), "e", msgspec.Raw(b"1")))
    body = msgspec.msgpack.decode(pack(messages.Routed(0, "default", ("anna",), content)))
    later = [99, "of-a-later-version", [["of a time to come", [1]], ["routed", [*body, "more"]]]]
    cluster = cluster_of(node)
    channel_of_node = cluster._cluster_keys.node + cluster.id
    await say(redis_server, channel_of_node, [b"\0" + pack([*later, "more"])])
    assert (await anna.expect("notification"))["id"] == content.id
    counter = node.notifyd.metrics.cluster_bad_messages_total.labels("unknown")
    assert counter.value == 1


async def test_answers_that_nobody_waits_for_change_nothing(
    start_breakable: StartNodes, redis_server: RedisServer
) -> None:
    nodes = await start_breakable(2)
    anna = await nodes[1].websocket("anna")
    cluster = cluster_of(nodes[0])
    told = [
        b"\0" + encode("stranger", [body])
        for seq in range(1, 40)
        for body in (
            messages.Told(seq, (("delivered", 7),) * 3),
            messages.Reached(seq, 9),
            messages.Held(seq, ("x",)),
            messages.Answer(seq, msgspec.Raw(pack(5))),
        )
    ]
    await say(redis_server, cluster._cluster_keys.node + cluster.id, told)
    answer = await nodes[0].publish(user("anna"))
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    await anna.expect("notification")


async def test_who_is_sent_more_behind_a_silent_node_waits_no_longer_than_the_first(
    nodes: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    await nodes[1].websocket("anna")
    monkeypatch.setattr(cluster_of(nodes[1]).bus, "to_node", lambda node, body: None)
    for _ in range(3):
        started = time.monotonic()
        assert (await nodes[0].publish(user("anna")))["outcome"] == "routed"
        assert time.monotonic() - started < 1


async def test_what_a_silent_node_lost_is_not_lost_with_the_end_of_the_sender(
    nodes: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = await nodes[1].websocket("anna")
    with monkeypatch.context() as lost:
        lost.setattr(
            cluster_of(nodes[1]).receiver, "take_for_users", lambda *a, **how: [("nobody", 0)]
        )
        lost.setattr(cluster_of(nodes[1]).bus, "to_node", lambda node, body: None)
        answer = await nodes[0].publish(user("anna"))
        assert answer["outcome"] == "routed"
    logs = nodes[0].notifyd._logs
    assert logs is not None
    enqueue = logs.enqueue

    async def enqueue_later(*given: Any, **how: Any) -> Any:
        for _ in range(100):
            await asyncio.sleep(0)
        return await settled(enqueue(*given, **how))

    monkeypatch.setattr(logs, "enqueue", enqueue_later)
    await nodes[0].shut_down()
    got = await anna.expect("notification")
    assert got["id"] == answer["notification_id"]


async def test_what_one_device_confirmed_does_not_come_back_from_a_silent_node(
    nodes: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifyd.cluster.bus.AFTER_SECONDS", 1.0)
    here = await nodes[0].websocket("anna", query="acks=1")
    there = await nodes[1].websocket("anna", query="acks=1")
    with monkeypatch.context() as lost:
        lost.setattr(
            cluster_of(nodes[1]).receiver, "take_for_users", lambda *a, **how: [("nobody", 0)]
        )
        lost.setattr(cluster_of(nodes[1]).bus, "to_node", lambda node, body: None)
        answer = await nodes[0].publish(user("anna"))
        assert answer["delivered_to"] == 1
        await here.expect("notification")
        assert (await here.ack(answer["notification_id"]))["type"] == "acked"
    await here.close()
    await there.close()
    await until(lambda: not cluster_of(nodes[0]).bus._awaited, "the end of all patience")
    await until(lambda: not nodes[0].notifyd._writes._under_way, "what is stored then")
    assert (await nodes[2].get("/stats")).json()["queue"]["total_messages"] == 0


@pytest.mark.parametrize("mode", ["offline", "always"])
@pytest.mark.parametrize("users", [["anna"], ["anna", "ben"]])
async def test_what_a_node_queued_while_redis_was_away_for_it_alone_is_told_later(
    start_nodes: StartNodes, monkeypatch: pytest.MonkeyPatch, users: list[str], mode: str
) -> None:
    nodes = await start_nodes(2, queue={"mode": mode})
    anna = await nodes[1].websocket("anna")
    await anna.nothing_came()
    cluster = cluster_of(nodes[0])
    redis, presence = cluster._redis, cluster.presence
    run = redis.run

    def run_no_route(script: Any, *given: Any) -> Any:
        if script in {cluster._route, presence._find}:
            raise Unavailable("away", retry_after=1)
        return run(script, *given)

    with monkeypatch.context() as away:
        away.setattr(redis, "run", run_no_route)
        answer = await nodes[0].publish({"type": "users", "value": users})
        assert answer["outcome"] == "queued"
    got = await anna.expect("notification")
    assert got["id"] == answer["notification_id"]


@pytest.mark.parametrize("confirmed", ["before", "after"])
@pytest.mark.parametrize("comes_back", ["to the store", "to the user"])
async def test_what_was_confirmed_is_not_stored_again_where_the_store_did_not_say_that_it_has_it(
    nodes: list[Host], monkeypatch: pytest.MonkeyPatch, confirmed: str, comes_back: str
) -> None:
    anna = await nodes[0].raw_websocket("anna", query="acks=1")
    sent = await nodes[0].publish(user("anna"))
    assert (await anna.receive())["id"] == sent["notification_id"]
    (logs, writes), there = (nodes[0].notifyd._logs, nodes[0].notifyd._writes), nodes[1].notifyd
    assert logs is not None
    with monkeypatch.context() as away:
        if confirmed == "before":
            away.setattr(writes, "retry", nothing_renewed)
        enqueue = logs.enqueue

        async def enqueue_unheard(*given: Any, **how: Any) -> Any:
            away.setattr(logs, "enqueue", unavailable)
            await settled(enqueue(*given, **how))
            raise Unavailable("no answer", retry_after=1)

        async def unavailable(*given: Any, **how: Any) -> Any:
            raise Unavailable("away", retry_after=1)

        away.setattr(logs, "enqueue", enqueue_unheard)
        anna.vanish()
        await until(lambda: writes.has_homeless("default", "anna"), "what nobody knows of")
        elsewhere = await nodes[1].websocket("anna", query="acks=1")
        assert (await elsewhere.expect("notification"))["id"] == sent["notification_id"]
        await elsewhere.expect("caught_up")
        if confirmed == "after":
            await until(lambda: bool(there._confirmations._asked_by), "the question")
            away.setattr(writes, "retry", nothing_renewed)
        assert (await elsewhere.ack(sent["notification_id"]))["type"] == "acked"
        await elsewhere.close()
        if confirmed == "after":
            await until(lambda: not writes.has_homeless("default", "anna"), "the answer")
        if comes_back == "to the user":
            await nothing_is_replayed(nodes[0])
    await writes.retry()
    await nothing_is_replayed(nodes[2])


async def nobody_is_replayed_to(node: Host) -> None:
    """Wait until what users had in their queues is sent."""
    registry = node.notifyd.lifecycle.registry
    await until(lambda: not any(each.outbox.holds_back for each in registry), "their replays")


async def nothing_is_replayed(node: Host) -> None:
    again = await node.websocket("anna")
    await nobody_is_replayed_to(node)
    await again.nothing_came()
    await again.close()
