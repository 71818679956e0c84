"""The ledger of acknowledgements in Redis."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from notifyd.errors import Unavailable
from notifyd.eventually import retrieve
from notifyd.queue.base import AckReport, AckStats, Confirmation
from notifyd.queue.redis.scripts import Clock, load_script, microseconds
from notifyd.queue.redis_keys import RedisKeys, member
from notifyd.redis_client import Redis, Word

LEDGER_RETENTION_SECONDS = 3600
LEDGER_GRACE_SECONDS = 86_400
"""How long the ledger's keys outlive what it keeps, for a sweep that counts it off."""

ACK_TIME_SAMPLES = 1024
RECIPIENTS_PER_CALL = 1000
RESENT_SECONDS = 0.5
"""So long after it was replayed, what was not confirmed is noted as sent: as a rule it is confirmed
before, and one note does."""

PAGES_PER_TURN = 10
SWEPT_PER_CALL = 500

_STATES: Mapping[str, Literal["queued", "pending", "expired"]] = {
    "q": "queued",
    "p": "pending",
    "x": "expired",
}


class _Resent(msgspec.Struct, gc=False):
    """What was sent again to a user at once; `due` is when it is noted (the loop's time), and
    `noted` is done then."""

    due: float
    user_id: str
    names: list[str]
    noted: asyncio.Future[None]


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
        resent_seconds: float = RESENT_SECONDS,
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
        # What was sent again and is not noted yet: to whom, by the notification, and when; and the
        # pages that it came in.
        self._resent: dict[str, dict[str, float]] = {}
        self._pages: deque[_Resent] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._resent_seconds = resent_seconds
        self._expect = load_script("expect", "ledger", "expecting")
        self._confirm = load_script("confirm", "ledger", "expecting")
        self._sweep = load_script("sweep", "ledger")

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

    def resent(self, tenant: str, user_id: str, ids: Sequence[str]) -> Awaitable[None]:
        """See `AckLedger.resent`. What is confirmed within `resent_seconds` is noted with that."""
        loop = asyncio.get_running_loop()
        names = [member(tenant, id) for id in ids]
        now = self._seconds()
        for name in names:
            self._resent.setdefault(name, {})[user_id] = now
        page = _Resent(loop.time() + self._resent_seconds, user_id, names, loop.create_future())
        page.noted.add_done_callback(retrieve)
        self._pages.append(page)
        if self._timer is None:
            self._timer = loop.call_at(page.due, self._expect_due)
        return page.noted

    def _seconds(self) -> float:
        clock = self._clock
        return asyncio.get_running_loop().time() if clock is None else clock()

    def _expect_due(self) -> None:
        """Expect what was sent again and is not confirmed by now, not all of it in one turn."""
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for _ in range(PAGES_PER_TURN):
            if not self._pages or self._pages[0].due > now:
                break
            self._expect_page(self._pages.popleft())
        if self._pages:
            self._timer = loop.call_at(self._pages[0].due, self._expect_due)

    def _expect_page(self, page: _Resent) -> None:
        expected: asyncio.Future[None] | None = None
        for name in page.names:
            if page.user_id in self._resent.get(name, ()):
                expected = self._expect_resent(name)
        if expected is not None:
            expected.add_done_callback(partial(_hand_on, page.noted))
        elif not page.noted.done():
            page.noted.set_result(None)

    def _expect_resent(self, name: str) -> asyncio.Future[None] | None:
        """Expect what `resent` left for later of one notification."""
        expected: asyncio.Future[None] | None = None
        for user_id in self._resent.pop(name, ()):
            expected = self._expect_some(name, "sent", (user_id,))
        return expected

    def note_resent(self, tenant: str, ids: Sequence[str]) -> None:
        """See `AckLedger.note_resent`."""
        if self._resent:
            for id in ids:
                self._expect_resent(member(tenant, id))

    async def aclose(self) -> None:
        """Send what is yet to be noted; Redis is still to be closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._pages:
            self._expect_page(self._pages.popleft())
        self._send_expected()

    def _expect_some(self, name: str, kind: str, recipients: Sequence[str]) -> asyncio.Future[None]:
        """All that one turn of the loop expects is one call, whose future all of them share."""
        if self._resent and name in self._resent:
            # In their order.
            self._expect_resent(name)
        expecting = self._expecting
        if expecting and len(expecting) + len(recipients) > RECIPIENTS_PER_CALL:
            self._send_expected()
            expecting = self._expecting
        if not expecting:
            self._expected = asyncio.get_running_loop().create_future()
            # Of several parts of one call only the last is waited for.
            self._expected.add_done_callback(retrieve)
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
                    microseconds(self._clock),
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
            future.set_exception(error.again())
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

        def known(answer: Sequence[int]) -> frozenset[str]:
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
        convert: Callable[[Sequence[int]], Any],
    ) -> asyncio.Future[Any]:
        self._send_expected()
        keys = self._keys
        words: list[Word] = [
            microseconds(self._clock),
            self._timeout,
            self._keep,
            self._max_pending,
            keys.record,
            keys.pending,
            how,
            f"u{user_id}",
            ACK_TIME_SAMPLES,
        ]
        resent, now = self._resent, self._seconds()
        noted = []
        for id in ids:
            name = member(tenant, id)
            sent_at = resent[name].get(user_id) if name in resent else None
            if sent_at is None:
                words += (name, "")
            else:
                words += (name, int((now - sent_at) * 1_000_000))
                noted.append(name)

        def confirmed(answer: list[int]) -> Any:
            self._count_expired(answer[0])
            return convert(answer[1:])

        answer = self._redis.run(
            self._confirm, (keys.stats, keys.order, keys.due, keys.times), words, confirmed
        )
        for name in noted:
            # A second time where an id is named twice.
            if (users := resent.get(name)) is not None:
                users.pop(user_id, None)
                if not users:
                    del resent[name]
        return answer

    def report(self, tenant: str, notification_id: str) -> Awaitable[AckReport | None]:
        """See `AckLedger.report`."""
        name = member(tenant, notification_id)
        self._expect_resent(name)
        self._send_expected()
        key = self._keys.record + name
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
                microseconds(self._clock),
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
    fields.pop(b"o", None)
    recipients = [_confirmation(name[1:].decode(), state) for name, state in fields.items()]
    return AckReport(notification_id, int(sent_at) / 1_000_000, recipients, acks)


def _confirmation(user_id: str, state: bytes) -> Confirmation:
    how, at = state[:1].decode(), state[1:]
    if how in _STATES:
        return Confirmation(user_id, _STATES[how])
    by: Literal["ack", "transport"] = "ack" if how == "a" else "transport"
    return Confirmation(user_id, "confirmed", int(at) / 1_000_000, by)
