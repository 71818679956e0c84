"""What goes between nodes: pub/sub of one Redis, one channel for each node and one for all.

What a node publishes goes over one connection, and what it hears comes over one, so that order
holds between any two of them. What many wait for in one turn goes out together. Who asked waits no
longer than he said; an answer that comes later is told where somebody still wants it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import count
from typing import Any

import structlog

from notifyd.cluster.messages import (
    ALONE,
    SEVERAL,
    Answer,
    Ask,
    BadMessage,
    Body,
    Held,
    Incoming,
    Reached,
    Spread,
    Told,
    encode,
)
from notifyd.errors import Unavailable
from notifyd.log import RateLimitedLog
from notifyd.metrics import Metrics
from notifyd.queue.redis_keys import ClusterKeys
from notifyd.redis_client import Redis
from notifyd.redis_subscriber import MAX_MESSAGE_BYTES, RedisSubscriber

ANSWER_SECONDS = 0.2
"""A receipt waits no longer for another node."""

AFTER_SECONDS = 5.0
"""So long an answer that is late is still waited for, before what was sent counts as lost."""

MAX_AWAITED = 100_000

MAX_TOGETHER_BYTES = 1024 * 1024
"""What goes out together to all nodes has no more payload, names and members of audiences, as far
as it is several messages."""

MAX_SENT_BYTES = MAX_MESSAGE_BYTES // 2
"""What is longer is not sent: it would end the subscriptions of all who hear it."""

Reply = Told | Reached | Held | Answer


class Awaited(ABC):
    """Answers that somebody waits for: `expected` is how many nodes were reached, None until that
    is known.

    `finish` is called once: with all answers, or when it was time. One that is `patient` waits
    until it is known who was reached, however long Redis takes to say so. `after`, where it is set
    by then and answers were missing, is called once more: when they are all there, or time was over
    for good.
    """

    __slots__ = (
        "after",
        "answers",
        "deadline",
        "expected",
        "finished",
        "kind",
        "late",
        "patient",
        "seq",
    )

    def __init__(self, kind: type[Reply], *, patient: bool = False) -> None:
        self.seq = 0
        self.kind = kind
        self.deadline = 0.0
        self.patient = patient
        self.late = False
        self.after: Callable[[Awaited], None] | None = None
        self.expected: int | None = None
        self.answers: dict[str, Any] = {}
        self.finished = False

    @property
    def complete(self) -> bool:
        """Whether every node that was reached has answered."""
        return self.expected is not None and len(self.answers) >= self.expected

    @abstractmethod
    def finish(self) -> None:
        """All answers are there, or it is time."""


class Asked(Awaited):
    """Answers that a function waits for."""

    __slots__ = ("_finish",)

    def __init__(
        self, kind: type[Reply], finish: Callable[[Awaited], None], *, patient: bool = False
    ) -> None:
        super().__init__(kind, patient=patient)
        self._finish = finish

    def finish(self) -> None:
        """Tell it."""
        self._finish(self)


class Bus:
    """This node's voice and ear. `receive(incoming, body)` is called for what is no answer, and may
    raise BadMessage; `on_up` is told whether this node hears the others.
    """

    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        redis: Redis,
        keys: ClusterKeys,
        node: str,
        metrics: Metrics,
        *,
        receive: Callable[[Incoming, Body], None],
        on_up: Callable[[bool], None],
    ) -> None:
        self.node = node
        self._redis = redis
        self._keys = keys
        self._receive = receive
        self._sent = metrics.cluster_messages_total.labels("sent")
        self._received = metrics.cluster_messages_total.labels("received")
        self._bad = metrics.cluster_bad_messages_total.labels
        self._unanswered = metrics.cluster_unanswered_total
        self._log = structlog.get_logger("notifyd.cluster")
        self._bad_log = RateLimitedLog(self._log)
        self._subscriber = RedisSubscriber(
            redis,
            self._heard,
            probe_prefix=f"{keys.all}:probe",
            channels=(keys.node + node, keys.all),
            on_up=on_up,
        )
        self._seqs = count(1)
        self._awaited: dict[int, Awaited] = {}
        # Each in the order of its deadlines, for all wait equally long.
        self._soon: deque[Awaited] = deque()
        self._later: deque[Awaited] = deque()
        self._timer: asyncio.TimerHandle | None = None
        # uvloop's own handle of what is due at once cannot say when that is.
        self._timer_due = 0.0
        self._to_all: list[tuple[Body, Awaited | None]] = []
        self._to_nodes: dict[str, list[Body]] = {}
        self._scheduled = False

    @property
    def up(self) -> bool:
        """Whether this node hears the others."""
        return self._subscriber.up

    def run(self) -> Coroutine[Any, Any, None]:
        """Listen in the running event loop until cancelled."""
        self._loop = asyncio.get_running_loop()
        return self._subscriber.run()

    # --- waiting for answers ---

    def await_answers(
        self,
        kind: type[Reply],
        finish: Callable[[Awaited], None],
        *,
        seconds: float = ANSWER_SECONDS,
        patient: bool = False,
    ) -> Awaited:
        """Wait for answers of this kind to what goes out under the number of what is returned."""
        return self.add(Asked(kind, finish, patient=patient), seconds)

    def add(self, awaited: Awaited, seconds: float = ANSWER_SECONDS) -> Awaited:
        """Wait for answers to what goes out under the number that it gets here."""
        seq = awaited.seq = next(self._seqs)
        time = self._loop.time()
        awaited.deadline = time + seconds
        self._awaited[seq] = awaited
        if seconds == ANSWER_SECONDS:
            self._soon.append(awaited)
            self._set_timer()
        else:
            self._loop.call_later(seconds, self.overdue, awaited)
        if len(self._awaited) > MAX_AWAITED and (queue := self._later or self._soon):
            # Those that are late already are given up first.
            self.overdue(queue.popleft())
        return awaited

    def reached(self, awaited: Awaited, nodes: int) -> None:
        """So many nodes will answer."""
        awaited.expected = nodes
        if len(awaited.answers) >= nodes:
            self._complete(awaited)
        elif awaited.late:
            self.overdue(awaited)

    def _answered(self, sender: str, body: Reply) -> None:
        awaited = self._awaited.get(body.seq)
        if awaited is None or sender in awaited.answers:
            return  # Nobody waits for it any more.
        if type(body) is not awaited.kind:
            raise BadMessage("shape", f"{type(body).__name__} answers something else")
        awaited.answers[sender] = body
        if awaited.complete:
            self._complete(awaited)

    def _complete(self, awaited: Awaited) -> None:
        self._awaited.pop(awaited.seq, None)
        self._tell(awaited)

    def _tell(self, awaited: Awaited) -> None:
        if not awaited.finished:
            awaited.finished = True
            awaited.finish()
        elif awaited.after is not None:
            after, awaited.after = awaited.after, None
            after(awaited)

    def _set_timer(self) -> None:
        """Look at the time when the first of all is due, which may be before what is set now."""
        soon, later = self._soon, self._later
        if not soon and not later:
            return
        first = soon[0].deadline if soon else later[0].deadline
        if soon and later and later[0].deadline < first:
            first = later[0].deadline
        timer = self._timer
        if timer is not None:
            if self._timer_due <= first:
                return
            timer.cancel()
        self._timer_due = first
        self._timer = self._loop.call_at(first, self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        self._timer = None
        now = self._loop.time()
        for queue in (self._soon, self._later):
            while queue and (queue[0].deadline <= now or queue[0].seq not in self._awaited):
                awaited = queue.popleft()
                if awaited.seq in self._awaited:
                    self.overdue(awaited)
        self._set_timer()

    def overdue(self, awaited: Awaited) -> None:
        """It was time."""
        if awaited.seq not in self._awaited:
            return
        if awaited.patient and awaited.expected is None:
            awaited.late = True
            return
        was_finished = awaited.finished
        if not was_finished:
            self._unanswered.inc()
        self._tell(awaited)
        if was_finished or awaited.after is None:
            self._awaited.pop(awaited.seq, None)
        else:
            awaited.deadline = self._loop.time() + AFTER_SECONDS
            self._later.append(awaited)
            self._set_timer()

    def give_up(self) -> None:
        """All that is awaited is overdue for good: this node ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for awaited in list(self._awaited.values()):
            self._tell(awaited)
            self._tell(awaited)
        self._awaited.clear()
        self._soon.clear()
        self._later.clear()

    # --- publishing ---

    def to_all(self, body: Body, awaited: Awaited | None = None) -> None:
        """Tell all other nodes, at the end of this turn; how many they are is told to what is
        awaited. Where Redis is away nobody is told."""
        self._to_all.append((body, awaited))
        self._schedule()

    def to_node(self, node: str, body: Body) -> None:
        """Tell one node, at the end of this turn; where Redis is away it is not told."""
        self._to_nodes.setdefault(node, []).append(body)
        self._schedule()

    def now_to(self, node: str, body: Body, *, several: bool, done: Callable[[bool], None]) -> None:
        """Tell one node at once; `done` is told whether it listens, as far as is known."""
        message = (SEVERAL if several else ALONE) + encode(self.node, (body,))
        if self._is_too_long(message):
            done(False)
        else:
            self._publish(self._keys.node + node, message, 1, lambda heard: done(heard > 0))

    def encoded(self, body: Body) -> bytes | None:
        """For a script that publishes by itself; None where it is too long to be sent."""
        message = encode(self.node, (body,))
        if self._is_too_long(message):
            return None
        self._sent.inc()
        return message

    def _is_too_long(self, message: bytes) -> bool:
        if len(message) <= MAX_SENT_BYTES:
            return False
        # Such as the names of a million channels; whoever asked does without.
        self._bad_log.warning(
            "a message is too long for other nodes", reason="too_long", bytes=len(message)
        )
        return True

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            # With what this turn stores, in one write; and before a fan-out takes its time.
            self._redis.gather(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        to_all, self._to_all = self._to_all, []
        to_nodes, self._to_nodes = self._to_nodes, {}
        together: list[tuple[Body, Awaited | None]] = []
        size = 0
        for item in to_all:
            more = _bytes_of(item[0])
            if together and size + more > MAX_TOGETHER_BYTES:
                self._tell_all(together)
                together, size = [], 0
            together.append(item)
            size += more
        if together:
            self._tell_all(together)
        for node, for_node in to_nodes.items():
            self._tell_node(node, for_node)

    def _tell_node(self, node: str, bodies: Sequence[Body]) -> None:
        message = ALONE + encode(self.node, bodies)
        if len(bodies) > 1 and len(message) > MAX_SENT_BYTES:
            for body in bodies:
                self._tell_node(node, (body,))
        elif not self._is_too_long(message):
            self._publish(self._keys.node + node, message, len(bodies), lambda heard: None)

    def _tell_all(self, items: Sequence[tuple[Body, Awaited | None]]) -> None:
        message = ALONE + encode(self.node, [body for body, _ in items])
        if len(items) > 1 and len(message) > MAX_SENT_BYTES:
            for item in items:
                self._tell_all((item,))
            return
        waiting = [awaited for _, awaited in items if awaited is not None]
        if self._is_too_long(message):
            self._heard_by(waiting, 0)
        else:
            told = partial(self._heard_by, waiting)
            self._publish(self._keys.all, message, len(items), told)

    def _heard_by(self, waiting: Sequence[Awaited], heard: int) -> None:
        # We hear ourselves too; where we hear nobody, no answer will come.
        others = heard - 1 if self.up else 0
        for awaited in waiting:
            self.reached(awaited, max(0, others))

    def _publish(
        self, channel: str, message: bytes, bodies: int, told: Callable[[int], None]
    ) -> None:
        """`told` gets how many heard it, when that is read; 0 where Redis is away."""
        self._sent.inc(bodies)
        try:
            call = self._redis.command("PUBLISH", channel, message, convert=told)
        except Unavailable:
            told(0)
        else:
            call.add_done_callback(partial(_unheard, told))

    # --- hearing ---

    def _heard(self, pattern: bytes, channel: bytes, data: bytes) -> bool:
        try:
            incoming = Incoming(data)
        except BadMessage as error:
            self._tell_bad("", error)
            return True
        if incoming.sender != self.node:
            self._received.inc(len(incoming))
            for index in range(len(incoming)):
                self._take(incoming, index)
        return True

    def _take(self, incoming: Incoming, index: int) -> None:
        """One item; whatever is wrong with it, the others are taken."""
        try:
            body = incoming.body(index)
            if isinstance(body, Told | Reached | Held | Answer):
                self._answered(incoming.sender, body)
            else:
                self._receive(incoming, body)
        except BadMessage as error:
            self._tell_bad(incoming.sender, error)
        except Exception as error:  # noqa: BLE001  # costs one message, and is logged
            self._bad("failed").inc()
            self._bad_log.warning(
                "a message of a node failed",
                reason=f"failed: {type(error).__name__}",
                node=incoming.sender[:100],
                error=str(error)[:200],
                exc_info=True,
            )

    def tell_bad(self, sender: str, text: str) -> None:
        """An answer of this node has another shape than it should."""
        self._tell_bad(sender, BadMessage("shape", text))

    def _tell_bad(self, sender: str, error: BadMessage) -> None:
        self._bad(error.reason).inc()
        self._bad_log.warning(
            "a message on the nodes' channels was ignored",
            node=sender[:100],
            reason=error.reason,
            error=str(error)[:200],
        )


def _bytes_of(body: Body) -> int:
    """What is long in a body, where anything is."""
    if isinstance(body, Spread):
        content = body.notification
        return len(content.payload) + sum(map(len, body.names)) + sum(map(len, content.values))
    return len(memoryview(body.about)) if isinstance(body, Ask) else 0


def _unheard(told: Callable[[int], None], call: asyncio.Future[None]) -> None:
    if call.cancelled() or call.exception() is not None:
        told(0)
