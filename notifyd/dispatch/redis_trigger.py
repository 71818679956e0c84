"""Notifications that services publish to Redis channels: checked as those of HTTP are, dispatched
in the order in which they came.

Whoever may publish there is trusted as an API key that is bound to no tenant. A message costs no
task where nothing must be awaited, and no more are taken than may be under way. A bad one is
counted, logged once a minute, and changes nothing else. Redis forgets what is published while
nobody is subscribed; what must not be lost is put into a stream (redis_stream.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
import structlog
from msgspec import Meta

from notifyd.cluster.lease import Lease
from notifyd.compose import (
    MAX_USERS,
    MAX_USERS_BYTES,
    MISSING,
    Composer,
    Content,
    excluded,
    target_of,
)
from notifyd.decoding import Decoder
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.errors import BadRequest, NotifydError, PayloadTooLarge, Unavailable, ValidationError
from notifyd.eventually import Eventually, is_awaitable, retrieve, settled
from notifyd.idempotency import (
    Fresh,
    IdempotencyKeys,
    KeptAnswer,
    Replay,
    Wait,
    fingerprint,
    key_scope,
)
from notifyd.identifiers import canonical_uuid
from notifyd.log import RateLimitedLog
from notifyd.metrics import Metrics
from notifyd.notification import Notification, Receipt, Target
from notifyd.redis_client import Redis
from notifyd.redis_subscriber import RedisSubscriber

MAX_BYTES = 65536
"""A message's; to `users`, up to `MAX_USERS_BYTES`."""

MAX_UNDER_WAY = 1000
"""Messages that wait for a store; beyond, no more are taken from Redis."""

NOTED_AT_ONCE = 500
"""Messages after which the ledger's Redis is asked whether it keeps up."""

CLOSE_SECONDS = 2.0
AGAIN_SECONDS = 1.0

SOURCE = "redis"

Claim: TypeAlias = Fresh | Replay | Wait

TenantOf: TypeAlias = Callable[[str | None], str]
"""The tenant of a message that names this one, or none; raises NotifydError."""


class RedisMessage(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A message as it is published: whom it is for, and the content, under `event` or beside it."""

    type: str | None = None
    target: str | Annotated[list[str], Meta(max_length=MAX_USERS)] | None = None
    tenant_id: str | None = None
    event: Content | None = None


_content_of = attrgetter(*(field.name for field in msgspec.structs.fields(Content)))
_NO_CONTENT = tuple(
    field.default if field.default is not msgspec.NODEFAULT else MISSING
    for field in msgspec.structs.fields(Content)
)


class Said(NamedTuple):
    """What a Redis channel says by its name: a type, and a target from the byte at `start` on."""

    type: str | None = None
    start: int | None = None


def said_by(pattern: str) -> Said:
    """What channels that match this pattern say.

    `…:user:*` and `…:channel:*` have type and target, `…:broadcast`, `…:users` and `…:channels` a
    type; other patterns leave both to the message.
    """
    head, _, last = pattern.rpartition(":")
    if any(sign in head for sign in "*?[\\"):
        return Said()
    word = head.rpartition(":")[2]
    if last == "*" and word in {"user", "channel"}:
        return Said(word, len(pattern.encode()) - 1)
    return Said(last) if last in {"broadcast", "users", "channels"} else Said()


class Ready:
    """A message that was checked, and what it needs to be dispatched."""

    __slots__ = ("claims", "exclude", "notification", "target", "tenant")

    def __init__(
        self,
        tenant: str,
        target: Target,
        notification: Notification,
        exclude: str | None,
        claims: Sequence[Fresh | Wait] = (),
    ) -> None:
        self.tenant = tenant
        self.target = target
        self.notification = notification
        self.exclude = exclude
        self.claims = claims

    @property
    def waits(self) -> bool:
        """Whether another message is at work with one of its keys."""
        return any(isinstance(claim, Wait) for claim in self.claims)


class Intake:
    """Makes notifications of messages, and sends each once.

    `source` is the way they come in, for the metrics and for the scope of idempotency keys.
    `alone`: nobody else takes what comes in that way while this does, so that a key at which
    another is said to be at work was left by one that is dead. `again`: a message that a store
    would not take for some of its recipients is sent to them again, and has its keys until then.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        compose: Composer,
        keys: IdempotencyKeys,
        *,
        source: str,
        alone: bool,
        tenant_of: TenantOf,
        again: bool = False,
    ) -> None:
        self._dispatch = dispatcher.dispatch
        self._compose = compose
        self._keys = keys
        self._source = source
        self._alone = alone
        self._again = again
        self._tenant_of = tenant_of
        self._decode = Decoder(RedisMessage)

    def prepare(
        self,
        data: bytes,
        said: Said,
        channel: bytes = b"",
        *,
        entry: str | None = None,
        at: float | None = None,
    ) -> Eventually[Ready | None]:
        """Check a message; None where it came before, by its id or idempotency key.

        `entry` is the id of the stream's entry as a UUID, and the notification's if the message
        has none; `at` when it was sent. Raises NotifydError: Unavailable where a store cannot say,
        any other where the message is bad.
        """
        size = len(data)
        if size > MAX_USERS_BYTES:
            raise _too_large(MAX_USERS_BYTES)
        message = self._decode(data)
        type, target = message.type, message.target
        if type is None:
            type = said.type
            if type is None:
                raise _missing("type")
        if target is None and said.start is not None and type == said.type:
            target = _name(channel[said.start :])
        receivers = target_of(type, target, "type", "target")
        if size > MAX_BYTES and receivers.type != "users":
            raise _too_large(MAX_BYTES)
        content: Content = message
        if message.event is not None:
            if _content_of(message) != _NO_CONTENT:
                raise _twice()
            content = message.event
        tenant = self._tenant_of(message.tenant_id)
        exclude = excluded(content)
        notification = self._compose(tenant, content, entry, at)
        keyed = content.id is not None or content.idempotency_key is not None
        if not keyed and isinstance(notification, Notification):
            return Ready(tenant, receivers, notification, exclude)
        claims = self._claim(tenant, content, data)
        return self._prepare_later(tenant, receivers, notification, exclude, claims)

    def _claim(
        self, tenant: str, content: Content, data: bytes
    ) -> list[Eventually[Claim] | NotifydError]:
        """Ask for all keys of a message at once, before anything is awaited.

        So the first of several that are alike has all of them, and those behind wait for it. If two
        had one each, the first would wait for what is sent only behind it.
        """
        claims: list[Eventually[Claim] | NotifydError] = []
        for kind, key in (("id", content.id), ("key", content.idempotency_key)):
            if key is None:
                continue
            try:
                name = canonical_uuid(key) if kind == "id" else key
                scope = key_scope(tenant, "", f"{self._source} {kind}", name)
                claim = self._keys.claim(scope, fingerprint(data), alone=self._alone)
            except NotifydError as error:
                claims.append(error)
                continue
            if is_awaitable(claim):
                claim = asyncio.ensure_future(claim)
                claim.add_done_callback(retrieve)
            claims.append(claim)
        return claims

    async def _prepare_later(
        self,
        tenant: str,
        target: Target,
        built: Eventually[Notification],
        exclude: str | None,
        asked: Sequence[Eventually[Claim] | NotifydError],
    ) -> Ready | None:
        refusal: NotifydError | None = None
        claims: list[Fresh | Wait] = []
        before = False
        for each in asked:
            claim: Claim
            try:
                if isinstance(each, NotifydError):
                    raise each
                claim = await settled(each)
            except NotifydError as error:
                refusal = refusal or error
                continue
            if isinstance(claim, Replay):
                before = True
            else:
                claims.append(claim)
        try:
            notification = await settled(built)
        except NotifydError as error:
            refusal = error
        if refusal is not None or before:
            await _abandon(claims)
            if refusal is not None:
                raise refusal
            return None
        return Ready(tenant, target, notification, exclude, claims)

    async def first(self, ready: Ready) -> bool:
        """Whether this message is the first with its keys, once those at work with them have
        ended."""
        claims: list[Fresh | Wait] = []
        for claim in ready.claims:
            if isinstance(claim, Wait):
                try:
                    outcome = await claim.outcome()
                except NotifydError:
                    await _abandon([*claims, *ready.claims])
                    raise
                if isinstance(outcome, Replay):
                    await _abandon([*claims, *ready.claims])
                    return False
                claims.append(outcome)
            else:
                claims.append(claim)
        ready.claims = claims
        return True

    def send(self, ready: Ready) -> Eventually[Receipt]:
        """Dispatch; raises what the dispatcher does, at once or when awaited."""
        receipt: Eventually[Receipt]
        try:
            receipt = self._dispatch(
                ready.tenant,
                ready.target,
                ready.notification,
                exclude_connection=ready.exclude,
                source=self._source,
            )
        except Exception as error:
            if not ready.claims:
                raise
            return _fail(ready, error)
        return self._complete(ready, receipt) if ready.claims else receipt

    async def _complete(self, ready: Ready, pending: Eventually[Receipt]) -> Receipt:
        try:
            receipt = await settled(pending)
        except BaseException:
            await _abandon(ready.claims)
            raise
        if self._again and unavailable(receipt):
            await _abandon(ready.claims)
        else:
            await self.finish(ready)
        return receipt

    async def give_up(self, ready: Ready) -> None:
        """It is not sent now, and its keys are free."""
        await _abandon(ready.claims)

    async def finish(self, ready: Ready) -> None:
        """Its keys have been used, and it is not dispatched (again)."""
        for claim in ready.claims:
            if isinstance(claim, Fresh):
                await settled(claim.complete(KeptAnswer(200, b"")))


def unavailable(receipt: Receipt) -> tuple[str, ...]:
    """Those among several recipients for whom it failed because their store was away."""
    if not receipt.failed or not receipt.results:
        return ()
    return tuple(name for name, each in receipt.results.items() if each.reason == "unavailable")


async def _fail(ready: Ready, error: Exception) -> Receipt:
    await _abandon(ready.claims)
    raise error


async def _abandon(claims: Sequence[Fresh | Wait]) -> None:
    for claim in claims:
        if isinstance(claim, Fresh):
            await settled(claim.abandon())


def _name(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise BadRequest("The Redis channel's name is not UTF-8.") from error


def _missing(field: str) -> ValidationError:
    message = f"{field} is missing, and the Redis channel does not say it."
    return ValidationError(message, field=field, constraint="required")


def _twice() -> ValidationError:
    message = "The content stands under event and beside it."
    return ValidationError(message, field="event", constraint="one of the two")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The message is larger than {limit:,} bytes.")


class BadMessages:
    """Counts what cannot be used, and logs one of them a minute."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))

    def tell(self, error: NotifydError, **where: object) -> None:
        """One more; `where` it came from."""
        self._metrics.redis_bad_messages_total.inc()
        # One reason for all: a stranger's words are in the error.
        self._log.warning(
            "a message in Redis cannot be used", reason="bad", problem=error.message, **where
        )


class RedisTrigger:
    """Takes what is published to Redis channels, from `start` to `aclose`.

    With a `lease`, only while this node holds it. `keeps_up` is awaited now and then, where the
    ledger is told of each notification and nobody waits for its answer.
    """

    def __init__(
        self,
        redis: Redis,
        intake: Intake,
        metrics: Metrics,
        bad: BadMessages,
        *,
        patterns: Sequence[str],
        probe_prefix: str,
        lease: Lease | None = None,
        keeps_up: Callable[[], Awaitable[object]] | None = None,
        max_under_way: int = MAX_UNDER_WAY,
        silence: float = 30.0,
        probe_timeout: float = 2.0,
    ) -> None:
        self._intake = intake
        self._metrics = metrics
        self._bad = bad
        self._lease = lease
        self._keeps_up = keeps_up
        self._max_under_way = max_under_way
        self._log = structlog.get_logger("notifyd")
        self._lost = RateLimitedLog(self._log)
        self._said = {pattern.encode(): said_by(pattern) for pattern in patterns}
        self._last: tuple[bytes, bytes, bytes] = (b"", b"", b"")
        self._line: deque[tuple[asyncio.Future[Ready | None], bytes]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._walking: asyncio.Task[None] | None = None
        self._weight = 0
        self._since_asked = 0
        self._tasks: dict[asyncio.Future[Any], int] = {}
        self.subscriber = RedisSubscriber(
            redis,
            self.receive,
            probe_prefix=probe_prefix,
            patterns=patterns,
            silence=silence,
            probe_timeout=probe_timeout,
            on_up=metrics.redis_trigger_active.set,
        )

    @property
    def under_way(self) -> int:
        """Messages taken from Redis and not yet with whom they are for, or in a store."""
        return self._weight + len(self._line)

    def start(self) -> None:
        """Begin to take messages, with a lease while it is held."""
        self._running = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            try:
                if self._lease is None:
                    await self.subscriber.run()
                else:
                    await self._lease.acquired()
                    await self._run_while_held(self._lease)
            except Exception:  # noqa: BLE001  # logged; the subscription is made again
                self._log.exception("the subscription in Redis failed")
                await asyncio.sleep(AGAIN_SECONDS)

    async def _run_while_held(self, lease: Lease) -> None:
        subscribed = asyncio.ensure_future(self.subscriber.run())
        lapsed = asyncio.ensure_future(lease.lapsed())
        try:
            await asyncio.wait({subscribed, lapsed}, return_when=asyncio.FIRST_COMPLETED)
            if subscribed.done():
                subscribed.result()
        finally:
            subscribed.cancel()
            lapsed.cancel()
            await asyncio.wait({subscribed, lapsed})

    # --- what arrives ---

    def receive(self, pattern: bytes, channel: bytes, data: bytes) -> bool:
        """Take one message; whether more may come now."""
        lease = self._lease
        if lease is not None and not lease.held:
            return True  # whoever holds it now has subscribed by himself
        last = self._last
        if channel == last[1] and pattern != last[0] and data == last[2]:
            return True  # the same message again, for another pattern that it matches
        self._last = (pattern, channel, data)
        try:
            ready = self._intake.prepare(data, self._said[pattern], channel)
            if not isinstance(ready, Ready) or self._line:
                self._queue(ready, channel)
            else:
                receipt = self._intake.send(ready)
                if is_awaitable(receipt):
                    self._follow(receipt, channel)
        except Exception as error:  # noqa: BLE001  # one message's, which is told; others follow
            self._failed(error, channel)
        if self._keeps_up is not None:
            self._since_asked += 1
            if self._since_asked >= NOTED_AT_ONCE:
                self._ask_whether_it_keeps_up()
        return self._weight + len(self._line) < self._max_under_way

    def _queue(self, ready: Eventually[Ready | None], channel: bytes) -> None:
        """Wait in line: what comes behind a message is not sent before it."""
        waiting = asyncio.ensure_future(settled(ready))
        waiting.add_done_callback(retrieve)
        self._line.append((waiting, channel))
        if self._walking is None:
            self._walking = asyncio.ensure_future(self._walk())

    async def _walk(self) -> None:
        try:
            while self._line:
                waiting, channel = self._line[0]
                try:
                    ready = await waiting
                    if ready is not None and (not ready.claims or await self._intake.first(ready)):
                        receipt = self._intake.send(ready)
                        if is_awaitable(receipt):
                            self._follow(receipt, channel)
                except Exception as error:  # noqa: BLE001  # as in `receive`
                    self._failed(error, channel)
                self._line.popleft()
                self._fewer()
        finally:
            self._walking = None

    def _follow(self, receipt: Awaitable[Receipt], channel: bytes) -> None:
        task = asyncio.ensure_future(receipt)
        self._count(task, 1)
        task.add_done_callback(lambda done: self._stored(done, channel))

    def _count(self, task: asyncio.Future[Any], weight: int) -> None:
        self._weight += weight
        self._tasks[task] = weight
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._weight -= self._tasks.pop(task)
        self._fewer()

    def _fewer(self) -> None:
        if 2 * self.under_way <= self._max_under_way:
            self.subscriber.resume()

    def _stored(self, task: asyncio.Future[Receipt], channel: bytes) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error, channel)

    def _failed(self, error: BaseException, channel: bytes) -> None:
        if isinstance(error, Unavailable):
            self._metrics.delivery_failures_total.labels("unavailable").inc()
            self._lost.warning(
                "a message from Redis is lost because a store is down", reason=error.message
            )
        elif isinstance(error, NotifydError):
            self._bad.tell(error, channel=channel)
        else:
            self._log.error("a message from Redis failed", channel=channel, exc_info=error)

    def _ask_whether_it_keeps_up(self) -> None:
        weight, self._since_asked = self._since_asked, 0
        if self._keeps_up is None:
            return
        try:
            answer = asyncio.ensure_future(self._keeps_up())
        except Unavailable:
            return  # it takes nothing now, so that nothing gathers
        answer.add_done_callback(retrieve)
        self._count(answer, weight)

    async def aclose(self) -> None:
        """Take no more, and wait for what is under way, two seconds at most."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        walking = self._walking
        waiting = {*self._tasks, *(() if walking is None else (walking,))}
        if waiting:
            await asyncio.wait(waiting, timeout=CLOSE_SECONDS)
        if walking is not None:
            walking.cancel()
            await asyncio.wait({walking})
        for prepared, _ in self._line:
            prepared.cancel()
        self._line.clear()
