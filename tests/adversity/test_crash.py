"""`queue.mode = "always"`: a kill −9 of the server loses nothing that was answered.

A real `notifyd serve` is killed and started again while notifications are published to users of
whom half are connected, over sockets that are cut at random; the store lives on. Each user has one
publisher, who numbers what he sends him and sends one after the other, so that order is defined:
for what died unanswered too, if it arrives, because nothing is sent a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.adversity.raw import CLOSE, TEXT, RawClient
from tests.adversity.spawning import ServerProcess, Spawned

USERS = 500
NOTIFICATIONS = 10_000
PUBLISHERS = 4
KILLS = 5
MOST_IN_A_BATCH = 40
MOST_CUTS_OF_A_USER = 3
AT_ONCE = 100

GONE = (ConnectionError, asyncio.IncompleteReadError)


class User:
    """A user, and what his publisher and he himself know."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent = 0
        self.answered: set[int] = set()
        self.seen: set[int] = set()
        self.acked: set[str] = set()
        """Ids whose `acked` he has read."""


class Crashes:
    """One run: the server that dies, its publishers and its users."""

    def __init__(self, process: ServerProcess, seed: int) -> None:
        self.process = process
        self.random = random.Random(seed)
        self.users = [User(f"user-{n}") for n in range(USERS)]
        self.counts: Counter[str] = Counter()
        self.up = asyncio.Event()
        self.server: Spawned
        self._next_kill: tuple[int, asyncio.Event] = (0, asyncio.Event())

    async def start(self) -> None:
        """The server listens (again)."""
        self.server = await self.process.start()
        self.up.set()

    # --- dying ---

    async def kill_and_restart(self) -> None:
        """At a random moment of each part of the publishing but the last."""
        part = NOTIFICATIONS // (KILLS + 1)
        for number in range(1, KILLS + 1):
            moment = asyncio.Event()
            self._next_kill = (part * number - self.random.randrange(part // 2), moment)
            await moment.wait()
            # Anywhere in the work on the requests that are under way.
            await asyncio.sleep(self.random.uniform(0, 0.01))
            self.up.clear()
            await self.process.kill()
            self.counts["kills"] += 1
            await self.start()

    # --- publishing ---

    async def publish(self, users: list[User], share: int) -> None:
        """Send so many to these users, one request after the other."""
        sent = 0
        while sent < share:
            await self.up.wait()
            items: list[tuple[User, int]] = []
            try:
                async with self.server.connected() as client:
                    while sent < share:
                        items = self._numbered(users, share - sent)
                        sent += len(items)
                        await self._send(client, items)
            except GONE:
                self.counts["unknown"] += len(items)

    def _numbered(self, users: list[User], left: int) -> list[tuple[User, int]]:
        size = 1 if self.random.random() < 0.5 else self.random.randint(2, MOST_IN_A_BATCH)
        items = []
        for user in self.random.choices(users, k=min(size, left)):
            user.sent += 1
            items.append((user, user.sent))
        return items

    async def _send(self, client: RawClient, items: list[tuple[User, int]]) -> None:
        contents = [
            {"event_type": "test.crash", "payload": {"user": user.name, "n": n}}
            for user, n in items
        ]
        names = [user.name for user, _ in items]
        path = "/api/v1/notifications"
        body: dict[str, Any]
        if len(items) == 1:
            path += "/send"
            body = {"target_user_id": names[0], **contents[0]}
        else:
            path += "/batch"
            targets = [{"type": "user", "value": name} for name in names]
            body = {
                "notifications": [
                    {"target": target, **content}
                    for target, content in zip(targets, contents, strict=True)
                ]
            }
        await client.send(self.server.request("POST", path, body=json.dumps(body).encode()))
        self.counts["sent"] += len(items)
        if self.counts["sent"] >= self._next_kill[0]:
            self._next_kill[1].set()
        response = await client.response()
        assert response.status == 200, response
        results = response.json["results"] if len(items) > 1 else [response.json]
        for (user, n), result in zip(items, results, strict=True):
            assert result["outcome"] in {"queued", "delivered"}, result
            self.counts[result["outcome"]] += 1
            user.answered.add(n)

    # --- receiving ---

    async def stay_connected(self, user: User) -> None:
        """Receive, ack some of it, be cut, come again; until cancelled."""
        while True:
            await self.up.wait()
            with contextlib.suppress(*GONE):
                async with self._device(user) as device:
                    await device.receive(self.random.randint(1, 12))
                    self.counts["cuts"] += 1

    async def collect(self, user: User) -> None:
        """Ack everything that comes, over connections that may be cut, until nothing comes."""
        cuts = self.random.randint(0, MOST_CUTS_OF_A_USER)
        waiting = True
        while waiting:
            async with self._device(user) as device:
                if cuts:
                    cuts -= 1
                    await device.receive(self.random.randint(0, 12), only_the_replay=True)
                    self.counts["cuts"] += 1
                else:
                    waiting = await device.take_everything()

    @contextlib.asynccontextmanager
    async def _device(self, user: User) -> AsyncIterator[Device]:
        async with self.server.websocket(user.name, query="&acks=1") as client:
            yield Device(self, user, client)


class Device:
    """One connection of a user. Its Acks may be cut off before they are answered."""

    def __init__(self, run: Crashes, user: User, client: RawClient) -> None:
        self._run = run
        self._user = user
        self._client = client
        self._newest = 0
        self._unacked: list[str] = []
        self._asked: set[str] = set()

    async def receive(self, messages: int, *, only_the_replay: bool = False) -> None:
        """So many messages and no more, some of them acked."""
        await self._mark_the_end()
        for _ in range(messages):
            kind = await self._message()
            if self._run.random.random() < 0.3:
                await self._ack()
            if only_the_replay and kind == "subscribed":
                break

    async def take_everything(self) -> bool:
        """Receive all there is and ack it; whether there was anything."""
        await self._mark_the_end()
        while await self._message() != "subscribed":
            pass
        anything = self._newest > 0
        while self._unacked or self._asked:
            await self._ack()
            await self._message()
        return anything

    async def _mark_the_end(self) -> None:
        # What is not a reply waits behind the replay, and a user with nothing in his log is told
        # nothing about it.
        await self._client.say(type="Subscribe", payload={"channels": ["end-of-replay"]})

    async def _ack(self) -> None:
        if not self._unacked:
            return
        ids, self._unacked = self._unacked, []
        self._asked.update(ids)
        await self._client.say(type="Ack", payload={"notification_ids": ids})

    async def _message(self) -> str:
        while (frame := await self._client.frame()).opcode != TEXT:
            assert frame.opcode != CLOSE, frame
        message = json.loads(frame.payload)
        kind: str = message["type"]
        assert kind not in {"error", "gap"}, message
        if kind == "notification":
            self._take(message)
        elif kind == "acked":
            assert "refused" not in message, message
            self._asked.difference_update(message["notification_ids"])
            self._user.acked.update(message["notification_ids"])
        return kind

    def _take(self, message: dict[str, Any]) -> None:
        user, id, n = self._user, message["id"], message["payload"]["n"]
        assert message["payload"]["user"] == user.name
        assert id not in user.acked, f"{n} came to {user.name} again after its acked"
        assert n > self._newest, f"{n} came to {user.name} behind {self._newest}"
        self._newest = n
        if n in user.seen:
            self._run.counts["redelivered"] += 1
        else:
            # Over all his connections: nothing arrives that was passed over before.
            assert n > max(user.seen, default=0), f"{n} came to {user.name} too late"
            user.seen.add(n)
        self._unacked.append(id)


@pytest.fixture(params=["redis", "postgres"])
def store_environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Where the server keeps everything."""
    environment = {
        "NOTIFYD_QUEUE__BACKEND": request.param,
        "NOTIFYD_QUEUE__MODE": "always",
        "NOTIFYD_ACK__BACKEND": request.param,
        # Sooner than the clients lose their patience.
        "NOTIFYD_WEBSOCKET__HEARTBEAT_INTERVAL": "5",
    }
    if request.param == "redis":
        environment["NOTIFYD_REDIS__URL"] = request.getfixturevalue("redis_url")
        environment["NOTIFYD_REDIS__KEY_PREFIX"] = f"test-{uuid4().hex}"
    else:
        environment["NOTIFYD_POSTGRES__URL"] = request.getfixturevalue("postgres_url")
    return environment


async def test_a_server_that_is_killed_loses_nothing_that_it_answered(
    store_environment: dict[str, str], tmp_path: Path
) -> None:
    process = ServerProcess("sockets", tmp_path, store_environment)
    run = Crashes(process, seed=4)
    try:
        await run.start()
        connected = run.users[::2]
        async with asyncio.TaskGroup() as staying:
            devices = [staying.create_task(run.stay_connected(user)) for user in connected]
            async with asyncio.TaskGroup() as work:
                work.create_task(run.kill_and_restart())
                for number in range(PUBLISHERS):
                    users = run.users[number::PUBLISHERS]
                    work.create_task(run.publish(users, NOTIFICATIONS // PUBLISHERS))
            for device in devices:
                device.cancel()
        room = asyncio.Semaphore(AT_ONCE)

        async def collect(user: User) -> None:
            async with room:
                await run.collect(user)

        async with asyncio.TaskGroup() as collecting:
            for user in run.users:
                collecting.create_task(collect(user))
        stats = (await run.server.call("GET", "/stats")).json
    finally:
        await process.terminate()
    run.counts["answered"] = sum(len(user.answered) for user in run.users)
    run.counts["arrived"] = sum(len(user.seen) for user in run.users)
    lost = {user.name: sorted(user.answered - user.seen) for user in run.users}
    print(f"\n{store_environment['NOTIFYD_QUEUE__BACKEND']}:", dict(run.counts))  # noqa: T201  # the figures of the run are worth seeing
    assert not any(lost.values()), {name: numbers for name, numbers in lost.items() if numbers}
    assert run.counts["kills"] == KILLS
    assert run.counts["sent"] == NOTIFICATIONS == run.counts["answered"] + run.counts["unknown"]
    assert run.counts["unknown"] > 0
    assert run.counts["redelivered"] > 0
    assert stats["queue"]["total_messages"] == 0, stats
