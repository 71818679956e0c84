"""Which node holds which user: for each node a hash of its users in Redis, which lasts as long as
the node renews it.

What changes in one turn of the event loop is written together. Nothing here waits for Redis longer
than it answers; what could not be written is written when it is back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from notifyd.cluster.nodes import script
from notifyd.errors import Unavailable
from notifyd.eventually import retrieve
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from notifyd.redis_client import Redis

UserKey = tuple[str, str]

USERS_PER_CALL = 500

MAX_UNWRITTEN = 100_000
"""Users who came or went while Redis was away, at most: of more, all of the node's users are
written anew."""

Found = dict[str, dict[str, int]]
"""For each user who was found, the nodes that have him and his connections there."""


class Presence:
    """Says to Redis whom this node holds, and asks it who holds whom.

    `connections_of` tells how many connections a user has here, `users` who has any. `on_late` is
    told whom Redis has only now learned of, or again: what others put into their logs meanwhile,
    nobody here was told.
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        node: str,
        *,
        lease_seconds: float,
        connections_of: Callable[[str, str], int],
        users: Callable[[], Iterable[UserKey]],
        on_late: Callable[[Sequence[UserKey]], None],
    ) -> None:
        self._redis = redis
        self._buckets = keys.buckets
        self._node = node
        self._lease = int(lease_seconds * 1000)
        self._connections_of = connections_of
        self._users = users
        self._on_late = on_late
        self._users_in = [0] * len(self._buckets)
        self._changed: dict[UserKey, int] = {}
        self._unwritten: dict[UserKey, int] = {}
        # Buckets of whose users Redis does not have all: the lease ran out, or it lost what it had.
        self._lost: set[int] = set()
        self._all_anew = False
        self._written: asyncio.Future[None] | None = None
        self._write = script("presence")
        self._find = script("find")
        self._count = script("count")
        self._count_all = script("count_all")

    # --- writing ---

    def came(self, tenant: str, user: str) -> asyncio.Future[None]:
        """A connection of a user is in the registry. The future is done when Redis knows of it, or
        cannot be told; it never fails."""
        bucket = bucket_of(member(tenant, user))
        if self._connections_of(tenant, user) == 1:
            self._users_in[bucket] += 1
        return self._note((tenant, user), bucket)

    def went(self, tenant: str, user: str) -> None:
        """A connection of a user is in the registry no more."""
        bucket = bucket_of(member(tenant, user))
        if self._connections_of(tenant, user) == 0:
            self._users_in[bucket] -= 1
        self._note((tenant, user), bucket)

    def _note(self, user: UserKey, bucket: int) -> asyncio.Future[None]:
        written = self._written
        if written is None:
            loop = asyncio.get_running_loop()
            written = self._written = loop.create_future()
            loop.call_soon(self._flush)
        self._changed[user] = bucket
        return written

    def _flush(self) -> None:
        """Write what changed in this turn."""
        written, self._written = self._written, None
        changed, self._changed = self._changed, {}
        calls = self._write_users(changed)
        missing = len(calls)

        def answered(_: asyncio.Future[int]) -> None:
            nonlocal missing
            missing -= 1
            if not missing and written is not None:
                written.set_result(None)

        for call in calls:
            call.add_done_callback(answered)
        if not calls and written is not None:
            written.set_result(None)

    def _write_users(self, users: dict[UserKey, int]) -> list[asyncio.Future[int]]:
        """Write how many connections these have now; their buckets are the values."""
        by_bucket: defaultdict[int, list[UserKey]] = defaultdict(list)
        for user, bucket in users.items():
            by_bucket[bucket].append(user)
        calls = []
        for bucket, some in by_bucket.items():
            others = self._users_in[bucket] - sum(self._connections_of(*user) > 0 for user in some)
            for start in range(0, len(some), USERS_PER_CALL):
                part = some[start : start + USERS_PER_CALL]
                words: list[str | int] = []
                for user in part:
                    words += (member(*user), self._connections_of(*user))
                call = self._call(bucket, words)
                if call is None:
                    self._keep(bucket, part)
                else:
                    call.add_done_callback(partial(self._look, bucket, part, others))
                    calls.append(call)
        return calls

    def _call(self, bucket: int, words: Sequence[str | int]) -> asyncio.Future[int] | None:
        """Write, and renew this bucket's lease; None where Redis is away."""
        keys = self._buckets[bucket]
        try:
            return self._redis.run(
                self._write,
                (keys.on + self._node, keys.nodes),
                (self._node, self._lease, *words),
            )
        except Unavailable:
            return None

    def _look(
        self, bucket: int, users: Sequence[UserKey], others: int, call: asyncio.Future[int]
    ) -> None:
        if call.cancelled() or call.exception() is not None:
            self._keep(bucket, users)
        elif others and not call.result():
            # What Redis had of the others is gone; now that it has these, no renewal would notice.
            self._lost.add(bucket)

    def _keep(self, bucket: int, users: Iterable[UserKey]) -> None:
        if self._all_anew:
            return
        self._unwritten.update(dict.fromkeys(users, bucket))
        if len(self._unwritten) > MAX_UNWRITTEN:
            # Who went is not told one by one: whatever Redis has of this node is removed.
            self._unwritten.clear()
            self._all_anew = True

    async def renew(self) -> None:
        """Renew the lease of all that is written, and write what is not. Raises Unavailable."""
        if self._all_anew:
            # Who comes or goes from here on is written after that.
            self._all_anew = False
            try:
                await self._remove()
            except Unavailable:
                self._all_anew = True
                raise
            self._lost.update(range(len(self._buckets)))
        mine = [bucket for bucket, users in enumerate(self._users_in) if users]
        calls = {bucket: self._call(bucket, ()) for bucket in mine}
        away = False
        for bucket, call in calls.items():
            if call is None:
                away = True
                continue
            try:
                if await call == 0:
                    self._lost.add(bucket)
            except Unavailable:
                away = True
        lost, self._lost = self._lost, set()
        if lost:
            for user in self._users():
                bucket = bucket_of(member(*user))
                if bucket in lost:
                    self._unwritten[user] = bucket
        unwritten, self._unwritten = self._unwritten, {}
        await self._write_late(unwritten)
        if away or self._unwritten or self._all_anew:
            raise Unavailable(
                "Redis does not know which users are connected to this node.", retry_after=1
            )

    async def _write_late(self, users: dict[UserKey, int]) -> None:
        await settle(self._write_users(users))
        if written := [user for user in users if user not in self._unwritten]:
            self._on_late(written)

    async def leave(self) -> None:
        """Nobody is here any more. Raises Unavailable."""
        await self._remove()

    async def _remove(self) -> None:
        """Redis has nobody of this node. Raises Unavailable."""
        for bucket in self._buckets:
            self._redis.command("DEL", bucket.on + self._node).add_done_callback(retrieve)
            last = self._redis.command("ZREM", bucket.nodes, self._node)
            last.add_done_callback(retrieve)
        await last

    # --- asking ---

    def find(self, tenant: str, users: Sequence[str], done: Callable[[Found | None], None]) -> None:
        """Look up users on all nodes, this one too. `done` is called once, None where Redis did not
        answer for all of them: when its last answer is read, so that what is found in order is
        told in order."""
        by_bucket: defaultdict[int, list[str]] = defaultdict(list)
        for user in users:
            by_bucket[bucket_of(member(tenant, user))].append(user)
        chunks = [
            (bucket, some[start : start + USERS_PER_CALL])
            for bucket, some in by_bucket.items()
            for start in range(0, len(some), USERS_PER_CALL)
        ]
        search = _Search(len(chunks), done)
        for bucket, some in chunks:
            keys = self._buckets[bucket]
            names = [member(tenant, user) for user in some]
            try:
                call = self._redis.run(
                    self._find, (keys.nodes,), (keys.on, *names), partial(search.found, some)
                )
            except Unavailable:
                search.failed()
            else:
                call.add_done_callback(search.ended)

    async def count(self, tenant: str) -> int:
        """Users of a tenant with a connection anywhere, each once. Raises Unavailable."""
        prefix = member(tenant, "")
        calls = [
            self._redis.run(self._count, (bucket.nodes,), (bucket.on, prefix))
            for bucket in self._buckets
        ]
        return sum(await asyncio.gather(*calls))

    async def count_all(self) -> dict[str, int]:
        """As `count`, of each tenant that has any. Raises Unavailable."""
        calls: list[asyncio.Future[list[Any]]] = [
            self._redis.run(self._count_all, (bucket.nodes,), (bucket.on,))
            for bucket in self._buckets
        ]
        counts: Counter[str] = Counter()
        for answer in await asyncio.gather(*calls):
            for place in range(0, len(answer), 2):
                # A tenant's id has nothing in it that is encoded in a key.
                counts[answer[place].decode()] += int(answer[place + 1])
        return counts


class _Search:
    """Several calls that are one question."""

    __slots__ = ("_complete", "_done", "_found", "_missing")

    def __init__(self, calls: int, done: Callable[[Found | None], None]) -> None:
        self._missing = calls
        self._done = done
        self._found: Found = {}
        self._complete = True
        if not calls:
            done(self._found)

    def found(self, users: Sequence[str], answer: list[Any]) -> None:
        """What one call found."""
        for place in range(0, len(answer), 2):
            node = answer[place].decode()
            for user, connections in zip(users, answer[place + 1], strict=True):
                if connections is not None:
                    self._found.setdefault(user, {})[node] = int(connections)
        self._count_down()

    def ended(self, call: asyncio.Future[None]) -> None:
        """One call has ended; where well, `found` was told."""
        if call.cancelled() or call.exception() is not None:
            self.failed()

    def failed(self) -> None:
        """One call has no answer."""
        self._complete = False
        self._count_down()

    def _count_down(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._done(self._found if self._complete else None)


async def settle(calls: Sequence[asyncio.Future[int]]) -> None:
    """Wait until all are answered, or none will come."""
    if calls:
        await asyncio.wait(calls)
