"""Acknowledgements that are kept in Redis or PostgreSQL: timeouts by the stores' own time, and what
is held beyond the bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.conftest import StartServer
from tests.front_door import WAIT, Host, Message, token, user

HELD = 10


async def comes_to(ask: Callable[[], Awaitable[object]], wanted: object) -> None:
    """What is asked becomes this; the ledger hears of things later than clients do."""
    found: object = None
    try:
        async with asyncio.timeout(WAIT):
            while (found := await ask()) != wanted:
                pass
    except TimeoutError:
        raise AssertionError(f"{found} did not become {wanted}") from None


async def report(host: Host, id: str) -> Message:
    """Who has acked a notification."""
    answer: Message = (await host.get(f"/api/v1/notifications/{id}/acks")).json()
    return answer


async def stats(host: Host, *names: str) -> tuple[Any, ...]:
    """Figures of all acks."""
    figures = (await host.get("/api/v1/stats/acks")).json()
    return tuple(figures[name] for name in names)


async def state(host: Host, id: str) -> str:
    """What the ledger says of the one recipient of a notification."""
    recipients = (await report(host, id)).get("recipients", ())
    return str(recipients[0]["state"]) if recipients else "unknown"


async def queued(host: Host) -> int:
    """How many wait in the queue."""
    count: int = (await host.get("/stats")).json()["queue"]["total_messages"]
    return count


async def test_an_ack_in_time_one_too_late_and_one_that_never_comes(
    kept: dict[str, dict[str, Any]], start_on: StartServer
) -> None:
    kept["ack"] |= {"timeout_seconds": 1.5, "cleanup_interval_seconds": 0.05}
    host = await start_on("sockets", **kept)
    ada = await host.websocket("ada", query="acks=1")
    ids = [(await host.publish(user("ada")))["notification_id"] for _ in range(3)]
    await ada.notifications(3)
    for _ in range(2):
        assert await ada.ack(ids[0]) == {"type": "acked", "notification_id": ids[0]}
    for id in ids[1:]:
        await comes_to(lambda id=id: state(host, id), "expired")  # type: ignore[misc]  # bound now
    assert await host.metric("ack_expired_total") == 2
    late = {"notification_id": ids[1]}
    headers = {"Authorization": f"Bearer {token('ada')}"}
    answer = await host.post("/api/v1/acks", late, key=None, headers=headers)
    assert answer.json() == {"acked": [ids[1]], "refused": []}
    assert [await state(host, id) for id in ids] == ["confirmed", "confirmed", "expired"]
    # What expired stays counted, though it was acked later.
    assert await stats(host, "pending_count", "total_acked", "total_expired") == (0, 2, 2)
    assert await host.metric("ack_received_total") == 2
    average, p95 = await stats(host, "avg_latency_ms", "p95_latency_ms")
    assert 0 < average <= p95
    assert p95 >= 1500
    # Acked late it is settled all the same; never acked it comes again.
    await ada.close()
    await comes_to(lambda: queued(host), 1)
    again = await host.websocket("ada")
    assert (await again.expect("notification"))["id"] == ids[2]
    assert (await again.expect("caught_up"))["replayed"] == 1


async def test_beyond_the_bound_the_oldest_held_move_to_the_queue_and_can_be_acked_there(
    kept: dict[str, dict[str, Any]], start_on: StartServer
) -> None:
    kept["ack"] |= {"max_pending": HELD}
    host = await start_on("sockets", **kept)
    device = await host.websocket("ada", query="acks=1")
    ids = [(await host.publish(user("ada"), payload=n))["notification_id"] for n in range(25)]
    assert [message["id"] for message in await device.notifications(25)] == ids
    await comes_to(lambda: queued(host), 25 - HELD)
    moved, held = ids[3], ids[-1]
    assert (await device.ack(moved, held))["notification_ids"] == [moved, held]
    assert await queued(host) == 25 - HELD - 1
    await device.nothing_came()
    await device.close()
    left = [id for id in ids if id not in {moved, held}]
    await comes_to(lambda: queued(host), len(left))
    again = await host.websocket("ada")
    assert [message["id"] for message in await again.notifications(len(left))] == left
    assert (await again.expect("caught_up"))["replayed"] == len(left)


async def test_a_stranger_may_ack_nothing_that_is_in_the_store(
    kept: dict[str, dict[str, Any]], start_on: StartServer
) -> None:
    host = await start_on("sockets", **kept)
    id = (await host.publish(user("ada")))["notification_id"]
    eve = await host.websocket("eve")
    assert (await eve.ack(id))["code"] == "INVALID_ACK"
    headers = {"Authorization": f"Bearer {token('eve')}"}
    answer = await host.post("/api/v1/acks", {"notification_id": id}, key=None, headers=headers)
    assert answer.json() == {"acked": [], "refused": [id]}
    await comes_to(lambda: state(host, id), "queued")
    stream = await host.sse("ada")
    assert (await stream.expect("notification"))["id"] == id
    headers = {"Authorization": f"Bearer {token('ada')}"}
    for _ in range(2):
        answer = await host.post("/api/v1/acks", {"notification_id": id}, key=None, headers=headers)
        assert answer.json() == {"acked": [id], "refused": []}
    assert await queued(host) == 0
    assert await stats(host, "total_acked") == (1,)
    shown = await report(host, id)
    assert (shown["expected"], shown["confirmed"]) == (1, 1)
    assert shown["recipients"][0]["by"] == "ack"
