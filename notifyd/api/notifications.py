"""The publishing calls: bodies -> notifications -> dispatch -> receipts as callers see them."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw

from notifyd.api.decoding import Decoder
from notifyd.api.guard import (
    MAX_BODY_BYTES,
    Answer,
    Description,
    Endpoint,
    ErrorAnswer,
    Guard,
    Handler,
    Request,
    idempotency_key_text,
)
from notifyd.dispatch.dispatcher import Dispatcher, UserSend
from notifyd.errors import ValidationError
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.identifiers import canonical_uuid, timestamp_text
from notifyd.names import channel_name, is_user_id, user_id
from notifyd.notification import (
    EVERYONE,
    Audience,
    AudienceType,
    Notification,
    Outcome,
    Priority,
    Receipt,
    RecipientResult,
    Target,
    TargetType,
)
from notifyd.templates import Template, TemplateStore, render
from notifyd.wire import normalise_payload, payload_of_compact

T = TypeVar("T")

MAX_BATCH_BYTES = 1_048_576
MAX_USERS_BYTES = 4_194_304
MAX_USERS = 10_000
MAX_CHANNELS = 100
MAX_ITEMS = 100
MAX_TTL = 31_536_000
DEFAULT_SOURCE = "http-api"
NO_ID = "00000000-0000-0000-0000-000000000000"
"""Stands for the id of what was never sent, as Ara has it."""

MISSING = Raw()
"""What `payload` and `variables` are where they were left out."""


def _missing() -> Raw:
    return MISSING


# --- what comes in ------------------------------------------------------------------------------

PriorityName = Annotated[
    str,
    Meta(
        description="In any case.",
        extra_json_schema={"enum": [priority.value for priority in Priority]},
    ),
]
EventType = Annotated[str, Meta(min_length=1, max_length=128, examples=["order.created"])]
Ttl = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_TTL,
        description="Seconds; 0: only who is connected now, and never stored.",
        examples=[3600],
    ),
]
# With these two at their longest, what goes with a payload stays within a few kilobytes.
ShortText = Annotated[str, Meta(max_length=512)]
UserId = Annotated[str, Meta(description="1 to 256 printable characters.", examples=["user-1"])]
ChannelName = Annotated[
    str,
    Meta(description="1 to 64 of letters, digits, - _ . and, inside, :", examples=["orders"]),
]


class AudienceBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Narrows who receives: roles, user ids or channels, never told to recipients."""

    type: Annotated[
        str,
        Meta(
            description="In any case.",
            extra_json_schema={"enum": ["All", "Roles", "Users", "Channels"]},
        ),
    ]
    value: Annotated[list[str], Meta(max_length=MAX_USERS)] | None = None


class Content(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """What is sent: either `event_type` and `payload`, or `template_id` and `variables`."""

    event_type: EventType | None = None
    payload: Annotated[
        Raw, Meta(description="Any JSON, nested at most 64 deep.", examples=[{"order_id": "A-1"}])
    ] = msgspec.field(default_factory=_missing)
    template_id: str | None = None
    variables: Annotated[
        Raw,
        Meta(
            description="An object with what the template's placeholders stand for.",
            extra_json_schema={"type": "object"},
        ),
    ] = msgspec.field(default_factory=_missing)
    priority: PriorityName | None = None
    ttl: Ttl | None = None
    correlation_id: ShortText | None = None
    source: ShortText | None = None
    audience: AudienceBody | None = None
    idempotency_key: (
        Annotated[str, Meta(description="As the header Idempotency-Key; 1 to 256 bytes.")] | None
    ) = None
    id: (
        Annotated[
            str,
            Meta(
                description="The notification's id, chosen by the caller; repeated, it acts as an "
                "idempotency key.",
                extra_json_schema={"format": "uuid"},
            ),
        ]
        | None
    ) = None
    exclude_connection: (
        Annotated[
            str,
            Meta(
                description="The id of a connection that does not get it: the sender's own.",
                extra_json_schema={"format": "uuid"},
            ),
        ]
        | None
    ) = None
    require_ack: Annotated[
        bool,
        Meta(description="Each recipient of a channel or broadcast is expected to ack."),
    ] = False


def excluded(content: Content) -> str | None:
    """The id of the connection that does not get it, None where all may. Raises ValidationError."""
    id = content.exclude_connection
    return None if id is None else canonical_uuid(id, "exclude_connection")


class SendBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to one user."""

    target_user_id: UserId


class SendToUsersBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to several users."""

    target_user_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_USERS)]


class BroadcastBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to everybody who is connected."""


class ChannelBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to a channel's subscribers."""

    channel: ChannelName


class ChannelsBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to the subscribers of several channels; each connection gets it once."""

    channels: Annotated[list[str], Meta(min_length=1, max_length=MAX_CHANNELS)]


class TargetBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Whom it is for: a `user`, `users`, a `channel`, `channels`, or everybody (`broadcast`)."""

    type: Annotated[
        str,
        Meta(
            description="In any case.",
            extra_json_schema={"enum": ["user", "users", "broadcast", "channel", "channels"]},
        ),
    ]
    value: Annotated[
        str | Annotated[list[str], Meta(max_length=MAX_USERS)] | None,
        Meta(description="A name; a list of them for users and channels; nothing for a broadcast."),
    ] = None


class NotificationBody(Content, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One notification to a target of any type: an item of a batch, or a call of its own."""

    target: TargetBody


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


_decode_whole_batch = msgspec.json.Decoder(_WholeBatchBody).decode


def _whole_batch(data: bytes) -> _WholeBatchBody | None:
    """A batch in one pass, its payloads without whitespace; None where it or any item is wrong, or
    its options ask for one item after the other.
    """
    try:
        if not data.isascii():
            data.decode()
        body = _decode_whole_batch(msgspec.json.format(data, indent=-1))
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


# --- what goes out ------------------------------------------------------------------------------


class SendAnswer(msgspec.Struct, gc=False, omit_defaults=True):
    """What became of a notification.

    `outcome` is the best of its recipients'. `delivered_to` and `routed` count connections (of a
    channel or a broadcast, `routed` counts the nodes that are silent), `queued` and `failed`
    recipients; `success` is delivered_to + routed + queued > 0. `reason` says why the one recipient
    failed; `hint`, in development, why nobody was reached.
    """

    success: bool
    notification_id: str
    delivered_to: int
    failed: int
    timestamp: str
    outcome: Outcome
    routed: int
    queued: int
    reason: str | None = None
    hint: str | None = None


class SendToUsersAnswer(SendAnswer, gc=False, kw_only=True, omit_defaults=True):
    """What became of a notification, and of each of its recipients."""

    results: dict[str, RecipientResult]


class ChannelAnswer(SendAnswer, gc=False, kw_only=True, omit_defaults=True):
    """What became of a notification to a channel."""

    channel: str


class ChannelCount(msgspec.Struct, gc=False):
    """Subscribers of one channel that took it."""

    delivered_to: int


class ChannelsAnswer(SendAnswer, gc=False, kw_only=True, omit_defaults=True):
    """What became of a notification to several channels.

    `total_delivered` counts a connection on several of them once.
    """

    channels: dict[str, ChannelCount]
    total_delivered: int


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


# --- from one to the other ----------------------------------------------------------------------


class Composer:
    """Makes notifications of what callers send, whichever way it came in.

    `source` is what a notification says that does not name its own; `clock` gives Unix seconds,
    `new_id` a UUID's text.
    """

    __slots__ = ("_clock", "_new_id", "_source", "_templates")

    def __init__(
        self,
        templates: TemplateStore,
        *,
        source: str = DEFAULT_SOURCE,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._templates = templates
        self._source = source
        self._clock = clock
        self._new_id = new_id

    def __call__(
        self, tenant: str, content: Content, entry: str | None = None, at: float | None = None
    ) -> Eventually[Notification]:
        """The notification, whole and checked; raises ValidationError and NotFound.

        `entry` is that of a stream, and its id where the content has none, `at` when it occurred
        (Unix seconds); else a new one, and now.
        """
        if content.template_id is None:
            event_type = content.event_type
            if event_type is None or content.payload is MISSING or content.variables is not MISSING:
                raise _incomplete(content)
            payload = normalise_payload(content.payload)
            return self._notification(
                content, event_type, payload, Priority.NORMAL, None, entry, at
            )
        if content.event_type is not None or content.payload is not MISSING:
            raise _incomplete(content)
        return then(
            self._templates.get(tenant, content.template_id),
            lambda template: self._filled_in(content, template, entry, at),
        )

    def _filled_in(
        self, content: Content, template: Template, entry: str | None, at: float | None
    ) -> Notification:
        variables = b"{}" if content.variables is MISSING else bytes(content.variables)
        payload = render(template, variables)
        return self._notification(
            content, template.event_type, payload, template.priority, template.ttl, entry, at
        )

    def _notification(
        self,
        content: Content,
        event_type: str,
        payload: Raw,
        priority: Priority,
        ttl: int | None,
        entry: str | None,
        at: float | None,
    ) -> Notification:
        """What the caller says counts before what his template says."""
        return Notification(
            canonical_uuid(content.id) if content.id is not None else entry or self._new_id(),
            self._clock() if at is None else at,
            event_type,
            payload,
            priority if content.priority is None else priority_named(content.priority),
            ttl if content.ttl is None else content.ttl,
            content.correlation_id,
            self._source if content.source is None else content.source,
            EVERYONE if content.audience is None else _audience(content.audience),
            content.require_ack,
            entry,
        )


class Publishing:
    """The handlers of the publishing calls.

    `clock` gives Unix seconds, `new_id` a UUID's text. In development an answer that reached nobody
    says why.
    """

    def __init__(
        self,
        guard: Guard,
        dispatcher: Dispatcher,
        templates: TemplateStore,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._guard = guard
        self._dispatch = dispatcher.dispatch
        self._dispatch_each = dispatcher.dispatch_each
        self._build = Composer(templates, clock=clock, new_id=new_id)
        self._clock = clock
        self._new_id = new_id
        self._notification_body = Decoder(NotificationBody)
        self._send_body = Decoder(SendBody)
        self._users_body = Decoder(SendToUsersBody)
        self._broadcast_body = Decoder(BroadcastBody)
        self._channel_body = Decoder(ChannelBody)
        self._channels_body = Decoder(ChannelsBody)
        self._batch_body = _decode_batch

    def endpoints(self) -> list[Endpoint]:
        """The seven calls."""
        calls: list[tuple[str, Handler, type, type, str]] = [
            ("", self.notification, NotificationBody, SendAnswer, "Send one notification"),
            ("/send", self.send, SendBody, SendAnswer, "Send to a user"),
            (
                "/send-to-users",
                self.send_to_users,
                SendToUsersBody,
                SendToUsersAnswer,
                "Send to several users",
            ),
            ("/broadcast", self.broadcast, BroadcastBody, SendAnswer, "Send to all connected"),
            ("/channel", self.channel, ChannelBody, ChannelAnswer, "Send to a channel"),
            ("/channels", self.channels, ChannelsBody, ChannelsAnswer, "Send to several channels"),
            ("/batch", self.batch, BatchBody, BatchAnswer, "Send up to 100 notifications"),
        ]
        limits = {"/send-to-users": MAX_USERS_BYTES, "/batch": MAX_BATCH_BYTES}
        return [
            Endpoint(
                self._guard,
                "POST",
                "/api/v1/notifications" + path,
                handler,
                Description(summary, "Publishing", body, answer, (404, 503)),
                access="publish",
                max_body=limits.get(path, MAX_BODY_BYTES),
                idempotent=True,
            )
            for path, handler, body, answer, summary in calls
        ]

    # --- one notification ---

    def notification(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications."""
        body = self._notification_body(request.body)
        return self._publish(request, body, _target(body.target))

    def send(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/send."""
        body = self._send_body(request.body)
        return self._publish(
            request, body, Target("user", (user_id(body.target_user_id, "target_user_id"),))
        )

    def send_to_users(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/send-to-users."""
        body = self._users_body(request.body)
        names = checked_names(body.target_user_ids, user_id, "target_user_ids")
        return self._publish(request, body, Target("users", names))

    def broadcast(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/broadcast."""
        return self._publish(request, self._broadcast_body(request.body), _BROADCAST)

    def channel(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/channel."""
        body = self._channel_body(request.body)
        return self._publish(request, body, Target("channel", (channel_name(body.channel),)))

    def channels(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/channels."""
        body = self._channels_body(request.body)
        names = checked_names(body.channels, channel_name, "channels")
        return self._publish(request, body, Target("channels", names))

    def _publish(
        self, request: Request, content: Content, target: Target
    ) -> Eventually[msgspec.Struct]:
        if content.idempotency_key is None and content.id is None:
            return self._send(request, content, target)
        attempt = partial(
            self._guard.attempt, request, lambda request: self._send(request, content, target)
        )
        if content.id is not None:
            id = canonical_uuid(content.id)
            attempt = partial(self._guard.once, request, "id", id, request.body, attempt)
        if (key := _field_key(request, content.idempotency_key)) is not None:
            return self._guard.once(request, "key", key, request.body, attempt)
        return attempt()

    def _send(self, request: Request, content: Content, target: Target) -> Eventually[SendAnswer]:
        built = self._build(request.tenant, content)
        if content.template_id is not None and is_awaitable(built):
            return self._send_later(request, content, target, built)
        return self._sent(request, content, target, built)  # type: ignore[arg-type]  # see eventually.py

    async def _send_later(
        self, request: Request, content: Content, target: Target, built: Awaitable[Notification]
    ) -> SendAnswer:
        return await settled(self._sent(request, content, target, await built))

    def _sent(
        self, request: Request, content: Content, target: Target, notification: Notification
    ) -> Eventually[SendAnswer]:
        receipt = self._dispatch(
            request.tenant,
            target,
            notification,
            exclude_connection=excluded(content),
            source=request.source,
        )
        if isinstance(receipt, Receipt):
            return self._answer(target, notification, receipt)
        return self._answer_later(target, notification, receipt)

    async def _answer_later(
        self, target: Target, notification: Notification, pending: Awaitable[Receipt]
    ) -> SendAnswer:
        return self._answer(target, notification, await pending)

    def _answer(self, target: Target, notification: Notification, receipt: Receipt) -> SendAnswer:
        shared = (
            receipt.success,
            receipt.notification_id,
            receipt.delivered_to,
            receipt.failed,
            timestamp_text(notification.occurred_at),
            receipt.outcome,
            receipt.routed,
            receipt.queued,
            receipt.reason,
            None if self._guard.production or receipt.success else _hint(target, receipt),
        )
        type = target.type
        if type == "channel":
            return ChannelAnswer(*shared, channel=target.names[0])
        if type == "users":
            return SendToUsersAnswer(*shared, results=receipt.results or {})
        if type == "channels":
            taken = receipt.channels or {}
            return ChannelsAnswer(
                *shared,
                channels={name: ChannelCount(taken.get(name, 0)) for name in target.names},
                total_delivered=receipt.delivered_to,
            )
        return SendAnswer(*shared)

    # --- a batch ---

    def batch(self, request: Request) -> Eventually[msgspec.Struct]:
        """POST /api/v1/notifications/batch."""
        body = _whole_batch(request.body) or self._batch_body(request.body)
        key = _field_key(request, body.idempotency_key)
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
        self, request: Request, body: BatchBody | _WholeBatchBody
    ) -> Eventually[BatchAnswer]:
        batch = _Batch(request, body.options.deduplicate)
        if isinstance(body, _WholeBatchBody):
            results = self._in_runs(batch, body.notifications)
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
        self, batch: _Batch, bodies: Sequence[NotificationBody]
    ) -> list[Eventually[BatchResult]]:
        """The items in their order, those that follow each other and are plain events to a user at
        once.
        """
        results: list[Eventually[BatchResult]] = []
        run: list[UserSend] = []
        items: Sequence[Raw] = ()
        now = self._clock()
        for index, body in enumerate(bodies):
            notification = self._plain(body, now)
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
        user = body.target.value
        event_type = body.event_type
        if (
            body.target.type != "user"
            or not isinstance(user, str)
            or not is_user_id(user)
            or event_type is None
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
        payload = payload_of_compact(body.payload)
        if payload is None:
            return None
        return Notification(
            self._new_id(),
            now,
            event_type,
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
            target = _target(body.target)
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
        batch, body = item.batch, item.body
        if batch.deduplicate and batch.repeats(item.target, notification.event_type):
            return _skipped_item(item.index, success=True)
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
            lambda request: self._sent(request, body, item.target, notification),
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
    """What the items of one batch share. `unsent`: the last of them waits, and is not sent yet."""

    __slots__ = ("_seen", "deduplicate", "request", "unsent")

    def __init__(self, request: Request, deduplicate: bool) -> None:
        self.request = request
        self.deduplicate = deduplicate
        self.unsent = False
        self._seen: set[tuple[str, tuple[str, ...], str]] = set()

    def repeats(self, target: Target, event_type: str) -> bool:
        """Whether an earlier item had this target and event type; this one is remembered."""
        key = (target.type, tuple(sorted(target.names)), event_type)
        if key in self._seen:
            return True
        self._seen.add(key)
        return False


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


# --- checks -------------------------------------------------------------------------------------


def _cases(name: str) -> tuple[str, str]:
    """As it is written, and as a name in any other case is looked up."""
    return name, name.lower()


_PRIORITIES = {name: priority for priority in Priority for name in _cases(priority.value)}
_AUDIENCES: dict[str, AudienceType] = {
    name: type for type in get_args(AudienceType) for name in _cases(type)
}
_TARGET_TYPES: dict[str, TargetType] = {
    name: type for type in get_args(TargetType) for name in _cases(type)
}
_BROADCAST = Target("broadcast")


def priority_named(name: str) -> Priority:
    """The priority of that name, in any case; raises ValidationError."""
    return _choice(name, _PRIORITIES, "priority")


def _choice(name: str, choices: Mapping[str, T], field: str) -> T:
    found = choices.get(name) or choices.get(name.lower())
    if found is None:
        names = list(dict.fromkeys(choices.values()))
        constraint = "one of " + ", ".join(
            name.value if isinstance(name, enum.Enum) else str(name) for name in names
        )
        raise ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)
    return found


def checked_names(
    names: Sequence[str], check: Callable[[str, str], str], field: str
) -> tuple[str, ...]:
    """Names without repetition, each checked; raises ValidationError naming the first bad one."""
    try:
        return tuple({check(name, field): None for name in names})
    except ValidationError:
        for index, name in enumerate(names):
            check(name, f"{field}[{index}]")
        raise


def _target(body: TargetBody) -> Target:
    return target_of(body.type, body.value, "target.type", "target.value")


def target_of(type_name: str, value: str | list[str] | None, type_field: str, field: str) -> Target:
    """The target of a type, in any case, and a name or names; raises ValidationError for the
    fields.
    """
    type = _choice(type_name, _TARGET_TYPES, type_field)
    match type:
        case "user":
            if isinstance(value, str):
                return Target(type, (user_id(value, field),))
            raise _target_value(field, "a user id")
        case "channel":
            if isinstance(value, str):
                return Target(type, (channel_name(value, field),))
            raise _target_value(field, "a channel name")
        case "broadcast":
            if value is None:
                return _BROADCAST
            raise _target_value(field, "left out for a broadcast")
        case "users":
            if isinstance(value, list) and 1 <= len(value) <= MAX_USERS:
                return Target(type, checked_names(value, user_id, field))
            raise _target_value(field, f"a list of 1 to {MAX_USERS} user ids")
        case _:
            if isinstance(value, list) and 1 <= len(value) <= MAX_CHANNELS:
                return Target(type, checked_names(value, channel_name, field))
            raise _target_value(field, f"a list of 1 to {MAX_CHANNELS} channel names")


def _target_value(field: str, constraint: str) -> ValidationError:
    return ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)


def _audience(body: AudienceBody) -> Audience:
    type = _choice(body.type, _AUDIENCES, "audience.type")
    if type == "All":
        if body.value:
            raise _audience_value("left out for the type All")
        return EVERYONE
    if body.value is None:
        raise _audience_value(f"a list of {type.lower()}")
    if type == "Users":
        return Audience(type, frozenset(checked_names(body.value, user_id, "audience.value")))
    if type == "Channels":
        return Audience(type, frozenset(checked_names(body.value, channel_name, "audience.value")))
    return Audience(type, frozenset(body.value))


def _audience_value(constraint: str) -> ValidationError:
    return ValidationError(
        f"audience.value must be {constraint}.", field="audience.value", constraint=constraint
    )


def _incomplete(content: Content) -> ValidationError:
    """Why the content is neither an event nor a template."""
    if content.template_id is not None:
        field = "event_type" if content.event_type is not None else "payload"
        message = f"{field} and template_id exclude each other: a template makes both."
    elif content.event_type is None:
        field = "event_type"
        message = "Either event_type with payload, or template_id with variables, is needed."
    elif content.payload is MISSING:
        field = "payload"
        message = "payload is missing; any JSON will do, {} too."
    else:
        field = "variables"
        message = "variables fill a template; template_id is missing."
    constraint = "either event_type and payload, or template_id and variables"
    return ValidationError(message, field=field, constraint=constraint)


def _field_key(request: Request, key: str | None) -> str | None:
    """The idempotency key of the body, if it is to be looked at beside the header's."""
    if key is None:
        return None
    text = idempotency_key_text(key.encode(), "idempotency_key")
    if request.idempotency_key is None:
        return text
    if text != request.idempotency_key:
        raise ValidationError(
            "The header Idempotency-Key and the field idempotency_key differ.",
            field="idempotency_key",
            constraint="the same as the header, or one of the two",
        )
    return None


def _hint(target: Target, receipt: Receipt) -> str | None:
    match receipt.outcome:
        case Outcome.NOBODY if target.type == "broadcast":
            return "nobody is connected; /demo connects two users"
        case Outcome.NOBODY if target.type in {"channel", "channels"}:
            return f"nobody is subscribed to {_listed(target.names)}; see GET /api/v1/channels"
        case Outcome.NOBODY:
            return (
                f"{_listed(target.names)}: not connected, and nothing keeps it, because of "
                "ttl 0 or queue.enabled = false"
            )
        case Outcome.FILTERED:
            return "the audience, or exclude_connection, leaves nobody"
        case Outcome.EXPIRED:
            return "the ttl was over before it could be sent"
        case _:
            return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
