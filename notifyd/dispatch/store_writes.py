"""Writes to the stores that no caller waits for, repeated until the store has them.

What a connection held when it ended goes back to its user's log, and what a Pong confirmed is
settled there, while nobody waits for the answer. Where the store is away, both stay here, bounded,
and are tried again; a user who connects meanwhile gets what waits for him.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol, TypeVar

from notifyd.cluster.router import Waiting
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually, is_awaitable, retrieve, settled
from notifyd.notification import Notification
from notifyd.queue.base import AckLedger, Rejection, UserLogs

T = TypeVar("T")
UserKey = tuple[str, str]

MAX_ON_THEIR_WAY = 5_000
"""So many notifications are on their way to a log at a time: of more at once, the last would be
late for no fault of the store's."""

RETRY_SECONDS = 0.1
"""At the end of the server, a store that is away is asked so often."""

USERS_PER_QUESTION = 100


class OnReturned(Protocol):
    """Told when something is in the log of a user who may be connected. `before_live`: he gets what
    is sent to him from now on behind it. `here`: his connections on this node may be without it as
    well as those on others."""

    def __call__(
        self, tenant: str, user_id: str, *, before_live: bool = False, here: bool = True
    ) -> None: ...


def _nobody_told(
    tenant: str, user_id: str, *, before_live: bool = False, here: bool = True
) -> None:
    """Where nobody can be connected."""


def _forget_frames(error: Unavailable) -> None:
    """What was awaited holds its error, and by its traceback who awaited it: thousands of such
    circles are a pause of the garbage collector."""
    error.__traceback__ = None


class StoreWrites:
    """Hands back to logs and settles in them. `logs` or `ledger` is None where it is switched off.

    At most `max_waiting` notifications wait for a store that is away; the oldest are given up first
    and told to `on_lost`. `on_returned` is told when something is in the log again,
    `on_unavailable(error)` when a note to the ledger is lost; `is_away` says whether the logs'
    store is known to be. `settle_confirmed(waiting)`, in a cluster, settles what of it was
    confirmed on other nodes: a store that did not answer may have taken it all the same, and they
    have read it there.
    """

    settle_confirmed: Callable[[Waiting], Awaitable[None]] | None = None

    def __init__(
        self,
        logs: UserLogs | None,
        ledger: AckLedger | None,
        *,
        max_waiting: int,
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_lost: Callable[[Notification], None],
        on_unavailable: Callable[[Unavailable], None],
        is_away: Callable[[], bool] = lambda: False,
    ) -> None:
        self._logs = logs
        self._ledger = ledger
        self._max_waiting = max_waiting
        self._clock = clock
        self._spawn = spawn
        self._on_lost = on_lost
        self._on_unavailable = on_unavailable
        self._is_away = is_away
        self.on_returned: OnReturned = _nobody_told
        # What the store refused or did not answer for, or what waits for its turn, and what is on
        # its way there. Of one user, nothing sets out while something is on its way: where that
        # fails, what is behind it must not come before it.
        self._homeless: dict[UserKey, dict[str, Notification]] = {}
        self._storing: dict[UserKey, dict[str, Notification]] = {}
        self._storing_tasks: dict[UserKey, asyncio.Task[None]] = {}
        self._on_their_way = 0
        self._in_line: dict[UserKey, None] = {}
        # The last that waits to store something for them.
        self._behind: dict[UserKey, asyncio.Future[None]] = {}
        self._failures = 0
        self._unsettled: dict[UserKey, dict[str, None]] = {}
        self._settling: dict[UserKey, list[Sequence[str]]] = {}
        self._unsettled_ids = 0
        self._waiting = 0
        self._under_way: set[asyncio.Future[None]] = set()

    # --- what goes back to a log ---

    def give_back(
        self,
        tenant: str,
        user_id: str,
        notifications: Sequence[Notification],
        *,
        replay: bool = True,
    ) -> None:
        """Store these for a user, in order; those that nothing may keep are lost.

        `replay`: where he is connected to this node, he has not got them yet.
        """
        kept = []
        now = self._clock()
        for notification in notifications:
            if self._logs is None or not notification.storable or notification.is_over(now):
                self._on_lost(notification)
            else:
                kept.append(notification)
        if self._logs is None or not kept:
            return
        key = (tenant, user_id)
        if key in self._storing or self._on_their_way >= MAX_ON_THEIR_WAY:
            self._keep_homeless(key, kept)
            self._in_line[key] = None
            return
        # Behind what waits already, or it would come before it.
        waiting = self.take_homeless(tenant, user_id)
        self._store(self._logs, key, [*waiting, *kept], replay=replay or bool(waiting))

    def _store(
        self, logs: UserLogs, key: UserKey, notifications: Sequence[Notification], *, replay: bool
    ) -> None:
        tenant, user_id = key
        answers: list[Eventually[Sequence[Rejection | None]]] = []
        for notification in notifications:
            try:
                answers.append(logs.enqueue(tenant, (user_id,), notification, owed=True))
            except Unavailable:
                self._failures += 1
                break
        self._keep_homeless(key, notifications[len(answers) :])
        returned = False
        later = []
        for notification, answer in zip(notifications, answers, strict=False):
            if is_awaitable(answer):
                later.append((notification, answer))
            else:
                returned |= self._stored(key, notification, answer[0])
        if returned:
            self.on_returned(tenant, user_id, here=replay)
        if later:
            self._storing[key] = {notification.id: notification for notification, _ in later}
            self._on_their_way += len(later)
            self._storing_tasks[key] = self._watch(self._store_later(key, later, replay=replay))

    async def _store_later(
        self,
        key: UserKey,
        answers: Sequence[tuple[Notification, Awaitable[Sequence[Rejection | None]]]],
        *,
        replay: bool,
    ) -> None:
        returned = False
        failed: list[Notification] = []
        storing = self._storing[key]
        try:
            for notification, answer in answers:
                try:
                    rejections = await answer
                except Unavailable as error:
                    _forget_frames(error)
                    # It may have been stored all the same; storing it twice is storing it once.
                    if storing.pop(notification.id, None) is not None:
                        failed.append(notification)
                    self._failures += 1
                else:
                    storing.pop(notification.id, None)
                    returned |= self._stored(key, notification, rejections[0])
        finally:
            del self._storing[key], self._storing_tasks[key]
            self._on_their_way -= len(answers)
            # A fault of ours that ended it does not lose the rest.
            if left := [*failed, *storing.values()]:
                # Before what came behind it meanwhile; and `retry` asks first what became of it.
                self._keep_homeless(key, [*left, *self.take_homeless(*key)])
                self._in_line.pop(key, None)
            if returned:
                self.on_returned(*key, here=replay)
            self._let_the_next_go()

    def _let_the_next_go(self) -> None:
        """Store what waited for its turn, until that fails; then `retry` does."""
        failures = self._failures
        later = []
        while self._in_line and self._on_their_way < MAX_ON_THEIR_WAY:
            key = next(iter(self._in_line))
            del self._in_line[key]
            if key in self._storing:
                later.append(key)
            else:
                self._store_waiting(key)
            if self._failures != failures:
                break
        self._in_line.update(dict.fromkeys(later))

    def go_before(self, tenant: str, users: Sequence[str]) -> Sequence[asyncio.Future[None]]:
        """Something is about to be stored for these: what waits goes first, for it was sent before
        that. In a cluster, or while the store is away, only what waits for nothing but its turn: of
        what a store did not answer for, other nodes may know that it was confirmed, and `retry`
        asks them first.

        Returns what has to be done first, where something waits behind what is on its way, or
        somebody for that (`in_turn`).
        """
        if not (self._in_line or self._homeless or self._behind):
            return ()
        ahead: list[asyncio.Future[None]] = []
        for user_id in users:
            key = (tenant, user_id)
            if key in self._behind:
                ahead.append(self._behind[key])
            if key in self._storing:
                if key in self._in_line:
                    ahead.append(self._storing_tasks[key])
                continue
            if key in self._in_line:
                del self._in_line[key]
                self._store_waiting(key)
            elif key in self._homeless and self.settle_confirmed is None and not self._is_away():
                self._store_waiting(key)
        return ahead

    def in_turn(
        self, tenant: str, users: Sequence[str], work: Callable[[], Eventually[T]]
    ) -> Eventually[T]:
        """Do `work`, which stores for these, behind what was sent before (`go_before`), and before
        what is to be stored for them later."""
        ahead = self.go_before(tenant, users)
        return self._begin_behind(tenant, users, ahead, work) if ahead else work()

    def _begin_behind(
        self,
        tenant: str,
        users: Sequence[str],
        ahead: Sequence[asyncio.Future[None]],
        work: Callable[[], Eventually[T]],
    ) -> asyncio.Future[T]:
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        keys = [(tenant, user_id) for user_id in users]
        self._behind.update(dict.fromkeys(keys, begun))

        async def begin() -> T:
            try:
                await asyncio.wait(ahead)
                self.go_before(tenant, users)
                value = work()
            finally:
                for key in keys:
                    if self._behind.get(key) is begun:
                        del self._behind[key]
                begun.set_result(None)
            return await settled(value)

        task = asyncio.ensure_future(begin())
        task.add_done_callback(retrieve)
        return task

    def _store_waiting(self, key: UserKey) -> None:
        notifications = self.take_homeless(*key)
        if self._logs is not None and notifications:
            self._store(self._logs, key, notifications, replay=True)

    def _stored(
        self, key: UserKey, notification: Notification, rejection: Rejection | None
    ) -> bool:
        if rejection is not None:
            self._on_lost(notification)
            return False
        if self._ledger is not None:
            tenant, user_id = key
            self.note(self._ledger.expect, tenant, notification.id, (user_id,), queued=True)
        return True

    def _keep_homeless(self, key: UserKey, notifications: Sequence[Notification]) -> None:
        if not notifications:
            return
        waiting = self._homeless.setdefault(key, {})
        for notification in notifications:
            self._waiting += notification.id not in waiting
            waiting[notification.id] = notification
        while self._waiting > self._max_waiting:
            oldest = next(iter(self._homeless))
            id = next(iter(self._homeless[oldest]))
            self._on_lost(self._homeless[oldest][id])
            self._forget_homeless(oldest, id)

    def _forget_homeless(self, key: UserKey, id: str) -> bool:
        waiting = self._homeless.get(key, {})
        if waiting.pop(id, None) is None:
            return False
        self._waiting -= 1
        if not waiting:
            del self._homeless[key]
        return True

    def has_homeless(self, tenant: str, user_id: str) -> bool:
        """Whether something of this user waits for a store that is away."""
        return (tenant, user_id) in self._homeless

    def homeless(self, tenant: str, user_id: str) -> list[Notification]:
        """What waits for a store that is away, in order."""
        waiting = self._homeless.get((tenant, user_id), {})
        return [each for each in waiting.values() if not each.is_over(self._clock())]

    def taken(self, tenant: str, user_id: str, id: str) -> None:
        """Whoever takes one of these has to hold it; it waits here no more."""
        self._forget_homeless((tenant, user_id), id)

    def take_homeless(self, tenant: str, user_id: str) -> list[Notification]:
        """Take all of them, to store or to hold; what is over is lost."""
        waiting = self._homeless.pop((tenant, user_id), {})
        self._waiting -= len(waiting)
        taken = []
        for notification in waiting.values():
            if notification.is_over(self._clock()):
                self._on_lost(notification)
            else:
                taken.append(notification)
        return taken

    def on_its_way(self, tenant: str, user_id: str) -> asyncio.Task[None] | None:
        """Done when what is on its way to this user's log is there, or is known not to be; None
        where there is nothing. Not to be cancelled."""
        return self._storing_tasks.get((tenant, user_id))

    async def forget_confirmed(self, *users: UserKey) -> None:
        """Let go of what waits for a store that is away, and was confirmed on other nodes."""
        if self.settle_confirmed is not None:
            waiting = [(*key, tuple(self._homeless[key])) for key in users if key in self._homeless]
            if waiting:
                await self.settle_confirmed(waiting)

    def confirmed(self, tenant: str, user_id: str, ids: Sequence[str]) -> frozenset[str]:
        """The user confirmed these: none of them goes to his log any more. Returns those that
        waited for it or were on their way, which only the store knows whether it has.
        """
        key = (tenant, user_id)
        if key not in self._homeless and key not in self._storing:
            return frozenset()
        storing = self._storing.get(key, {})
        found = []
        for id in ids:
            on_its_way = storing.pop(id, None) is not None
            if self._forget_homeless(key, id) or on_its_way:
                found.append(id)
        return frozenset(found)

    # --- what is settled in a log ---

    def settle(self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False) -> None:
        """Settle what was confirmed without an ack."""
        try:
            answer = self.settle_acked(tenant, user_id, ids, heard=heard)
        except Unavailable:
            self._keep_unsettled((tenant, user_id), ids)
            return
        if is_awaitable(answer):
            self._watch(self._settle_later((tenant, user_id), ids, answer))

    def settle_acked(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> Eventually[frozenset[str]]:
        """Settle for one who waits for it; those that were pending. Raises Unavailable."""
        if self._logs is None:
            return frozenset()
        answer = self._logs.settle(tenant, user_id, ids, heard=heard)
        if not is_awaitable(answer):
            return answer
        pending = asyncio.ensure_future(answer)
        key = (tenant, user_id)
        self._settling.setdefault(key, []).append(ids)
        pending.add_done_callback(partial(self._settling_is_over, key, ids))
        return pending

    def _settling_is_over(self, key: UserKey, ids: Sequence[str], answer: object) -> None:
        settling = self._settling[key]
        settling.remove(ids)
        if not settling:
            del self._settling[key]

    def settling(self, tenant: str, user_id: str) -> Iterable[str]:
        """What is being settled, or waits to be: a page that is asked for before may bring it, and
        arrive after."""
        key = (tenant, user_id)
        return chain(*self._settling.get(key, ()), self._unsettled.get(key, ()))

    async def _settle_later(
        self, key: UserKey, ids: Sequence[str], answer: Awaitable[frozenset[str]]
    ) -> None:
        try:
            await answer
        except Unavailable as error:
            _forget_frames(error)
            self._keep_unsettled(key, ids)

    def _keep_unsettled(self, key: UserKey, ids: Sequence[str]) -> None:
        self._failures += 1
        unsettled = self._unsettled.setdefault(key, {})
        before = len(unsettled)
        unsettled.update(dict.fromkeys(ids))
        self._unsettled_ids += len(unsettled) - before
        # Settling is a courtesy to the next device; at the bound, it may get a thing twice.
        while self._unsettled_ids > self._max_waiting:
            oldest, known = next(iter(self._unsettled.items()))
            del known[next(iter(known))]
            self._unsettled_ids -= 1
            if not known:
                del self._unsettled[oldest]

    def is_unsettled(self, tenant: str, user_id: str, id: str) -> bool:
        """Whether this is confirmed already, and only the store does not know it yet."""
        return id in self._unsettled.get((tenant, user_id), ())

    # --- what the ledger is told ---

    def note(self, tell: Callable[..., Eventually[None]], *args: Any, **kwargs: Any) -> None:
        """Tell the ledger something that nobody waits for; delivery never depends on it."""
        try:
            answer = tell(*args, **kwargs)
        except Unavailable as error:
            self.note_is_lost(error)
            return
        if isinstance(answer, asyncio.Future):
            answer.add_done_callback(self._noted)
        elif is_awaitable(answer):
            self._spawn(self._note_later(answer))

    def note_is_lost(self, error: Unavailable) -> None:
        """The ledger does not know of something that was sent or confirmed."""
        self._on_unavailable(error)

    def _noted(self, answer: asyncio.Future[None]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, Unavailable):
            self.note_is_lost(error)
        elif error is not None:
            raise error

    async def _note_later(self, answer: Awaitable[None]) -> None:
        try:
            await answer
        except Unavailable as error:
            self.note_is_lost(error)

    # --- trying again ---

    async def retry(self) -> None:
        """Try again what waits, until the store fails once more: first that of one user, to see
        whether it does."""
        failures = self._failures
        users = list(self._homeless)
        for place, key in enumerate(users):
            if place % USERS_PER_QUESTION == 0:
                await self.forget_confirmed(*users[place : place + USERS_PER_QUESTION])
            if key not in self._storing:
                self._store_waiting(key)
            if not place or self._on_their_way >= MAX_ON_THEIR_WAY:
                await self._flushed()
            if self._failures != failures:
                return
        for number, key in enumerate(list(self._unsettled)):
            ids = self._unsettled.pop(key, {})
            self._unsettled_ids -= len(ids)
            if ids:
                self.settle(*key, list(ids))
            if number % MAX_ON_THEIR_WAY == 0:
                await self._flushed()
            if self._failures != failures:
                return
        await self._flushed()

    def _watch(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _flushed(self) -> None:
        """Wait for what is under way."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))

    async def finish(self, seconds: float) -> int:
        """At the end of the server: store what is under way and what waits, trying for so long;
        returns how many notifications no store has.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._flushed()
                    await self.retry()
                    if not self._homeless and not self._storing:
                        break
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            pass  # What is left is counted and told below.
        return self._waiting + sum(map(len, self._storing.values()))
