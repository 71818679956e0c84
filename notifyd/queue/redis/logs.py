"""The users' logs in Redis."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from notifyd.errors import Unavailable
from notifyd.eventually import retrieve
from notifyd.notification import Notification
from notifyd.queue.base import Entry, Overflow, Page, Rejection, entry_bytes
from notifyd.queue.codec import CorruptEntry, decode_entry, encode_entry
from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.redis.scripts import Clock, load_script, milliseconds
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from notifyd.redis_client import Redis, Word

GRACE_SECONDS = 7 * 86_400
"""How long a log's keys outlive its entries, for a sweep that counts them off."""

REST_SECONDS = 86_400
"""How long an empty log remembers its offsets."""

CORRUPT_SECONDS = 7 * 86_400
CORRUPT_PER_BUCKET = 100
USERS_PER_CALL = 200
SWEPT_PER_CALL = 500

Waiting = Sequence[tuple["asyncio.Future[Sequence[Rejection | None]]", int]]


class _Gathered(msgspec.Struct, gc=False):
    """What one turn of the loop stores in a bucket, as its script takes it. `waiting` are those who
    asked for it, and for how many recipients."""

    keys: list[str]
    words: list[Word]
    waiting: list[tuple[asyncio.Future[Sequence[Rejection | None]], int]]
    recipients: int = 0


def _fail(waiting: Waiting, error: BaseException) -> None:
    for future, _ in waiting:
        if not future.done():
            # To each his own: raising one adds to its traceback.
            future.set_exception(error.again() if isinstance(error, Unavailable) else error)


def _share_out(waiting: Waiting, answer: asyncio.Future[Sequence[Rejection | None]]) -> None:
    if answer.cancelled():
        for future, _ in waiting:
            future.cancel()
        return
    if (error := answer.exception()) is not None:
        _fail(waiting, error)
        return
    rejections, start = answer.result(), 0
    for future, count in waiting:
        if not future.done():
            future.set_result(rejections[start : start + count])
        start += count


class RedisUserLogs:
    """`UserLogs` in Redis; bounded by `max_size_per_user`, and all together by Redis's memory.

    `on_dropped` is told each entry that a full log gives up, `on_corrupt` why an entry was set
    aside (see `codec`).
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        max_size_per_user: int,
        message_ttl_seconds: float,
        on_dropped: Callable[[], None],
        on_corrupt: Callable[[str], None],
        clock: Clock | None = None,
    ) -> None:
        self._redis = redis
        self._buckets = keys.buckets
        self._max_size_per_user = max_size_per_user
        self._ttl = int(message_ttl_seconds * 1000)
        self._grace = GRACE_SECONDS * 1000
        self._rest = REST_SECONDS * 1000
        self._on_dropped = on_dropped
        self._corrupt = CorruptLog(on_corrupt)
        self._clock = clock
        self._expired_uncounted = 0
        self._enqueuing: dict[int, _Gathered] = {}
        self._enqueue = load_script("enqueue", "log")
        self._read = load_script("read", "log")
        self._settle = load_script("settle", "log")
        self._erase = load_script("erase", "log")
        self._expire = load_script("expire", "log")
        self._due = load_script("due", "log")
        self._recount = load_script("recount")
        self._set_aside = load_script("set_aside", "log")

    def enqueue(
        self,
        tenant: str,
        recipients: Sequence[str],
        notification: Notification,
        *,
        owed: bool = False,
    ) -> Awaitable[Sequence[Rejection | None]]:
        """See `UserLogs.enqueue`. A notification that is pending already is not stored twice.

        With several recipients, those that Redis could not answer for are `unavailable`; raises
        Unavailable where that is all of them.
        """
        expires_at = notification.expires_at
        words: tuple[Word, ...] = (
            "" if expires_at is None else int(expires_at * 1000),
            notification.id,
            notification.priority.rank,
            b"%08d" % entry_bytes(notification) + encode_entry(notification),
            1 if owed else "",
        )
        if len(recipients) == 1:
            name = member(tenant, recipients[0])
            return self._enqueue_soon(bucket_of(name), words, (name,))
        groups: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        for place, user_id in enumerate(recipients):
            name = member(tenant, user_id)
            groups[bucket_of(name)].append((place, name))
        calls: list[tuple[list[int], asyncio.Future[Sequence[Rejection | None]]]] = []
        for number, users in groups.items():
            for start in range(0, len(users), USERS_PER_CALL):
                part = users[start : start + USERS_PER_CALL]
                future = self._enqueue_soon(number, words, [name for _, name in part])
                calls.append(([place for place, _ in part], future))
        return self._gather(len(recipients), calls)

    def _enqueue_soon(
        self, number: int, words: tuple[Word, ...], names: Sequence[str]
    ) -> asyncio.Future[Sequence[Rejection | None]]:
        """What one turn of the loop stores in a bucket is one call."""
        loop = asyncio.get_running_loop()
        gathered = self._enqueuing.get(number)
        if gathered is not None and gathered.recipients + len(names) > USERS_PER_CALL:
            self._send_enqueued(number)
            gathered = None
        bucket = self._buckets[number]
        if gathered is None:
            if not self._enqueuing:
                self._redis.gather(self._send_all_enqueued)
            gathered = self._enqueuing[number] = _Gathered([bucket.depth, bucket.due], [], [])
        for name in names:
            gathered.keys += bucket.of(name)
        gathered.words += (*words, len(names), *names)
        gathered.recipients += len(names)
        future: asyncio.Future[Sequence[Rejection | None]] = loop.create_future()
        gathered.waiting.append((future, len(names)))
        return future

    def _send_all_enqueued(self) -> None:
        for number in tuple(self._enqueuing):
            self._send_enqueued(number)

    def _send_enqueued(self, number: int) -> None:
        """Send what this turn stores in a bucket; before anything else that is about it."""
        gathered = self._enqueuing.pop(number, None)
        if gathered is None:
            return
        args = (
            milliseconds(self._clock),
            self._max_size_per_user,
            self._ttl,
            self._grace,
            *gathered.words,
        )
        own = None
        if len(gathered.waiting) == 1 and not gathered.waiting[0][0].done():
            # Nothing is to be shared out.
            own = gathered.waiting[0][0]
        try:
            answer = self._redis.run(self._enqueue, gathered.keys, args, self._enqueued, own)
        except Unavailable as error:
            _fail(gathered.waiting, error)
            return
        if own is None:
            answer.add_done_callback(partial(_share_out, gathered.waiting))

    @staticmethod
    async def _gather(
        count: int, calls: Sequence[tuple[list[int], asyncio.Future[Sequence[Rejection | None]]]]
    ) -> Sequence[Rejection | None]:
        rejections: list[Rejection | None] = ["unavailable"] * count
        failed: Unavailable | None = None
        answered = not calls
        if calls:
            await asyncio.wait([future for _, future in calls])
        for places, future in calls:
            try:
                answer = future.result()
            except Unavailable as error:
                failed = error
                continue
            answered = True
            for place, rejection in zip(places, answer, strict=True):
                rejections[place] = rejection
        if failed is not None and not answered:
            raise failed
        return rejections

    def _enqueued(self, answer: list[int]) -> Sequence[Rejection | None]:
        for _ in range(answer[0]):
            self._on_dropped()
        self._expired_uncounted += answer[1]
        return ["queue_full" if code == 2 else None for code in answer[2:]]

    def read(
        self, tenant: str, user_id: str, *, after: int = 0, max_bytes: int = 65536
    ) -> Awaitable[Page]:
        """See `UserLogs.read`. What cannot be read is set aside, and the page goes on without."""
        name = member(tenant, user_id)
        keys = self._keys_of(name)
        args = (milliseconds(self._clock), after, max_bytes, name, self._rest)
        return self._redis.run(self._read, keys, args, partial(self._page, name))

    def _page(self, name: str, answer: list[Any]) -> Page:
        expired, count, first, last, more = answer[:5]
        self._expired_uncounted += expired
        entries: list[Entry] = []
        corrupt: list[bytes] = []
        for place in range(5, len(answer), 3):
            offset, id, data = answer[place : place + 3]
            try:
                notification = decode_entry(data[21:])
                if notification.id.encode() != id:
                    raise CorruptEntry("shape", "it has another's id")
            except CorruptEntry as error:
                corrupt.append(id)
                self._corrupt.tell(
                    "an entry of a queue cannot be read and was set aside", error.reason, error
                )
            else:
                entries.append(Entry(offset, notification))
        if corrupt:
            self._put_aside(name, corrupt)
        return Page(
            entries,
            answer[-3] if more else None,
            Overflow(count, first, last) if count else None,
        )

    def _keys_of(self, name: str) -> tuple[str, str, str, str]:
        """The keys of a script on a user's log, behind what this turn stores there."""
        number = bucket_of(name)
        self._send_enqueued(number)
        return self._buckets[number].with_user(name)

    def _put_aside(self, name: str, ids: Sequence[bytes]) -> None:
        bucket = self._buckets[bucket_of(name)]
        keys = (*bucket.with_user(name), bucket.corrupt)
        args: tuple[Word, ...] = (
            name,
            self._rest,
            CORRUPT_SECONDS * 1000,
            CORRUPT_PER_BUCKET,
            *ids,
        )
        try:
            future = self._redis.run(self._set_aside, keys, args)
        except Unavailable:
            return  # The next read comes across them again.
        future.add_done_callback(retrieve)

    def settle(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> Awaitable[frozenset[str]]:
        """See `UserLogs.settle`."""
        name = member(tenant, user_id)
        keys = self._keys_of(name)

        def found(answer: list[int]) -> frozenset[str]:
            return frozenset([id for id, pending in zip(ids, answer, strict=True) if pending])

        args = (name, self._rest, 1 if heard else "", *ids)
        return self._redis.run(self._settle, keys, args, found)

    def erase(self, tenant: str, user_id: str) -> Awaitable[int]:
        """See `UserLogs.erase`."""
        name = member(tenant, user_id)
        keys = self._keys_of(name)
        return self._redis.run(self._erase, keys, (name, self._rest))

    async def expire(self) -> int:
        """See `UserLogs.expire`: a look at each bucket, and a call for each user with something
        expired. Cancelled, it has done a part; of several nodes that do it, each counts its own.
        """
        self._send_all_enqueued()
        expired, self._expired_uncounted = self._expired_uncounted, 0
        for bucket in self._buckets:
            vanished = False
            more = True
            while more:
                args = (milliseconds(self._clock), USERS_PER_CALL)
                keys = (bucket.depth, bucket.due)
                lost, names = await self._redis.run(self._due, keys, args)
                vanished |= bool(lost)
                more = len(names) == USERS_PER_CALL
                calls = [
                    self._redis.run(
                        self._expire,
                        bucket.with_user(name),
                        (milliseconds(self._clock), name, self._rest),
                    )
                    for name in (each.decode() for each in names)
                ]
                for dropped, gone in await asyncio.gather(*calls):
                    expired += dropped
                    vanished |= bool(gone)
            if vanished:
                await self._redis.run(
                    self._recount, keys, (bucket.order, 2 * (self._ttl + self._grace))
                )
        return expired

    async def depth(self) -> int:
        """See `UserLogs.depth`."""
        self._send_all_enqueued()
        calls = [self._redis.command("GET", bucket.depth) for bucket in self._buckets]
        return sum(max(0, int(pending or 0)) for pending in await asyncio.gather(*calls))
