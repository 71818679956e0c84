"""What a returning user gets before anything live: his log, and what his other connections hold.

Pages of the log are read by cursor and written one at a time, each when the one before has drained;
what is live meanwhile waits in the outbox, behind them. Nothing is taken out of the log here: an
entry is settled when it is confirmed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from notifyd import wire
from notifyd.connections.connection import Connection, Held, State
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.dispatch.targets import admits
from notifyd.eventually import Eventually, is_awaitable, rescue, settled
from notifyd.metrics import Metrics
from notifyd.notification import Notification
from notifyd.queue.base import AckLedger, Overflow, Page, UserLogs

STORE_SECONDS = 1.0
"""A connecting user waits no longer for the store; what is live comes to him without it."""

PATIENT_SECONDS = 10.0
"""Where nothing live waits behind it, a page may take so long."""

SLOW_SECONDS = 0.25
"""A store that takes so long for a page is slow: who waits for his turn to read waits no longer
than for the store itself. Else the turn comes, and the wait is this server's own."""

READERS = 8
"""So many pages are asked for and written at a time: a thousand users who return at once must not
keep the event loop for longer than these take."""

LOOKS = 8
"""So often a log that something comes to is looked at again, before what others hold is sent."""

_UNAVAILABLE = Page(())


class _Readers:
    """Lets at most `READERS` read at a time, the others in order of arrival."""

    def __init__(self) -> None:
        self._free = READERS
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._slow = False

    def enter_at_once(self) -> bool:
        """Whether one may read now; `leave` must follow then."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def enter(self, *, patient: bool) -> bool:
        """Wait until one may read, and `leave` must follow; False where the store stopped to answer
        those before, or, for one who is not patient, where it is too slow. Cancelled, one is out.
        """
        if self.enter_at_once():
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not (patient or turn.done()):
                await asyncio.wait({turn}, timeout=STORE_SECONDS)
                if self._slow and not turn.done():
                    turn.cancel()
                    return False
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                # The turn came, and the cancellation before this task ran again.
                self.leave(answered=True)
            turn.cancel()
            raise

    def leave(self, *, answered: bool, seconds: float = 0.0) -> None:
        """Let the next one read; nobody, where the store did not answer. `seconds`: what the store
        took for it."""
        self._slow = seconds > SLOW_SECONDS
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(answered)
                if answered:
                    return
        self._free += 1


async def _within(seconds: float, page: Awaitable[Page]) -> Page:
    try:
        async with asyncio.timeout(seconds):
            return await page
    except TimeoutError:
        return _UNAVAILABLE


class Replayer:
    """Replays to connections, in pages of at most `page_bytes`.

    `spawn` starts a task that is cancelled at shutdown. `logs` or `ledger` is None where it is
    switched off.
    """

    def __init__(
        self,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        writes: StoreWrites,
        confirmations: Confirmations,
        metrics: Metrics,
        *,
        page_bytes: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._logs = logs
        self._ledger = ledger
        self._writes = writes
        self._confirmations = confirmations
        self._metrics = metrics
        self._page_bytes = page_bytes
        # A log reckons 256 bytes for all but the payload; long texts take far more, and too much of
        # it at once would close the connection, whenever it comes. What is over is read again, so
        # that a little more is written.
        self._most_bytes = page_bytes + page_bytes // 2
        self._spawn = spawn
        self._again: dict[Connection, bool] = {}
        self._without_store: dict[Connection, None] = {}
        self._told: dict[Connection, Overflow] = {}
        self._readers = _Readers()

    def start(self, connection: Connection, known: Awaitable[None] | None = None) -> None:
        """Replay before anything live. What fits into one page of a store that answers at once is
        written without a task. `known`: done when the other nodes can find the user here, which
        comes before his log is read."""
        if known is not None:
            self._hold(connection)
            self._spawn(self._replay_known(connection, known))
            return
        first = self._read(connection, 0) if self._readers.enter_at_once() else None
        if first is None or is_awaitable(first):
            self._hold(connection)
            self._spawn(self._replay(connection, first, 0))
            return
        self._readers.leave(answered=first is not _UNAVAILABLE)
        if self._is_nothing(connection, first):
            return
        # Before anything is written, which may close a device that reads too slowly, and have what
        # it held return to this very log.
        self._hold(connection)
        cursor, already = self._send_page(connection, first)
        if cursor is None:
            others, all_sent = self._send_others(connection)
            already += others
            if all_sent and not self._again[connection]:
                self._finish(connection, already)
                return
        self._spawn(self._replay(connection, Page((), cursor), already))

    def _hold(self, connection: Connection) -> None:
        """What is live waits for the replay that begins here."""
        connection.outbox.hold_back()
        self._begin(connection)

    def _is_nothing(self, connection: Connection, page: Page) -> bool:
        """Whether this page of his log is all there is to replay to a user, and is empty: nearly
        always, where few are away."""
        identity = connection.identity
        return (
            not page.entries
            and page.cursor is None
            and page.overflow is None
            and page is not _UNAVAILABLE
            and self._confirmations.is_alone(connection)
            and not self._writes.has_homeless(identity.tenant, identity.user_id)
        )

    def again(self, connection: Connection, *, before_live: bool = False) -> None:
        """Something went to the log of a user who is connected: replay it to him, marked.

        `before_live`: it was sent to him before what is live from now on, which waits behind it.
        """
        if connection.state is not State.OPEN or self._logs is None:
            return
        if before_live:
            connection.outbox.hold_back()
        if connection in self._again:
            self._again[connection] = True
            return
        self._begin(connection)
        self._again[connection] = True
        self._spawn(self._replay_again(connection))

    def _begin(self, connection: Connection) -> None:
        self._again[connection] = False
        self._confirmations.replay_begins(connection)

    def _end(self, connection: Connection) -> None:
        self._confirmations.replay_ends(connection)
        del self._again[connection]

    def _read(
        self, connection: Connection, after: int, *, patient: bool = False
    ) -> Eventually[Page]:
        """A page of the log, within STORE_SECONDS or, `patient`, PATIENT_SECONDS; cancelling what
        is awaited gives the read up."""
        if self._logs is None:
            return Page(())
        identity = connection.identity
        logs = self._logs
        page = rescue(
            lambda: logs.read(
                identity.tenant, identity.user_id, after=after, max_bytes=self._page_bytes
            ),
            lambda error: _UNAVAILABLE,
        )
        if not is_awaitable(page):
            return page
        return _within(PATIENT_SECONDS if patient else STORE_SECONDS, page)

    async def _replay_known(self, connection: Connection, known: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(STORE_SECONDS):
                await asyncio.shield(known)
        except TimeoutError:
            # Redis hangs. What others put into the log meanwhile is looked for when it is back.
            self._do_without_store(connection)
        await self._replay(connection, None, 0)

    def store_is_back(self) -> None:
        """Replay to those who connected, or were in the middle of it, while the store was away; who
        cannot be replayed to yet goes on waiting, and is not told so again."""
        for connection in tuple(self._without_store):
            self.again(connection)

    def forget(self, connection: Connection) -> None:
        """The connection ended."""
        self._without_store.pop(connection, None)
        self._told.pop(connection, None)

    def _do_without_store(self, connection: Connection) -> None:
        """Say that something may be missing; it comes, marked, when the store is back."""
        if connection.state is State.OPEN and connection not in self._without_store:
            self._without_store[connection] = None
            self._tell_unavailable(connection)

    def _tell_unavailable(self, connection: Connection) -> None:
        if connection.state is State.OPEN:
            stream = f"user:{connection.identity.user_id}"
            connection.reply(wire.gap_message(stream, "queue_unavailable"))

    async def _replay(
        self, connection: Connection, first: Eventually[Page] | None, already: int
    ) -> None:
        try:
            replayed = already + await self._send_pages(connection, first)
            all_sent = False
            looks = LOOKS
            while not all_sent and connection.state is State.OPEN:
                await connection.outbox.drained()
                replayed += await self._send_what_was_on_its_way(connection)
                identity = connection.identity
                await self._writes.forget_confirmed((identity.tenant, identity.user_id))
                if looks and self._may_lack_something(connection):
                    # It was sent before what others hold.
                    looks -= 1
                    if self._again[connection]:
                        self._again[connection] = False
                        replayed += await self._send_pages(connection, None)
                    continue
                others, all_sent = self._send_others(connection)
                replayed += others
            if self._again[connection]:
                self._again[connection] = False
                replayed += await self._send_pages(connection, None)
            self._tell_caught_up(connection, replayed)
            await self._send_what_came_meanwhile(connection)
        except Exception:
            self._tell_unavailable(connection)
            raise
        finally:
            # Also after a fault of ours: what is live must not wait for ever.
            self._let_go(connection)
            self._end(connection)
        self._confirmations.ask_replayed(connection)
        self._ask_patiently(connection)

    def _may_lack_something(self, connection: Connection) -> bool:
        """Whether something came to the log since it was read, or is on its way there."""
        if connection in self._without_store:
            return False
        identity = connection.identity
        on_its_way = self._writes.on_its_way(identity.tenant, identity.user_id)
        return self._again[connection] or on_its_way is not None

    async def _send_what_was_on_its_way(self, connection: Connection) -> int:
        """What was handed back and is being stored may be in no page yet, and nobody holds it any
        more; how many of it were sent. It was sent before what others hold."""
        identity = connection.identity
        storing = self._writes.on_its_way(identity.tenant, identity.user_id)
        if storing is None or connection in self._without_store:
            return 0
        await asyncio.wait({storing}, timeout=STORE_SECONDS)
        if not storing.done():
            self._do_without_store(connection)
            return 0
        self._again[connection] = False
        return await self._send_pages(connection, None)

    def _ask_patiently(self, connection: Connection) -> None:
        """The store that was done without may only be slow, and nothing live waits for it now."""
        if connection in self._without_store:
            self.again(connection)

    async def _replay_again(self, connection: Connection) -> None:
        was_patient = not connection.outbox.holds_back
        try:
            await self._send_what_came_meanwhile(connection)
        except Exception:
            self._tell_unavailable(connection)
            raise
        finally:
            self._let_go(connection)
            self._end(connection)
        self._confirmations.ask_replayed(connection)
        if not was_patient:
            self._ask_patiently(connection)

    async def _send_what_came_meanwhile(self, connection: Connection) -> None:
        """Read the log until nothing came to it since it was read last. For a user who is sent more
        all the time that may take long: what is live is let go bit by bit."""
        while self._again[connection] and connection.state is State.OPEN:
            self._again[connection] = False
            # What waits already was sent behind what this read brings, but maybe before what comes
            # to the log while it is under way.
            waiting = connection.outbox.held_back
            await self._send_pages(connection, None)
            connection.outbox.let_first_go(waiting)

    async def _send_pages(self, connection: Connection, first: Eventually[Page] | None) -> int:
        """Send a page and all that follow it, from the beginning where there is none yet; how many
        notifications were sent. `first` has its reader where it must be awaited. While something
        live waits behind it, a store that is too slow is done without."""
        replayed = 0
        cursor: int | None = 0
        if first is None:
            pass
        elif is_awaitable(first):
            cursor, replayed = await self._read_and_send(connection, first)
        else:
            cursor = first.cursor
        while cursor is not None:
            if cursor:
                await connection.outbox.drained()
            if connection.state is not State.OPEN:
                break
            patient = not connection.outbox.holds_back
            if await self._readers.enter(patient=patient):
                page = self._read(connection, cursor, patient=patient)
                cursor, sent = await self._read_and_send(connection, page)
                replayed += sent
            else:
                self._send_page(connection, _UNAVAILABLE)
                cursor = None
        return replayed

    async def _read_and_send(
        self, connection: Connection, awaited: Eventually[Page]
    ) -> tuple[int | None, int]:
        """Where the next page starts, and how many notifications this one brought."""
        page = _UNAVAILABLE
        loop = asyncio.get_running_loop()
        began = loop.time()
        seconds = 0.0
        try:
            page = await settled(awaited)
            seconds = loop.time() - began
            # While it is this one's turn, so that few pages are written in one of the loop.
            return self._send_page(connection, page)
        finally:
            self._readers.leave(answered=page is not _UNAVAILABLE, seconds=seconds)

    def _send_page(self, connection: Connection, page: Page) -> tuple[int | None, int]:
        """Where the next page starts, and how many notifications were sent of this one."""
        if page is _UNAVAILABLE:
            self._do_without_store(connection)
            return None, 0
        if page.overflow is not None:
            self._tell_overflow(connection, page.overflow)
        known = connection.unconfirmed
        cursor = page.cursor
        notifications: list[Notification] = []
        written: list[bytes] = []
        size = 0
        last = 0
        for entry in page.entries:
            if known is not None and entry.notification.id in known:
                # Confirmed, it is to be settled in the log as well.
                connection.held_alone(entry.notification.id).in_log = True
            elif self._wanted(connection, entry.notification):
                data = self._as_written(connection, entry.notification)
                size += len(data)
                if notifications and size > self._most_bytes:
                    cursor = last
                    break
                notifications.append(entry.notification)
                written.append(data)
                last = entry.offset
        if cursor is None:
            self._without_store.pop(connection, None)
        if not notifications or not connection.outbox.put_ahead(b"".join(written)):
            return cursor, 0
        for notification in notifications:
            self._confirmations.hold_stored(notification, connection)
        self._metrics.queue_replayed_total.inc(len(notifications))
        if self._ledger is not None:
            identity = connection.identity
            ids = [notification.id for notification in notifications]
            self._writes.note(self._ledger.resent, identity.tenant, identity.user_id, ids)
        return cursor, len(notifications)

    def _tell_overflow(self, connection: Connection, overflow: Overflow) -> None:
        """Say what a full log gave up; the log tells it until a connection that was told confirms
        something behind it, and each is told once."""
        if connection.state is not State.OPEN or self._told.get(connection) == overflow:
            return
        self._told[connection] = overflow
        connection.was_told_gap()
        stream = f"user:{connection.identity.user_id}"
        connection.reply(wire.gap_message(stream, "queue_overflow", overflow.first, overflow.last))

    def _send_others(self, connection: Connection) -> tuple[int, bool]:
        """Up to a page of what the user's other connections hold, so that a half-open one withholds
        nothing, and of what waits for a store that is away; how many, and whether that was all."""
        homeless, all_sent = self._send_homeless(connection)
        page: list[Held] = []
        written: list[bytes] = []
        size = 0
        for held in self._confirmations.held_by_others(connection):
            if not self._wanted(connection, held.notification):
                continue
            data = self._as_written(connection, held.notification)
            size += len(data)
            if page and size > self._page_bytes:
                all_sent = False
                break
            page.append(held)
            written.append(data)
        if not page or not connection.outbox.put_ahead(b"".join(written)):
            return homeless, all_sent
        for held in page:
            self._confirmations.share(held, connection)
        return homeless + len(page), all_sent

    def _send_homeless(self, connection: Connection) -> tuple[int, bool]:
        """Up to a page of it; how many, and whether that was all."""
        identity = connection.identity
        page: list[Notification] = []
        written: list[bytes] = []
        size = 0
        all_sent = True
        for notification in self._writes.homeless(identity.tenant, identity.user_id):
            if not self._wanted(connection, notification):
                continue
            data = self._as_written(connection, notification)
            size += len(data)
            if page and size > self._page_bytes:
                all_sent = False
                break
            page.append(notification)
            written.append(data)
        if not page or not connection.outbox.put_ahead(b"".join(written)):
            return 0, True
        for notification in page:
            self._writes.taken(identity.tenant, identity.user_id, notification.id)
            self._confirmations.hold_homeless(notification, connection)
        return len(page), all_sent

    def _wanted(self, connection: Connection, notification: Notification) -> bool:
        """Not what it has already, nor what its audience or its sender keeps from it."""
        known = connection.unconfirmed
        if known is not None and notification.id in known:
            return False
        left_out = connection.left_out
        if left_out is not None and notification.id in left_out:
            return False
        left = connection.left_to_log
        if left is not None and notification.id in left:
            return False
        identity = connection.identity
        if self._confirmations.was_confirmed(identity.tenant, identity.user_id, notification.id):
            # Another node put it into the log without knowing that.
            self._writes.settle(identity.tenant, identity.user_id, (notification.id,))
            return False
        if self._writes.is_unsettled(identity.tenant, identity.user_id, notification.id):
            return False
        if self._confirmations.was_settled(connection, notification.id):
            return False
        return admits(notification.audience, connection)

    @staticmethod
    def _as_written(connection: Connection, notification: Notification) -> bytes:
        """A page of these is one write: it counts once against the outbox's bound in messages."""
        message = wire.notification_message(notification, replayed=True)
        return message.websocket if connection.transport == "websocket" else message.sse

    def _finish(self, connection: Connection, replayed: int) -> None:
        self._tell_caught_up(connection, replayed)
        self._let_go(connection)
        self._end(connection)
        self._confirmations.ask_replayed(connection)

    def _tell_caught_up(self, connection: Connection, replayed: int) -> None:
        if replayed and connection.state is State.OPEN:
            connection.reply(wire.message("caught_up", replayed=replayed))

    def _let_go(self, connection: Connection) -> None:
        if connection.state is State.OPEN:
            connection.outbox.let_go()
