"""Batches: up to a hundred notifications in one call, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw

from notifyd.api.guard import Answer, ErrorAnswer, Guard, Request, field_key, idempotency_key_text
from notifyd.compose import (
    DEFAULT_SOURCE,
    MISSING,
    Composer,
    Content,
    EventType,
    NotificationBody,
    ShortText,
    Ttl,
    excluded,
    target_in,
)
from notifyd.decoding import Decoder
from notifyd.dispatch.dispatcher import Dispatcher, UserSend
from notifyd.errors import ValidationError
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.identifiers import timestamp_text
from notifyd.names import is_user_id
from notifyd.notification import EVERYONE, Notification, Outcome, Priority, Receipt, Target
from notifyd.wire import payload_of_compact

MAX_BATCH_BYTES = 1_048_576
MAX_ITEMS = 100
NO_ID = "00000000-0000-0000-0000-000000000000"
"""Stands for the id of what was never sent, as Ara has it."""


class BatchOptions(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """`stop_on_error` stops at errors and failures, not where nobody was reached; `deduplicate`
    skips a target repeated with the same event type."""

    stop_on_error: bool = False
    deduplicate: bool = False


class BatchBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """1 to 100 notifications; a bad one is an error of that one alone."""

    notifications: Annotated[list[Raw], Meta(min_length=1, max_length=MAX_ITEMS)]
    options: BatchOptions = BatchOptions()
    idempotency_key: str | None = None


class _WholeBatchBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A BatchBody whose items are decoded with it."""

    notifications: Annotated[list[NotificationBody], Meta(min_length=1, max_length=MAX_ITEMS)]
    options: BatchOptions = BatchOptions()
    idempotency_key: str | None = None


class _PlainTarget(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    type: Literal["user"]
    value: str


class _PlainItem(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A NotificationBody that is an event for one user, and has nothing that most are without."""

    target: _PlainTarget
    event_type: EventType
    payload: Raw
    ttl: Ttl | None = None
    correlation_id: ShortText | None = None
    source: ShortText | None = None
    require_ack: bool = False


class _PlainBatchBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A BatchBody of such items."""

    notifications: Annotated[list[_PlainItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    options: BatchOptions = BatchOptions()
    idempotency_key: str | None = None


ItemT = TypeVar("ItemT", NotificationBody, _PlainItem)

_decode_whole_batch = msgspec.json.Decoder(_WholeBatchBody).decode
_decode_plain_batch = msgspec.json.Decoder(_PlainBatchBody).decode


def _whole_batch(data: bytes) -> _WholeBatchBody | _PlainBatchBody | None:
    """A batch in one pass, its payloads without whitespace; None where it or any item is wrong, or
    its options ask for one item after the other.
    """
    try:
        if not data.isascii():
            data.decode()
        compact = msgspec.json.format(data, indent=-1)
        body: _WholeBatchBody | _PlainBatchBody
        try:
            # As most are, and half as much work.
            body = _decode_plain_batch(compact)
        except msgspec.ValidationError:
            body = _decode_whole_batch(compact)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if body.options.stop_on_error or body.options.deduplicate else body


_decode_strict_batch = Decoder(BatchBody)
_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
_HALF_A_PAIR = Raw(b'"\\ud800"')


def _decode_batch(data: bytes) -> BatchBody:
    """A batch whose items are not looked into. Raises what `Decoder` does.

    The decoder refuses half of a surrogate pair wherever it is: an item that holds one stands there
    as one that is refused by itself.
    """
    try:
        return _decode_strict_batch(data)
    except ValidationError:
        halves = [found.start(1) for found in _ESCAPES.finditer(data) if found[1]]
        if not halves:
            raise
        # What differs where something else stands in their place holds one.
        body, other = (_decode_strict_batch(_with(data, halves, each)) for each in (b"0", b"1"))
        if body.idempotency_key != other.idempotency_key:
            raise
        items = [
            mine if bytes(mine) == bytes(others) else _HALF_A_PAIR
            for mine, others in zip(body.notifications, other.notifications, strict=True)
        ]
        return msgspec.structs.replace(body, notifications=items)


def _with(data: bytes, escapes: Sequence[int], digit: bytes) -> bytes:
    """`data` with a digit's escape in the place of those that begin at `escapes`."""
    changed = bytearray(data)
    for start in escapes:
        changed[start : start + 6] = b"\\u003" + digit
    return bytes(changed)


class BatchResult(msgspec.Struct, gc=False, omit_defaults=True):
    """What became of the item at `index`.

    The nil UUID stands where nothing was sent; an item that was skipped has no outcome.
    """

    index: int
    success: bool
    notification_id: str
    delivered_to: int
    failed: int
    queued: int
    outcome: Outcome | None = None
    error: str | None = None
    skipped: bool = False

    @property
    def stops(self) -> bool:
        """Whether `stop_on_error` stops behind it: an error or a failure, not `nobody`."""
        return self.outcome is Outcome.FAILED or self.failed > 0


class BatchSummary(msgspec.Struct, gc=False):
    """The items by what became of them; `failed`: neither succeeded nor skipped."""

    total: int
    succeeded: int
    failed: int
    skipped: int
    total_delivered: int


class BatchAnswer(msgspec.Struct, gc=False):
    """What became of a batch, item by item."""

    batch_id: str
    results: list[BatchResult]
    summary: BatchSummary
    timestamp: str


class Batches:
    """The handler of the batches. `send` publishes one item that has a key, as a call of its own
    does; `clock` and `new_id` as for `Publishing`."""

    def __init__(
        self,
        guard: Guard,
        dispatcher: Dispatcher,
        composer: Composer,
        send: Callable[[Request, Content, Target, Notification], Eventually[msgspec.Struct]],
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._guard = guard
        self._dispatch = dispatcher.dispatch
        self._dispatch_each = dispatcher.dispatch_each
        self._build = composer
        self._send = send
        self._clock = clock
        self._new_id = new_id
        self._batch_body = _decode_batch
        self._notification_body = Decoder(NotificationBody)

    def handle(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/batch."""
        body = _whole_batch(request.body) or self._batch_body(request.body)
        key = field_key(request, body.idempotency_key)
        if key is None:
            return self._batch(request, body)
        return self._guard.once(
            request,
            "key",
            key,
            request.body,
            lambda: self._guard.attempt(request, lambda request: self._batch(request, body)),
        )

    def _batch(
        self, request: Request, body: BatchBody | _WholeBatchBody | _PlainBatchBody
    ) -> Eventually[BatchAnswer]:
        batch = _Batch(request, body.options.deduplicate)
        if isinstance(body, _PlainBatchBody):
            results = self._in_runs(batch, body.notifications, self._made)
        elif isinstance(body, _WholeBatchBody):
            results = self._in_runs(batch, body.notifications, self._plain)
        elif body.options.stop_on_error:
            return self._until_error(batch, body.notifications)
        else:
            results = self._one_by_one(batch, body.notifications, [])
        if batch.unsent:
            return self._rest_later(batch, results)
        for result in results:
            if type(result) is not BatchResult:
                return self._when_all_are_known(results)
        return self._summary(results)  # type: ignore[arg-type]  # none is awaitable

    def _one_by_one(
        self, batch: _Batch, items: Sequence[Raw], results: list[Eventually[BatchResult]]
    ) -> list[Eventually[BatchResult]]:
        """The items behind those that have their results; no further than one that must wait before
        it is sent, or what is behind it came before it."""
        for index in range(len(results), len(items)):
            results.append(self._item(batch, index, items[index]))
            if batch.unsent:
                break
        return results

    async def _rest_later(
        self, batch: _Batch, results: list[Eventually[BatchResult]]
    ) -> BatchAnswer:
        items = self._batch_body(batch.request.body).notifications
        while batch.unsent:
            known = [await settled(result) for result in results]
            batch.unsent = False
            results = self._one_by_one(batch, items, [*known])
        return await self._when_all_are_known(results)

    def _in_runs(
        self,
        batch: _Batch,
        bodies: Sequence[ItemT],
        plain: Callable[[ItemT, float], Notification | None],
    ) -> list[Eventually[BatchResult]]:
        """The items in their order, those that follow each other and are plain events to a user at
        once: what `plain` makes of them.
        """
        results: list[Eventually[BatchResult]] = []
        run: list[UserSend] = []
        items: Sequence[Raw] = ()
        now = self._clock()
        for index, body in enumerate(bodies):
            notification = plain(body, now)
            if notification is not None:
                run.append((body.target.value, notification))  # type: ignore[arg-type]  # a str
                continue
            if run:
                self._send_run(batch, run, results)
                run = []
            if not items:
                items = self._batch_body(batch.request.body).notifications
            results.append(self._item(batch, index, items[index]))
            if batch.unsent:
                return results
        if run:
            self._send_run(batch, run, results)
        return results

    def _plain(self, body: NotificationBody, now: float) -> Notification | None:
        """What is sent, where it is an event for one user and nothing special. Whatever may
        be wrong is left for `_item` to find.
        """
        if (
            body.target.type != "user"
            or not isinstance(body.target.value, str)
            or body.event_type is None
            or body.payload is MISSING
            or body.template_id is not None
            or body.variables is not MISSING
            or body.priority is not None
            or body.audience is not None
            or body.idempotency_key is not None
            or body.id is not None
            or body.exclude_connection is not None
        ):
            return None
        return self._made(body, now)

    def _made(self, body: NotificationBody | _PlainItem, now: float) -> Notification | None:
        """`_plain` of what is an event for one user, and nothing special."""
        payload = payload_of_compact(body.payload)
        if payload is None or not is_user_id(body.target.value):  # type: ignore[arg-type]  # a str
            return None
        return Notification(
            self._new_id(),
            now,
            body.event_type,  # type: ignore[arg-type]  # it has one
            payload,
            Priority.NORMAL,
            body.ttl,
            body.correlation_id,
            DEFAULT_SOURCE if body.source is None else body.source,
            EVERYONE,
            body.require_ack,
        )

    def _send_run(
        self, batch: _Batch, run: Sequence[UserSend], results: list[Eventually[BatchResult]]
    ) -> None:
        request = batch.request
        for receipt in self._dispatch_each(request.tenant, run, source=request.source):
            index = len(results)
            if isinstance(receipt, Receipt):
                results.append(_item_result(index, receipt))
            elif isinstance(receipt, Exception):
                results.append(self._bad_item(batch, index, receipt))
            else:
                later = _item_result_later(index, receipt)
                results.append(self._item_awaited(batch, index, later))

    async def _when_all_are_known(self, results: Sequence[Eventually[BatchResult]]) -> BatchAnswer:
        return self._summary([await settled(result) for result in results])

    def _until_error(self, batch: _Batch, items: Sequence[Raw]) -> Eventually[BatchAnswer]:
        results: list[BatchResult] = []
        for index, item in enumerate(items):
            result = self._item(batch, index, item)
            if is_awaitable(result):
                return self._until_error_later(batch, items, results, result)
            results.append(result)
            if results[-1].stops:
                break
        return self._summary(results + _not_reached(len(results), len(items)))

    async def _until_error_later(
        self,
        batch: _Batch,
        items: Sequence[Raw],
        results: list[BatchResult],
        pending: Awaitable[BatchResult],
    ) -> BatchAnswer:
        results.append(await pending)
        while not results[-1].stops and len(results) < len(items):
            results.append(await settled(self._item(batch, len(results), items[len(results)])))
        return self._summary(results + _not_reached(len(results), len(items)))

    def _item(self, batch: _Batch, index: int, raw: Raw) -> Eventually[BatchResult]:
        """One item; whatever is wrong with it is its own result."""
        try:
            body = self._notification_body.item(raw)
            target = target_in(body.target)
            built = self._build(batch.request.tenant, body)
            if body.template_id is not None and is_awaitable(built):
                item = _Item(batch, index, raw, body, target)
                batch.unsent = True
                return self._item_awaited(batch, index, self._item_later(item, built))
            if batch.deduplicate or body.idempotency_key is not None or body.id is not None:
                item = _Item(batch, index, raw, body, target)
                result = self._item_built(item, built)  # type: ignore[arg-type]  # see eventually.py
                if not is_awaitable(result):
                    return result
                # Where it waits for its key.
                batch.unsent = body.idempotency_key is not None or body.id is not None
                return self._item_awaited(batch, index, result)
            receipt = self._dispatch(
                batch.request.tenant,
                target,
                built,  # type: ignore[arg-type]  # see eventually.py
                exclude_connection=excluded(body),
                source=batch.request.source,
            )
            if isinstance(receipt, Receipt):
                return _item_result(index, receipt)
            return self._item_awaited(batch, index, _item_result_later(index, receipt))
        except Exception as error:  # noqa: BLE001  # the item's own result, and logged where it is our fault
            return self._bad_item(batch, index, error)

    async def _item_awaited(
        self, batch: _Batch, index: int, pending: Awaitable[BatchResult]
    ) -> BatchResult:
        try:
            return await pending
        except Exception as error:  # noqa: BLE001  # as above
            return self._bad_item(batch, index, error)

    async def _item_later(self, item: _Item, built: Awaitable[Notification]) -> BatchResult:
        return await settled(self._item_built(item, await built))

    def _item_built(self, item: _Item, notification: Notification) -> Eventually[BatchResult]:
        batch = item.batch
        if not batch.deduplicate:
            return self._item_sent(item, notification)
        what = batch.subject(item.target, notification.event_type)
        if what in batch.seen:
            return _skipped_item(item.index, success=True)
        batch.seen.add(what)
        try:
            result = self._item_sent(item, notification)
        except Exception:
            # It was refused, so that the next one like it repeats nothing.
            batch.seen.discard(what)
            raise
        if isinstance(result, BatchResult) and result.notification_id == NO_ID:
            batch.seen.discard(what)
        return result

    def _item_sent(self, item: _Item, notification: Notification) -> Eventually[BatchResult]:
        batch, body = item.batch, item.body
        if body.idempotency_key is not None or body.id is not None:
            return self._item_once(item, notification)
        receipt = self._dispatch(
            batch.request.tenant,
            item.target,
            notification,
            exclude_connection=excluded(body),
            source=batch.request.source,
        )
        return then(receipt, lambda receipt: _item_result(item.index, receipt))

    def _item_once(self, item: _Item, notification: Notification) -> Eventually[BatchResult]:
        request, body, whole = item.batch.request, item.body, bytes(item.raw)
        attempt = partial(
            self._guard.attempt,
            request,
            lambda request: self._send(request, body, item.target, notification),
        )
        if body.id is not None:
            attempt = partial(self._guard.once, request, "item id", notification.id, whole, attempt)
        if body.idempotency_key is not None:
            key = idempotency_key_text(body.idempotency_key.encode(), "idempotency_key")
            attempt = partial(self._guard.once, request, "item key", key, whole, attempt)
        return then(attempt(), lambda answer: _kept_result(item.index, answer))

    def _bad_item(self, batch: _Batch, index: int, error: Exception) -> BatchResult:
        known = self._guard.told(batch.request, error)
        return _failed_item(index, known.message)

    def _summary(self, results: list[BatchResult]) -> BatchAnswer:
        skipped = succeeded = delivered_to = 0
        for result in results:
            if result.skipped:
                skipped += 1
            elif result.success:
                succeeded += 1
            delivered_to += result.delivered_to
        failed = len(results) - succeeded - skipped
        return BatchAnswer(
            self._new_id(),
            results,
            BatchSummary(len(results), succeeded, failed, skipped, delivered_to),
            timestamp_text(self._clock()),
        )


class _Batch:
    """What the items of one batch share. `unsent`: the last of them waits, and is not sent yet;
    `seen`: what was sent, where repetitions are skipped."""

    __slots__ = ("deduplicate", "request", "seen", "unsent")

    def __init__(self, request: Request, deduplicate: bool) -> None:
        self.request = request
        self.deduplicate = deduplicate
        self.unsent = False
        self.seen: set[tuple[str, tuple[str, ...], str]] = set()

    @staticmethod
    def subject(target: Target, event_type: str) -> tuple[str, tuple[str, ...], str]:
        """What makes an item a repetition of another."""
        return target.type, tuple(sorted(target.names)), event_type


class _Item(msgspec.Struct, frozen=True):
    """One item of a batch, decoded; `raw` is its text."""

    batch: _Batch
    index: int
    raw: Raw
    body: NotificationBody
    target: Target


def _skipped_item(index: int, *, success: bool, error: str | None = None) -> BatchResult:
    return BatchResult(
        index=index,
        success=success,
        notification_id=NO_ID,
        delivered_to=0,
        failed=0,
        queued=0,
        error=error,
        skipped=True,
    )


def _item_result(index: int, receipt: Receipt) -> BatchResult:
    return BatchResult(
        index,
        receipt.success,
        receipt.notification_id,
        receipt.delivered_to,
        receipt.failed,
        receipt.queued,
        receipt.outcome,
        receipt.reason,
    )


async def _item_result_later(index: int, pending: Awaitable[Receipt]) -> BatchResult:
    return _item_result(index, await pending)


class _Kept(msgspec.Struct, frozen=True):
    """What an item's result needs of a SendAnswer."""

    success: bool
    notification_id: str
    delivered_to: int
    failed: int
    queued: int
    outcome: Outcome
    reason: str | None = None


_decode_kept = msgspec.json.Decoder(_Kept).decode
_decode_error = msgspec.json.Decoder(ErrorAnswer).decode


def _kept_result(index: int, answer: Answer) -> BatchResult:
    if answer.status != 200:
        return _failed_item(index, _decode_error(answer.body).error.message)
    kept = _decode_kept(answer.body)
    return BatchResult(
        index=index,
        success=kept.success,
        notification_id=kept.notification_id,
        delivered_to=kept.delivered_to,
        failed=kept.failed,
        queued=kept.queued,
        outcome=kept.outcome,
        error=kept.reason,
    )


def _failed_item(index: int, message: str) -> BatchResult:
    return BatchResult(
        index=index,
        success=False,
        notification_id=NO_ID,
        delivered_to=0,
        failed=0,
        queued=0,
        outcome=Outcome.FAILED,
        error=message,
    )


def _not_reached(start: int, end: int) -> list[BatchResult]:
    reason = "Not sent: stop_on_error, and an earlier one failed."
    return [_skipped_item(index, success=False, error=reason) for index in range(start, end)]
