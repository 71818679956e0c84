"""Notifications from a Redis stream, which loses none: read by the holder of the lease, in order,
and acknowledged when they were dispatched.

    XADD notifications MAXLEN ~ 100000 * data '{"type":"user","target":"42","event":{…}}'

Each cluster is a consumer group and sees every entry once: what a node read and did not acknowledge
before it died, the next holder takes over. A notification's id follows from its entry's, so that
what is dispatched twice then is stored once, and it names its entry, so that nodes that have given
it to somebody do not do so again. While a store is away an entry waits, and those behind it; what
fails five times for another reason, or can never be read, goes to the dead letters.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import structlog

from notifyd.cluster.lease import Lease
from notifyd.dispatch.redis_trigger import BadMessages, Intake, Ready, Said, unavailable
from notifyd.errors import BadRequest, NotifydError, Unavailable
from notifyd.eventually import Eventually, retrieve, settled
from notifyd.log import RateLimitedLog
from notifyd.metrics import Metrics
from notifyd.notification import Receipt, Target
from notifyd.queue.base import AckLedger
from notifyd.redis_client import Redis, Script, Word
from notifyd.resilience import Backoff

SOURCE = "redis_stream"
FIELD = b"data"

MAX_DELIVERIES = 5
"""Dispatched so often and still failing, an entry goes to the dead letters."""

OFTEN = 3
"""Delivered so often, an entry is taken over alone."""

MAX_DEAD = 10_000
CLOSE_SECONDS = 2.0
MAX_BATCH = 500
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""What was read at once is over this, and less is read next time."""

PER_TURN = 100
TURN_SECONDS = 0.003
"""Entries dispatched in one turn of the event loop, and how long that may take. After so many those
that are done are acknowledged."""

MAX_FIELDS = 1000
"""Of an entry, in its dead letter: what a script can hand on at once is bounded."""

ACKNOWLEDGE_SECONDS = 0.05
"""How long an entry that is done may wait for others before it is acknowledged."""

CONSUMER = "holder"
"""One name for all nodes: who reads is who holds the lease, and none is left behind in Redis."""

BLOCK_SECONDS = 0.5
TAKE_OVER_SECONDS = 2.0
"""How often, while the lease is held, and after how much idleness, entries are taken over that came
to a former holder after he had lost it."""

_LUA = files("notifyd.dispatch") / "lua"
_NOTHING_SAID = Said()
_EARLIEST = 1_000_000_000_000
_AHEAD = 60_000


class _Entry:
    """An entry and what becomes of it.

    `attempts` counts how often it was dispatched and failed; `left` are those among its recipients
    who are to be tried again, None where all are; `problem` says why it is a dead letter. One that
    was `taken_over` may have been dispatched to some by another.
    """

    __slots__ = (
        "attempts",
        "data",
        "fields",
        "forgiven",
        "id",
        "left",
        "problem",
        "taken_over",
    )

    def __init__(
        self, id: bytes, deliveries: int, fields: Sequence[bytes], *, taken_over: bool = False
    ) -> None:
        self.id = id
        self.attempts = deliveries - 1
        self.fields = fields
        self.data = _data(fields)
        self.forgiven = False
        self.left: tuple[str, ...] | None = None
        self.problem: str | None = None
        self.taken_over = taken_over


def _new_entries(answer: list[list[Any]] | None) -> list[_Entry]:
    return [_Entry(id, 1, fields) for id, fields in answer[0][1]] if answer else []


def _data(fields: Sequence[bytes]) -> bytes | None:
    if len(fields) == 2:
        return fields[1] if fields[0] == FIELD else None
    return dict(zip(fields[::2], fields[1::2], strict=False)).get(FIELD)


class RedisStream:
    """Reads one stream, from `start` to `aclose`.

    `ledger` is None where it is switched off. `reader` is a connection for calls that block: its
    answers may take `BLOCK_SECONDS` more than those of `redis`, which everything else is told by.
    `group` is the same on all nodes of a cluster. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        redis: Redis,
        reader: Redis,
        intake: Intake,
        metrics: Metrics,
        bad: BadMessages,
        ledger: AckLedger | None,
        *,
        key: str,
        group: str,
        lease: Lease,
        clock: Callable[[], float] = time.time,
        backoff: Backoff | None = None,
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._intake = intake
        self._metrics = metrics
        self._bad = bad
        self._ledger = ledger
        self._key = key
        self._dead = f"{key}:dead"
        self._group = group
        self._lease = lease
        self._clock = clock
        self._backoff = backoff or Backoff(0.1, 5.0)
        self._log = structlog.get_logger("notifyd")
        self._away = RateLimitedLog(self._log)
        self._make_group = Script.read(_LUA / "group.lua")
        self._take_over = Script.read(_LUA / "take_over.lua")
        self._bury = Script.read(_LUA / "bury.lua")
        self._count = MAX_BATCH
        # Dispatched, and Redis did not answer that it knows.
        self._unacknowledged: set[bytes] = set()
        self._busy = False
        self._running: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[list[_Entry]] | None = None
        self._stopping = False

    # --- its life ---

    def start(self) -> None:
        """Begin to read, whenever the lease is held."""
        self._running = asyncio.ensure_future(self._run())

    async def aclose(self) -> None:
        """Finish what was read, two seconds at most, and close the connection."""
        self._stopping = True
        running = self._running
        if running is not None:
            if self._reading is not None:
                self._reading.cancel()
            if self._busy:
                await asyncio.wait([running], timeout=CLOSE_SECONDS)
            running.cancel()
            await asyncio.wait([running])
        await self._reader.aclose(0)

    async def _run(self) -> None:
        while not self._stopping:
            await self._lease.acquired()
            try:
                await self._read_while_held()
                continue
            except Unavailable as error:
                self._away.warning(
                    "reading the notification stream is paused", reason=_reason(error)
                )
            except Exception:  # noqa: BLE001  # logged; what is not acknowledged comes again
                self._log.exception("reading the notification stream failed")
            await asyncio.sleep(self._backoff.next())

    def _may_work(self) -> bool:
        return self._lease.held and not self._stopping

    # --- reading ---

    async def _read_while_held(self) -> None:
        await self._reader.run(self._make_group, [self._key], [self._group])
        await self._take_over_all(0.0)
        # Whatever was ours was acknowledged now, or another holder has it.
        self._unacknowledged.clear()
        self._backoff.reset()
        loop = asyncio.get_running_loop()
        look_at = loop.time() + TAKE_OVER_SECONDS
        try:
            while self._may_work():
                if self._reading is None:
                    # Nothing is read ahead now, so that none of it is taken over from ourselves.
                    if loop.time() >= look_at:
                        await self._take_over_all(TAKE_OVER_SECONDS)
                        look_at = loop.time() + TAKE_OVER_SECONDS
                        continue
                    self._reading = self._read()
                await asyncio.wait([self._reading])
                reading, self._reading = self._reading, None
                entries = [] if reading.cancelled() else reading.result()
                if entries:
                    # Who wakes up from a stall may have lost the lease in it: what it read now
                    # would be found by the next holder only behind what came later.
                    if loop.time() < look_at and self._may_work():
                        self._reading = self._read()
                    await self._work(entries)
        finally:
            if self._reading is not None:
                # What comes all the same, a later look finds.
                self._reading.cancel()
                self._reading = None

    def _read(self) -> asyncio.Future[list[_Entry]]:
        """What is new, or nothing after a while without any."""
        reading = self._reader.command(
            *("XREADGROUP", "GROUP", self._group, CONSUMER),
            *("COUNT", self._count, "BLOCK", int(BLOCK_SECONDS * 1000)),
            *("STREAMS", self._key, ">"),
            convert=_new_entries,
        )
        reading.add_done_callback(retrieve)
        return reading

    async def _take_over_all(self, idle: float) -> None:
        """Whatever was read and not acknowledged, by whomever."""
        while self._may_work():
            answer: list[list[Any]] = await self._reader.run(
                self._take_over,
                [self._key],
                [self._group, CONSUMER, int(idle * 1000), self._count, OFTEN],
            )
            if not answer:
                return
            entries = [_Entry(*each, taken_over=True) for each in answer if each[2] is not None]
            if len(entries) < len(answer):
                self._away.warning(
                    "entries were trimmed off the stream before they were dispatched",
                    reason="trimmed",
                )
            await self._work(entries)

    # --- dispatching ---

    async def _work(self, entries: Sequence[_Entry]) -> None:
        """Dispatch these, again and again those that a store would not take, and acknowledge.

        Returns early where the lease is lost: what is left, its next holder takes over.
        """
        self._busy = True
        try:
            self._fit_count(entries)
            done = [entry for entry in entries if entry.id in self._unacknowledged]
            waiting = [entry for entry in entries if entry.id not in self._unacknowledged]
            pauses = Backoff(0.1, 5.0)
            while True:
                left = await self._dispatch(waiting, done)
                await self._acknowledge(done)
                if not left or not self._may_work():
                    return
                await self._forgive(left)
                waiting = left
                await asyncio.sleep(pauses.next())
        finally:
            self._busy = False

    async def _dispatch(self, entries: Sequence[_Entry], done: list[_Entry]) -> list[_Entry]:
        """Dispatch in order; what is left over, in order too.

        What is done is acknowledged as it goes, so that another holder would find little of it;
        where that fails, it is in `done` afterwards.
        """
        pending: dict[_Entry, asyncio.Future[Receipt]] = {}
        left: set[_Entry] = set()
        for start in range(0, len(entries), PER_TURN):
            until = time.monotonic() + TURN_SECONDS
            # Those that must wait for something wait together.
            ready = [(entry, self._prepared(entry)) for entry in entries[start : start + PER_TURN]]
            for entry, prepared in ready:
                if not self._may_work():
                    left.add(entry)
                    if isinstance(prepared, asyncio.Future):
                        prepared.cancel()
                    continue
                try:
                    checked = await self._checked(prepared)
                    if checked is not None and checked.waits:
                        # For one before it, of which it must be known whether it stays.
                        await self._look_at_all(pending, done, left)
                        if left:
                            left.add(entry)
                            await self._intake.give_up(checked)
                            continue
                    receipt = None if checked is None else await self._send(entry, checked)
                except Exception as error:  # noqa: BLE001  # one entry's, which is told
                    again = self._fails(entry, error)
                else:
                    if receipt is not None and not isinstance(receipt, Receipt):
                        pending[entry] = asyncio.ensure_future(receipt)
                        continue
                    again = receipt is not None and self._stays(entry, receipt)
                if again:
                    left.add(entry)
                else:
                    done.append(entry)
                if time.monotonic() >= until:
                    await asyncio.sleep(0)
                    until = time.monotonic() + TURN_SECONDS
            self._look_at(pending, done, left)
            await self._acknowledge_some(done)
        await self._look_at_all(pending, done, left)
        return [entry for entry in entries if entry in left]

    async def _look_at_all(
        self,
        pending: dict[_Entry, asyncio.Future[Receipt]],
        done: list[_Entry],
        left: set[_Entry],
    ) -> None:
        """`_look_at` until nothing is pending."""
        while pending:
            await asyncio.wait(pending.values(), timeout=ACKNOWLEDGE_SECONDS)
            self._look_at(pending, done, left)
            if pending:
                await self._acknowledge_some(done)

    def _look_at(
        self,
        pending: dict[_Entry, asyncio.Future[Receipt]],
        done: list[_Entry],
        left: set[_Entry],
    ) -> None:
        """Sort out those among the pending of which it is known by now what became of them."""
        for entry in [entry for entry, receipt in pending.items() if receipt.done()]:
            receipt = pending.pop(entry)
            error = receipt.exception()
            if error is not None:
                again = self._fails(entry, error)
            else:
                again = self._stays(entry, receipt.result())
            if again:
                left.add(entry)
            else:
                done.append(entry)

    def _prepared(self, entry: _Entry) -> Ready | asyncio.Future[Ready | None] | NotifydError:
        """The entry as a notification, now or once it is known; or why it is none."""
        if entry.data is None:
            return BadRequest("The entry has no field data.")
        if entry.attempts >= MAX_DELIVERIES:
            entry.problem = f"Dispatching it failed {MAX_DELIVERIES} times, or ended its node."
            return BadRequest(entry.problem)
        try:
            ready = self._intake.prepare(
                entry.data,
                _NOTHING_SAID,
                entry=_uuid_of(self._key, entry.id),
                at=self._added_at(entry.id),
            )
        except NotifydError as error:
            return error
        if isinstance(ready, Ready):
            return ready
        later: Eventually[Ready | None] = ready
        return asyncio.ensure_future(settled(later))

    @staticmethod
    async def _checked(
        prepared: Ready | asyncio.Future[Ready | None] | NotifydError,
    ) -> Ready | None:
        """What was prepared; None where it came before."""
        if isinstance(prepared, NotifydError):
            raise prepared
        return prepared if isinstance(prepared, Ready) else await prepared

    async def _send(self, entry: _Entry, ready: Ready) -> Eventually[Receipt] | None:
        """Dispatch; None where it was dispatched before, by its id or idempotency key."""
        if ready.claims and not await self._intake.first(ready):
            return None
        if entry.left is not None:
            ready.target = Target(ready.target.type, entry.left)
        elif (entry.attempts or entry.taken_over) and not await self._anybody_left(ready):
            await self._intake.finish(ready)
            return None
        return self._intake.send(ready)

    async def _anybody_left(self, ready: Ready) -> bool:
        """Leave out of what was dispatched before who has confirmed it, on whatever node; False
        where that is everybody."""
        target = ready.target
        if self._ledger is None or target.type not in ("user", "users"):
            return True
        report = await settled(self._ledger.report(ready.tenant, ready.notification.id))
        if report is None:
            return True
        confirmed = {each.user_id for each in report.recipients if each.state == "confirmed"}
        left = tuple(name for name in target.names if name not in confirmed)
        ready.target = Target(target.type, left)
        return bool(left)

    def _stays(self, entry: _Entry, receipt: Receipt) -> bool:
        """Whether there are recipients whose store was away; the others have it."""
        left = unavailable(receipt)
        if left:
            entry.left = left
        return bool(left)

    def _fails(self, entry: _Entry, error: BaseException) -> bool:
        """Whether an entry that failed is to be tried again."""
        if isinstance(error, Unavailable):
            return True
        if isinstance(error, NotifydError):
            if entry.problem is None:
                entry.problem = error.message
                self._bad.tell(error, stream=self._key, entry=entry.id)
            return False
        self._log.error("an entry of the stream failed", entry=entry.id, exc_info=error)
        entry.attempts += 1
        entry.forgiven = True  # its failures are its own
        if entry.attempts < MAX_DELIVERIES:
            return True
        entry.problem = f"Dispatching it failed {MAX_DELIVERIES} times: {type(error).__name__}."
        return False

    # --- telling Redis ---

    async def _acknowledge(self, done: list[_Entry]) -> None:
        """Tell Redis that these are done, and empty the list. Raises Unavailable, and it will be
        told again."""
        dead = [entry for entry in done if entry.problem is not None]
        alive = [entry.id for entry in done if entry.problem is None]
        self._unacknowledged.update(alive)
        if dead:
            buried: list[int] = await asyncio.gather(*map(self._bury_one, dead))
            self._metrics.redis_dead_letters_total.inc(sum(buried))
        if alive:
            await self._redis.command("XACK", self._key, self._group, *alive)
            self._unacknowledged.difference_update(alive)
        done.clear()

    async def _acknowledge_some(self, done: list[_Entry]) -> None:
        """`_acknowledge` in the middle of a batch, whose end is soon enough where Redis is away."""
        try:
            await self._acknowledge(done)
        except Unavailable as error:
            self._away.warning("the stream of notifications waits", reason=_reason(error))
        # Where there was nothing to tell, others have their turn too.
        await asyncio.sleep(0)

    def _bury_one(self, entry: _Entry) -> asyncio.Future[int]:
        """Acknowledge it, and keep it as a dead letter; 0 where that was done before."""
        fields: Sequence[bytes] = entry.fields
        if sum(map(len, fields)) > MAX_BATCH_BYTES or len(fields) > 2 * MAX_FIELDS:
            fields = ()  # it stays in the stream itself
        problem = entry.problem or ""
        args: list[Word] = [self._group, entry.id, MAX_DEAD, problem, entry.attempts, *fields]
        return self._redis.run(self._bury, (self._key, self._dead), args)

    async def _forgive(self, entries: Sequence[_Entry]) -> None:
        """That a store is away is not held against those that waited for it."""
        innocent = [entry for entry in entries if not entry.forgiven]
        for attempts in {entry.attempts for entry in innocent}:
            ids = [entry.id for entry in innocent if entry.attempts == attempts]
            words: list[Word] = ["XCLAIM", self._key, self._group, CONSUMER, 0]
            await self._redis.command(*words, *ids, "RETRYCOUNT", attempts, "JUSTID")
        for entry in innocent:
            entry.forgiven = True

    # --- what an entry says ---

    def _added_at(self, id: bytes) -> float | None:
        """When the entry was added, in Unix seconds; None where its id does not say."""
        milliseconds = int(id.partition(b"-")[0])
        if _EARLIEST <= milliseconds <= self._clock() * 1000 + _AHEAD:
            return milliseconds / 1000
        return None  # the producer's own id

    def _fit_count(self, entries: Sequence[_Entry]) -> None:
        size = sum(len(entry.data or b"") for entry in entries)
        if size > MAX_BATCH_BYTES:
            self._count = max(1, self._count // 4)
        elif size < MAX_BATCH_BYTES // 16:
            self._count = min(MAX_BATCH, self._count * 2)


def _uuid_of(key: str, entry: bytes) -> str:
    """A UUID that follows from the entry's id (RFC 9562, version 8)."""
    text = hashlib.blake2b(b"%s\0%s" % (key.encode(), entry), digest_size=16).hexdigest()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-8{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


def _reason(error: Unavailable) -> str:
    return str(error.__cause__ or error).rstrip(".")
