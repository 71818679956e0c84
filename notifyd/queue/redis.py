"""User logs, the ledger, templates, idempotency keys and what is kept of tenants, in Redis.

Every step that must be whole is one script (lua/), and calls of one turn of the event loop go out
together, awaited or not. Times are Redis's own, so that all nodes agree; a `clock` stands in for it
in tests. Everything raises Unavailable, at once or when awaited, where Redis cannot answer.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.resources import files
from typing import Any, Literal

import msgspec
import structlog

from notifyd.errors import Conflict, NotFound, RateLimited, Unavailable, ValidationError
from notifyd.idempotency import MAX_WAITERS, Fresh, KeptAnswer, Replay, Scope, Wait
from notifyd.log import RateLimitedLog
from notifyd.notification import Notification, Priority
from notifyd.queue.base import (
    AckReport,
    AckStats,
    Confirmation,
    Entry,
    Overflow,
    Page,
    Rejection,
    entry_bytes,
)
from notifyd.queue.codec import CorruptEntry, decode_entry, encode_entry
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from notifyd.redis_client import Redis, Script, Word
from notifyd.templates import MAX_TEMPLATES, Template
from notifyd.tenants import MAX_TENANTS, Counts, Figures, Kept, LimitChanges, too_many

GRACE_SECONDS = 7 * 86_400
"""How long a log's keys outlive its entries, for a sweep that counts them off."""

REST_SECONDS = 86_400
"""How long an empty log remembers its offsets."""

CORRUPT_SECONDS = 7 * 86_400
CORRUPT_PER_BUCKET = 100
LEDGER_RETENTION_SECONDS = 3600
LEDGER_GRACE_SECONDS = 86_400
"""How long the ledger's keys outlive what it keeps, for a sweep that counts it off."""

ACK_TIME_SAMPLES = 1024
USERS_PER_CALL = 200
RECIPIENTS_PER_CALL = 1000
SWEPT_PER_CALL = 500
TENANTS_PER_CALL = 500
DAY_COUNTS_SECONDS = 3 * 86_400
MONTH_COUNTS_SECONDS = 40 * 86_400
LEASE_SECONDS = 60.0
"""How long a call may work under an idempotency key before another may."""

FIRST_LOOK_SECONDS = 0.02
LONGEST_LOOK_SECONDS = 0.5

Clock = Callable[[], float]


def _script(name: str, *before: str) -> Script:
    folder = files("notifyd.queue") / "lua"
    sources = [(folder / f"{each}.lua").read_bytes() for each in (*before, name)]
    return Script(name, b"\n".join(sources))


def _milliseconds(clock: Clock | None) -> Word:
    """The time to give to a script: none, it asks Redis."""
    return "" if clock is None else int(clock() * 1000)


def _microseconds(clock: Clock | None) -> Word:
    return "" if clock is None else int(clock() * 1_000_000)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """For a call whose failure changes nothing; the client has logged it."""
    if not future.cancelled():
        future.exception()


class _CorruptLog:
    """Counts what cannot be read, and logs it, once a minute for each reason."""

    def __init__(self, on_corrupt: Callable[[str], None]) -> None:
        self._on_corrupt = on_corrupt
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))

    def tell(self, what: str, reason: str, error: Exception) -> None:
        self._on_corrupt(reason)
        self._log.warning(what, reason=reason, error=str(error))


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
            own = error
            if isinstance(error, Unavailable):
                own = Unavailable(error.message, retry_after=error.retry_after)
                own.__cause__ = error.__cause__
            future.set_exception(own)


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


# --- user logs ------------------------------------------------------------------------------------


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
        self._corrupt = _CorruptLog(on_corrupt)
        self._clock = clock
        self._expired_uncounted = 0
        self._enqueuing: dict[int, _Gathered] = {}
        self._enqueue = _script("enqueue", "log")
        self._read = _script("read", "log")
        self._settle = _script("settle", "log")
        self._erase = _script("erase", "log")
        self._expire = _script("expire", "log")
        self._due = _script("due", "log")
        self._recount = _script("recount")
        self._set_aside = _script("set_aside", "log")

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
            _milliseconds(self._clock),
            self._max_size_per_user,
            self._ttl,
            self._grace,
            *gathered.words,
        )
        try:
            answer = self._redis.run(self._enqueue, gathered.keys, args, self._enqueued)
        except Unavailable as error:
            _fail(gathered.waiting, error)
            return
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
        args = (_milliseconds(self._clock), after, max_bytes, name, self._rest)
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
                self._corrupt.tell("an entry of a queue cannot be read", error.reason, error)
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
        future.add_done_callback(_retrieve)

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
                args = (_milliseconds(self._clock), USERS_PER_CALL)
                keys = (bucket.depth, bucket.due)
                lost, names = await self._redis.run(self._due, keys, args)
                vanished |= bool(lost)
                more = len(names) == USERS_PER_CALL
                calls = [
                    self._redis.run(
                        self._expire,
                        bucket.with_user(name),
                        (_milliseconds(self._clock), name, self._rest),
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


# --- the ledger -----------------------------------------------------------------------------------

_STATES: Mapping[str, Literal["queued", "pending", "expired"]] = {
    "q": "queued",
    "p": "pending",
    "x": "expired",
}


class RedisAckLedger:
    """`AckLedger` in Redis.

    Bounded by `max_pending` recipients over all notifications: the oldest notification is let go of
    first, and every one an hour after it was sent. `on_acknowledged` is told how long each ack
    took (seconds), `on_expired` how many recipients did not confirm in time.
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        timeout_seconds: float,
        max_pending: int,
        on_acknowledged: Callable[[float], None],
        on_expired: Callable[[int], None],
        clock: Clock | None = None,
    ) -> None:
        self._redis = redis
        self._keys = keys.ledger
        self._timeout = int(timeout_seconds * 1_000_000)
        # Nobody is let go of before he is late.
        self._retention = max(LEDGER_RETENTION_SECONDS, int(timeout_seconds))
        self._keep = (self._retention + LEDGER_GRACE_SECONDS) * 1000
        self._max_pending = max_pending
        self._on_acknowledged = on_acknowledged
        self._on_expired = on_expired
        self._clock = clock
        self._expecting: list[Word] = []
        self._expected: asyncio.Future[None]
        self._expect = _script("expect", "ledger")
        self._confirm = _script("confirm", "ledger")
        self._sweep = _script("sweep", "ledger")

    def expect(
        self, tenant: str, notification_id: str, recipients: Sequence[str], *, queued: bool = False
    ) -> Awaitable[None]:
        """See `AckLedger.expect`."""
        kind = "queued" if queued else "sent"
        name = member(tenant, notification_id)
        for start in range(0, len(recipients), RECIPIENTS_PER_CALL):
            expected = self._expect_some(
                name, kind, recipients[start : start + RECIPIENTS_PER_CALL]
            )
        return expected if recipients else self._expect_some(name, kind, ())

    def expect_each(self, tenant: str, sent: Sequence[tuple[str, str]]) -> Awaitable[None]:
        """See `AckLedger.expect_each`."""
        expected: asyncio.Future[None] | None = None
        for id, user_id in sent:
            expected = self._expect_some(member(tenant, id), "sent", (user_id,))
        return _nothing() if expected is None else expected

    def _expect_some(self, name: str, kind: str, recipients: Sequence[str]) -> asyncio.Future[None]:
        """All that one turn of the loop expects is one call, whose future all of them share."""
        expecting = self._expecting
        if expecting and len(expecting) + len(recipients) > RECIPIENTS_PER_CALL:
            self._send_expected()
            expecting = self._expecting
        if not expecting:
            self._expected = asyncio.get_running_loop().create_future()
            # Of several parts of one call only the last is waited for.
            self._expected.add_done_callback(_retrieve)
            self._redis.gather(self._send_expected)
        expecting += (kind, name, len(recipients))
        expecting += [f"u{user_id}" for user_id in recipients]
        return self._expected

    def _send_expected(self) -> None:
        """Send what this turn expects; before anything else that is about it."""
        if not self._expecting:
            return
        expected, self._expecting = self._expecting, []
        keys, future = self._keys, self._expected
        try:
            answer = self._redis.run(
                self._expect,
                (keys.stats, keys.order, keys.due),
                (
                    _microseconds(self._clock),
                    self._timeout,
                    self._keep,
                    self._max_pending,
                    keys.record,
                    keys.pending,
                    *expected,
                ),
                self._count_expired,
            )
        except Unavailable as error:
            future.set_exception(error)
            return
        answer.add_done_callback(partial(_hand_on, future))

    def _count_expired(self, count: int) -> None:
        if count:
            self._on_expired(count)

    def expect_anyone(self, tenant: str, notification_id: str) -> Awaitable[None]:
        """See `AckLedger.expect_anyone`."""
        return self._expect_some(member(tenant, notification_id), "anyone", ())

    def acknowledge(
        self, tenant: str, user_id: str, ids: Sequence[str]
    ) -> Awaitable[frozenset[str]]:
        """See `AckLedger.acknowledge`."""

        def known(answer: list[int]) -> frozenset[str]:
            for took in answer:
                if took >= 0:
                    self._on_acknowledged(took / 1_000_000)
            return frozenset([id for id, took in zip(ids, answer, strict=True) if took != -2])

        return self._confirmed(tenant, user_id, ids, "a", known)

    def confirm(self, tenant: str, user_id: str, ids: Sequence[str]) -> Awaitable[None]:
        """See `AckLedger.confirm`."""
        return self._confirmed(tenant, user_id, ids, "t", lambda answer: None)

    def _confirmed(
        self,
        tenant: str,
        user_id: str,
        ids: Sequence[str],
        how: Literal["a", "t"],
        convert: Callable[[list[int]], Any],
    ) -> asyncio.Future[Any]:
        self._send_expected()
        keys = [self._keys.stats, self._keys.times]
        for id in ids:
            name = member(tenant, id)
            keys += (self._keys.record + name, self._keys.pending + name)
        args = (
            _microseconds(self._clock),
            how,
            f"u{user_id}",
            ACK_TIME_SAMPLES,
            self._keep,
        )
        return self._redis.run(self._confirm, keys, args, convert)

    def report(self, tenant: str, notification_id: str) -> Awaitable[AckReport | None]:
        """See `AckLedger.report`."""
        self._send_expected()
        key = self._keys.record + member(tenant, notification_id)
        return self._redis.command("HGETALL", key, convert=partial(_report, notification_id))

    async def expire(self) -> int:
        """See `AckLedger.expire`. Cancelled, it has done a part; of several nodes that do it, each
        counts its own.
        """
        self._send_expected()
        keys = self._keys
        total = 0
        more = True
        while more:
            args = (
                _microseconds(self._clock),
                self._timeout,
                self._retention * 1_000_000,
                SWEPT_PER_CALL,
                keys.record,
                keys.pending,
            )
            count, more = await self._redis.run(
                self._sweep, (keys.stats, keys.order, keys.due), args
            )
            self._count_expired(count)
            total += count
        return total

    async def stats(self) -> AckStats:
        """See `AckLedger.stats`."""
        self._send_expected()
        names = ("pending", "acknowledged", "expired", "total")
        figures, times = await asyncio.gather(
            self._redis.command("HMGET", self._keys.stats, *names),
            self._redis.command("LRANGE", self._keys.times, 0, ACK_TIME_SAMPLES - 1),
        )
        pending, acknowledged, expired, total = (int(each or 0) for each in figures)
        recent = sorted(int(each) for each in times)
        return AckStats(
            pending=max(0, pending),
            acknowledged=acknowledged,
            expired=expired,
            average_ms=total / acknowledged / 1000 if acknowledged else None,
            p95_ms=recent[int(len(recent) * 0.95)] / 1000 if recent else None,
        )


async def _nothing() -> None:
    """Of nobody is anything expected."""


def _hand_on(waiting: asyncio.Future[None], answer: asyncio.Future[Any]) -> None:
    if waiting.done():
        return
    if answer.cancelled():
        waiting.cancel()
    elif (error := answer.exception()) is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(None)


def _report(notification_id: str, answer: list[bytes]) -> AckReport | None:
    fields = dict(zip(answer[::2], answer[1::2], strict=True))
    sent_at = fields.pop(b"s", None)
    if sent_at is None:
        return None
    acks = int(fields.pop(b"n", 0))
    recipients = [_confirmation(name[1:].decode(), state) for name, state in fields.items()]
    return AckReport(notification_id, int(sent_at) / 1_000_000, recipients, acks)


def _confirmation(user_id: str, state: bytes) -> Confirmation:
    how, at = state[:1].decode(), state[1:]
    if how in _STATES:
        return Confirmation(user_id, _STATES[how])
    by: Literal["ack", "transport"] = "ack" if how == "a" else "transport"
    return Confirmation(user_id, "confirmed", int(at) / 1_000_000, by)


# --- templates ------------------------------------------------------------------------------------


class _StoredTemplate(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    v: int
    id: str
    name: str
    event: str
    payload: msgspec.Raw
    updated: float
    priority: Priority = Priority.NORMAL
    ttl: int | None = None


TEMPLATE_VERSION = 1

_encode_template = msgspec.json.Encoder().encode
_decode_template = msgspec.json.Decoder(_StoredTemplate).decode


class RedisTemplates:
    """`TemplateStore` in Redis, one hash for a tenant. They are configuration: the one thing here
    without an expiry."""

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        on_corrupt: Callable[[str], None],
        max_per_tenant: int = MAX_TEMPLATES,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._corrupt = _CorruptLog(on_corrupt)
        self._max_per_tenant = max_per_tenant
        self._change = _script("template")

    def get(self, tenant: str, id: str) -> Awaitable[Template]:
        """Raises NotFound."""
        key = self._keys.templates(tenant)

        def found(answer: list[bytes | None]) -> Template:
            body, created = answer
            template = None if body is None else self._decoded(id, body, created)
            if template is None:
                raise NotFound("There is no template with this id.")
            return template

        return self._redis.command("HMGET", key, f"t{id}", f"c{id}", convert=found)

    def list(self, tenant: str) -> Awaitable[Sequence[Template]]:
        """All of a tenant's templates, by id; without those that cannot be read."""

        def found(answer: list[bytes]) -> Sequence[Template]:
            fields = dict(zip(answer[::2], answer[1::2], strict=True))
            templates = [
                self._decoded(name[1:].decode(), body, fields.get(b"c" + name[1:]))
                for name, body in fields.items()
                if name.startswith(b"t")
            ]
            present = [each for each in templates if each is not None]
            return sorted(present, key=lambda template: template.id)

        return self._redis.command("HGETALL", self._keys.templates(tenant), convert=found)

    def _decoded(self, id: str, body: bytes, created: bytes | None) -> Template | None:
        try:
            stored = _decode_template(body)
            if stored.v != TEMPLATE_VERSION or stored.id != id:
                raise ValueError("another version, or another template")
            template = Template(
                id,
                stored.name,
                stored.event,
                stored.payload,
                stored.priority,
                stored.ttl,
                float(created or stored.updated),
                stored.updated,
            )
            template.parts  # noqa: B018  # compiled now, so that one that cannot be is found here
        except (msgspec.MsgspecError, ValueError, ValidationError) as error:
            self._corrupt.tell("a template cannot be read", "template", error)
            return None
        return template

    def create(self, tenant: str, template: Template) -> Awaitable[Template]:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may."""

        def created(answer: bytes) -> Template:
            if answer == b"taken":
                raise Conflict(f"There is a template '{template.id}' already.", field="id")
            if answer == b"full":
                raise Conflict(f"There are {self._max_per_tenant} templates already, the maximum.")
            return template

        return self._put("create", tenant, template, created)

    def replace(self, tenant: str, template: Template) -> Awaitable[Template]:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound."""

        def replaced(answer: bytes) -> Template:
            if answer == b"missing":
                raise NotFound("There is no template with this id.")
            return msgspec.structs.replace(template, created_at=float(answer))

        return self._put("replace", tenant, template, replaced)

    def _put(
        self,
        what: str,
        tenant: str,
        template: Template,
        convert: Callable[[bytes], Template],
    ) -> asyncio.Future[Template]:
        body = _encode_template(
            _StoredTemplate(
                TEMPLATE_VERSION,
                template.id,
                template.name,
                template.event_type,
                template.payload_template,
                template.updated_at,
                template.priority,
                template.ttl,
            )
        )
        args = (what, template.id, body, repr(template.created_at), self._max_per_tenant)
        return self._redis.run(self._change, (self._keys.templates(tenant),), args, convert)

    def delete(self, tenant: str, id: str) -> Awaitable[None]:
        """Raises NotFound."""

        def deleted(answer: bytes) -> None:
            if answer == b"missing":
                raise NotFound("There is no template with this id.")

        return self._redis.run(
            self._change, (self._keys.templates(tenant),), ("delete", id), deleted
        )


# --- idempotency keys -----------------------------------------------------------------------------


class _Leased(Fresh):
    """A claim on a key in Redis; `holder` tells it from one that another was given since."""

    __slots__ = ("fingerprint", "holder")

    def __init__(
        self, keys: RedisIdempotencyKeys, scope: Scope, fingerprint: bytes, holder: str
    ) -> None:
        super().__init__(keys, scope)
        self.fingerprint = fingerprint
        self.holder = holder


class RedisIdempotencyKeys:
    """`IdempotencyKeys` in Redis, each for `window_seconds`.

    A key at work is leased: a node that dies frees it after `LEASE_SECONDS`. Who waits is woken by
    his own node, and looks by himself for what others do.
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        window_seconds: float,
        clock: Clock | None = None,
        max_waiters: int = MAX_WAITERS,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._window = int(window_seconds * 1000)
        self._clock = clock
        self._max_waiters = max_waiters
        self._waiting: dict[Scope, list[asyncio.Event]] = {}
        self._claim = _script("claim")
        self._answer = _script("answer")

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Awaitable[Fresh | Replay | Wait]:
        """Who works on this key. Raises ValidationError where its body was another one."""
        holder = secrets.token_hex(8)

        def claimed(answer: list[bytes]) -> Fresh | Replay | Wait:
            if len(answer) == 2:
                return Replay(KeptAnswer(int(answer[0]), answer[1]))
            if answer[0] == b"fresh":
                return _Leased(self, scope, fingerprint, holder)
            if answer[0] == b"wait":
                return Wait(self, scope, fingerprint)
            raise ValidationError(
                "This idempotency key was used for another body.",
                field="idempotency_key",
                constraint="one body for each key",
            )

        args = (
            _milliseconds(self._clock),
            fingerprint,
            holder,
            int(LEASE_SECONDS * 1000),
            int(alone),
        )
        return self._redis.run(self._claim, (self._keys.idempotency(scope),), args, claimed)

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says."""
        waiting = self._waiting.setdefault(scope, [])
        if len(waiting) >= self._max_waiters:
            raise RateLimited(
                "Too many calls wait for the answer of one idempotency key.", retry_after=1
            )
        woken = asyncio.Event()
        waiting.append(woken)
        pause = FIRST_LOOK_SECONDS
        try:
            while True:
                claim = await self.claim(scope, fingerprint)
                if not isinstance(claim, Wait):
                    return claim
                try:
                    async with asyncio.timeout(pause):
                        await woken.wait()
                except TimeoutError:
                    pause = min(pause * 2, LONGEST_LOOK_SECONDS)
                woken.clear()
        finally:
            waiting.remove(woken)
            if not waiting:
                self._waiting.pop(scope, None)

    def keep(self, claim: Fresh, answer: KeptAnswer) -> Awaitable[None]:
        """What `Fresh.complete` says, of an answer that is kept."""
        return self._end(claim, answer.status, answer.body)

    def release(self, claim: Fresh) -> Awaitable[None]:
        """What `Fresh.abandon` says."""
        return self._end(claim)

    def _end(self, claim: Fresh, *answer: Word) -> asyncio.Future[None]:
        assert isinstance(claim, _Leased)  # noqa: S101  # for the type checker: we gave it out
        args = (
            _milliseconds(self._clock),
            claim.holder,
            claim.fingerprint,
            self._window,
            *answer,
        )
        key = self._keys.idempotency(claim.scope)
        return self._redis.run(self._answer, (key,), args, partial(self._ended, claim.scope))

    def _ended(self, scope: Scope, answer: int) -> None:
        for woken in self._waiting.get(scope, ()):
            woken.set()

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it, or else its lease runs out."""
        try:
            self._end(claim).add_done_callback(_retrieve)
        except (Unavailable, RuntimeError):
            return  # Redis is away, or the event loop is: the lease runs out.


# --- tenants --------------------------------------------------------------------------------------

_encode_limits = msgspec.json.Encoder().encode
_decode_limits = msgspec.json.Decoder(LimitChanges).decode


class RedisTenants:
    """`TenantStore` in Redis. Limits are configuration, and do not expire; limits that cannot be
    read are told to `on_corrupt`, and are as if they had not been set."""

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        *,
        on_corrupt: Callable[[str], None],
        max_tenants: int = MAX_TENANTS,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._corrupt = _CorruptLog(on_corrupt)
        self._max_tenants = max_tenants
        self._limits = _script("limits")
        self._counts = _script("counts")

    async def read(self, known: int | None) -> Kept | None:
        """See `TenantStore.read`. Raises Unavailable."""
        key = self._keys.tenant_limits
        if known is not None and int(await self._redis.command("HGET", key, "") or 0) == known:
            return None
        answer: list[bytes] = await self._redis.command("HGETALL", key)
        fields = dict(zip(answer[::2], answer[1::2], strict=True))
        version = int(fields.pop(b"", 0))
        limits = {name.decode(): self._decoded(body) for name, body in fields.items()}
        return Kept(version, {name: each for name, each in limits.items() if each is not None})

    def _decoded(self, body: bytes) -> LimitChanges | None:
        try:
            return _decode_limits(body)
        except msgspec.MsgspecError as error:
            self._corrupt.tell("a tenant's limits cannot be read", "limits", error)
            return None

    def put(self, tenant: str, limits: LimitChanges) -> Awaitable[None]:
        """See `TenantStore.put`. Raises Unavailable."""

        def done(answer: bytes) -> None:
            if answer == b"full":
                raise too_many(self._max_tenants)

        version = 1 + secrets.randbits(62)
        args = (tenant, _encode_limits(limits), self._max_tenants, version)
        return self._redis.run(self._limits, (self._keys.tenant_limits,), args, done)

    async def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        """See `TenantStore.add`. Raises Unavailable; then a part may have been added."""
        keys = self._periods(day)
        rows = [(name, each.notifications, each.deliveries) for name, each in counts.items()]
        for first in range(0, len(rows), TENANTS_PER_CALL):
            some = [word for row in rows[first : first + TENANTS_PER_CALL] for word in row]
            args = (DAY_COUNTS_SECONDS, MONTH_COUNTS_SECONDS, *some)
            await self._redis.run(self._counts, keys, args)

    def _periods(self, day: date) -> tuple[str, str]:
        text = day.isoformat()
        return self._keys.tenant_counts(text), self._keys.tenant_counts(text[:7])

    async def figures(self, day: date, tenant: str | None = None) -> Mapping[str, Figures]:
        """See `TenantStore.figures`. Raises Unavailable."""
        asked = [self._period(key, tenant) for key in self._periods(day)]
        today, month = [await each for each in asked]
        return {name: Figures(today.get(name, Counts()), counts) for name, counts in month.items()}

    def _period(self, key: str, tenant: str | None) -> asyncio.Future[dict[str, Counts]]:
        if tenant is not None:
            names = (f"{tenant}|n", f"{tenant}|d")
            return self._redis.command(
                "HMGET",
                key,
                *names,
                convert=lambda answer: _counts(zip(names, answer, strict=True)),
            )
        return self._redis.command(
            "HGETALL",
            key,
            convert=lambda answer: _counts(
                (name.decode(), count)
                for name, count in zip(answer[::2], answer[1::2], strict=True)
            ),
        )


def _counts(fields: Iterable[tuple[str, bytes | None]]) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    for field, count in fields:
        if count is not None:
            name, _, what = field.partition("|")
            added = Counts(int(count), 0) if what == "n" else Counts(0, int(count))
            counts[name] = counts.get(name, Counts()) + added
    return counts
