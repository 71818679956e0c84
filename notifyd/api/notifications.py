"""The publishing calls: bodies -> notifications -> dispatch -> receipts as callers see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from notifyd.api.batches import MAX_BATCH_BYTES, BatchAnswer, BatchBody, Batches
from notifyd.api.guard import (
    MAX_BODY_BYTES,
    Description,
    Endpoint,
    Guard,
    Handler,
    Request,
    field_key,
)
from notifyd.compose import (
    BROADCAST,
    MAX_CHANNELS,
    MAX_USERS,
    MAX_USERS_BYTES,
    Composer,
    Content,
    NotificationBody,
    checked_names,
    excluded,
    target_in,
)
from notifyd.decoding import Decoder
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.eventually import Eventually, is_awaitable, settled
from notifyd.identifiers import canonical_uuid, timestamp_text
from notifyd.names import channel_name, user_id
from notifyd.notification import Notification, Outcome, Receipt, RecipientResult, Target
from notifyd.templates import TemplateStore

UserId = Annotated[str, Meta(description="1 to 256 printable characters.", examples=["user-1"])]
ChannelName = Annotated[
    str,
    Meta(description="1 to 64 of letters, digits, - _ . and, inside, :", examples=["orders"]),
]


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
        self._build = Composer(templates, clock=clock, new_id=new_id)
        self._batches = Batches(
            guard, dispatcher, self._build, self._sent, clock=clock, new_id=new_id
        )
        self._notification_body = Decoder(NotificationBody)
        self._send_body = Decoder(SendBody)
        self._users_body = Decoder(SendToUsersBody)
        self._broadcast_body = Decoder(BroadcastBody)
        self._channel_body = Decoder(ChannelBody)
        self._channels_body = Decoder(ChannelsBody)

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
            (
                "/batch",
                self._batches.handle,
                BatchBody,
                BatchAnswer,
                "Send up to 100 notifications",
            ),
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
        return self._publish(request, body, target_in(body.target))

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
        return self._publish(request, self._broadcast_body(request.body), BROADCAST)

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
        if (key := field_key(request, content.idempotency_key)) is not None:
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
