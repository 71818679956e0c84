"""Every call of the HTTP API as a function that builds it, and nothing else.

A `Call` says what to send and how to read the answer; `Client` and `AsyncClient` only perform it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast
from urllib.parse import quote

import msgspec

from notifyd.client.results import (
    AckReceipt,
    BatchReceipt,
    ChannelInfo,
    ChannelList,
    ConnectionList,
    Health,
    Presence,
    Receipt,
    Template,
    TemplateList,
    Tenant,
    TenantLimitsSet,
    TenantList,
    Token,
    UserSubscriptions,
)

T = TypeVar("T")

MAX_KEY_BYTES = 256
"""What an idempotency key may have."""

Priority: TypeAlias = Literal["Low", "Normal", "High", "Critical"]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request to make, as often as need be, and how to read its answer.

    `repeatable`: whether it may be made again when nobody knows if the server acted on it, because
    acting twice is the same as once, or because the server knows it by its Idempotency-Key.
    `idempotency_key` is the caller's own; the header has one in any case.
    """

    method: str
    path: str
    decode: Callable[[bytes], T]
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    credential: Literal["key", "token"] = "key"
    repeatable: bool = True
    idempotency_key: str | None = None


class Audience(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Narrows who receives: `value` holds roles, user ids or channels."""

    type: Literal["All", "Roles", "Users", "Channels"]
    value: Sequence[str] = ()


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What to send and to whom: the arguments of `send`, and an item of `batch`.

    Exactly one of `user`, `users`, `channel`, `channels`, `broadcast`; either `event` with its
    `payload` (any JSON value; `{}` unless given) or `template` with its `variables`.
    `ttl` is in seconds, 0 for those connected now and nobody else. `id` is a UUID of the caller's.
    `exclude_connection` is the connection of the sender's own that need not hear of it.
    `require_ack`: each recipient of a channel or broadcast is expected to ack. Raises TypeError for
    another combination.
    """

    user: str | None = None
    users: Sequence[str] | None = None
    channel: str | None = None
    channels: Sequence[str] | None = None
    broadcast: bool = False
    event: str | None = None
    payload: Any = msgspec.UNSET
    template: str | None = None
    variables: Mapping[str, Any] | None = None
    priority: Priority | None = None
    ttl: int | None = None
    correlation_id: str | None = None
    source: str | None = None
    id: str | uuid.UUID | None = None
    exclude_connection: str | None = None
    require_ack: bool = False
    audience: Audience | Mapping[str, Any] | None = None
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise TypeError(f"exactly one of {', '.join(_TARGETS)} is needed, not {names}")
        if isinstance(self.users, str) or isinstance(self.channels, str):
            raise TypeError(f"{given[0]} takes a list; one name goes to {given[0][:-1]}")
        if (self.event is None) == (self.template is None):
            raise TypeError("either event (with payload) or template (with variables) is needed")
        if self.event is None and self.payload is not msgspec.UNSET:
            raise TypeError("a template makes its own payload; give it variables")
        if self.template is None and self.variables is not None:
            raise TypeError("variables fill a template; an event has a payload")

    @property
    def target(self) -> dict[str, Any]:
        """The target as a batch names it."""
        if self.broadcast:
            return {"type": "broadcast"}
        kind = next(name for name in _TARGETS if getattr(self, name) is not None)
        return {"type": kind, "value": getattr(self, kind)}

    @property
    def content(self) -> dict[str, Any]:
        """What the protocol calls content; what was not given is left out."""
        content: dict[str, Any] = {
            wire: value
            for wire, value in (
                ("event_type", self.event),
                ("template_id", self.template),
                ("variables", self.variables),
                ("priority", self.priority),
                ("ttl", self.ttl),
                ("correlation_id", self.correlation_id),
                ("source", self.source),
                ("id", self.id),
                ("exclude_connection", self.exclude_connection),
                ("audience", self.audience),
            )
            if value is not None
        }
        if self.event is not None:
            content["payload"] = {} if self.payload is msgspec.UNSET else self.payload
        if self.require_ack:
            content["require_ack"] = True
        return content


_TARGETS = ("user", "users", "channel", "channels", "broadcast")

_ROUTES = {
    "user": ("/api/v1/notifications/send", "target_user_id"),
    "users": ("/api/v1/notifications/send-to-users", "target_user_ids"),
    "channel": ("/api/v1/notifications/channel", "channel"),
    "channels": ("/api/v1/notifications/channels", "channels"),
}


def send(message: Message) -> Call[Receipt]:
    """Send one notification. Repeats carry the same Idempotency-Key, so it is sent once."""
    target = message.target
    if target["type"] == "broadcast":
        path, body = "/api/v1/notifications/broadcast", message.content
    else:
        path, name = _ROUTES[target["type"]]
        body = {name: target["value"], **message.content}
    return _publish(path, body, Receipt, message.idempotency_key)


def batch(
    messages: Sequence[Message],
    *,
    stop_on_error: bool = False,
    deduplicate: bool = False,
    idempotency_key: str | None = None,
) -> Call[BatchReceipt]:
    """Send 1 to 100 notifications in one request; each has a result of its own.

    `stop_on_error` stops at errors and failures, not at `nobody`; `deduplicate` skips a target
    repeated with the same event.
    """
    items = []
    for message in messages:
        item = {"target": message.target, **message.content}
        if message.idempotency_key is not None:
            item["idempotency_key"] = message.idempotency_key
        items.append(item)
    body = {
        "notifications": items,
        "options": {"stop_on_error": stop_on_error, "deduplicate": deduplicate},
    }
    path = "/api/v1/notifications/batch"
    return _publish(path, body, BatchReceipt, idempotency_key)


def notification_acks(notification_id: str) -> Call[dict[str, Any]]:
    """Who was expected to confirm a notification, and who has."""
    return _get(f"/api/v1/notifications/{_segment(notification_id)}/acks", dict[str, Any])


def ack(*notification_ids: str) -> Call[AckReceipt]:
    """Confirm notifications as their recipient: needs a token; for those who listen by SSE."""
    body = {"notification_ids": list(notification_ids)}
    return _post("/api/v1/acks", body, AckReceipt, credential="token")


def list_channels() -> Call[ChannelList]:
    """All channels that somebody is subscribed to."""
    return _get("/api/v1/channels", ChannelList)


def get_channel(name: str) -> Call[ChannelInfo]:
    """One channel; 404 where nobody is subscribed."""
    return _get(f"/api/v1/channels/{_segment(name)}", ChannelInfo)


def user_subscriptions(user: str) -> Call[UserSubscriptions]:
    """What a user is subscribed to; 404 where he is not connected."""
    return _get(f"/api/v1/users/{_segment(user)}/subscriptions", UserSubscriptions)


def user_connections(user: str) -> Call[ConnectionList]:
    """A user's devices."""
    return _get(f"/api/v1/users/{_segment(user)}/connections", ConnectionList)


def subscribe_user(user: str, channels: Sequence[str]) -> Call[dict[str, Any]]:
    """Subscribe a user's live connections; they are told. No channel rule is asked."""
    body = {"channels": channels}
    return _post(f"/api/v1/users/{_segment(user)}/subscribe", body, dict[str, Any])


def unsubscribe_user(user: str, channels: Sequence[str]) -> Call[dict[str, Any]]:
    """Unsubscribe a user's live connections; they are told."""
    body = {"channels": channels}
    return _post(f"/api/v1/users/{_segment(user)}/unsubscribe", body, dict[str, Any])


def disconnect_user(
    user: str, *, reason: str | None = None, revoke: bool = False
) -> Call[dict[str, Any]]:
    """Close all connections of a user with 4003; `revoke` refuses the tokens he has by now."""
    body: dict[str, Any] = {"revoke": revoke}
    if reason is not None:
        body["reason"] = reason
    return _post(f"/api/v1/users/{_segment(user)}/disconnect", body, dict[str, Any])


def disconnect(connection_id: str) -> Call[None]:
    """Close one connection with 4003; 404 where there is none."""
    return _delete(f"/api/v1/connections/{_segment(connection_id)}")


def presence(users: Sequence[str]) -> Call[Presence]:
    """How many connections each of 1 to 1,000 users has."""
    return _post("/api/v1/presence", {"user_ids": users}, Presence)


def create_token(
    user: str,
    *,
    ttl: int,
    roles: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    tenant: str | None = None,
) -> Call[Token]:
    """Have the server mint a JWT for a user; `ttl` in seconds. Needs a key with scope `admin`."""
    body: dict[str, Any] = {"user_id": user, "ttl": ttl}
    optional = {"roles": roles, "channels": channels, "tenant_id": tenant}
    body.update({name: value for name, value in optional.items() if value is not None})
    return _post("/api/v1/tokens", body, Token)


def create_template(template: Template) -> Call[Template]:
    """Keep a new template; 409 where its id is taken."""
    # After a lost answer a second one would be told that the id is taken, by ourselves.
    return _post("/api/v1/templates", template, Template, repeatable=False)


def replace_template(template: Template) -> Call[Template]:
    """Put another template under an id that is taken; 404 where it is not."""
    path = f"/api/v1/templates/{_segment(template.id)}"
    return Call("PUT", path, _decoder(Template), msgspec.json.encode(template), _JSON)


def list_templates() -> Call[TemplateList]:
    """All templates."""
    return _get("/api/v1/templates", TemplateList)


def get_template(id: str) -> Call[Template]:
    """One template; 404 where there is none."""
    return _get(f"/api/v1/templates/{_segment(id)}", Template)


def delete_template(id: str) -> Call[None]:
    """Forget a template; 404 where there is none."""
    return _delete(f"/api/v1/templates/{_segment(id)}")


def list_tenants() -> Call[TenantList]:
    """All tenants with their figures; for a key that is bound to none."""
    return _get("/api/v1/tenants", TenantList)


def get_tenant(id: str) -> Call[Tenant]:
    """A tenant's figures; 404 where there is none."""
    return _get(f"/api/v1/tenants/{_segment(id)}", Tenant)


def set_tenant_limits(
    id: str,
    *,
    max_connections: int | None = None,
    max_connections_per_user: int | None = None,
    max_subscriptions_per_connection: int | None = None,
) -> Call[TenantLimitsSet]:
    """Set a tenant's limits, which creates it; what is not given is as in the server's settings."""
    limits = {
        "max_connections": max_connections,
        "max_connections_per_user": max_connections_per_user,
        "max_subscriptions_per_connection": max_subscriptions_per_connection,
    }
    body = {name: value for name, value in limits.items() if value is not None}
    path = f"/api/v1/tenants/{_segment(id)}/limits"
    return Call("PUT", path, _decoder(TenantLimitsSet), msgspec.json.encode(body), _JSON)


def stats() -> Call[dict[str, Any]]:
    """The server's figures: connections, users, channels, messages, queue, acks."""
    return _get("/api/v1/stats", dict[str, Any])


def ack_stats() -> Call[dict[str, Any]]:
    """The figures of the ack ledger."""
    return _get("/api/v1/stats/acks", dict[str, Any])


def health() -> Call[Health]:
    """How the server is; its parts are told to keys with scope `read`."""
    return _get("/health", Health)


_JSON = {"Content-Type": "application/json"}


def _publish(path: str, body: Mapping[str, Any], answer: type[T], key: str | None) -> Call[T]:
    return replace(_post(path, body, answer, headers=_idempotent(key)), idempotency_key=key)


def _idempotent(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4()) if key is None else _header_text(key)}


def _header_text(key: str) -> str:
    """A key as a header can say it, the same each time."""
    # Outside ASCII a header has no agreed encoding, and spaces around its value are no part of it.
    inner = key.strip(" ")
    start = key.index(inner)
    before, behind = start, len(key) - start - len(inner)
    text = "%20" * before + quote(inner, safe=_VISIBLE) + "%20" * behind
    if len(text) > MAX_KEY_BYTES >= len(key.encode()):
        # The server takes the key itself, but not three bytes for each of its own.
        return f"sha256-{sha256(key.encode()).hexdigest()}"
    return text


_VISIBLE = "".join(map(chr, range(0x20, 0x7F)))


def _segment(name: str) -> str:
    """`name` as one segment of a path; the server matches raw paths."""
    if not name:
        raise ValueError("an empty name has no path")
    if name in {".", ".."}:
        # RFC 3986 6.2.2.3: these would be taken for steps in the path.
        return name.replace(".", "%2E")
    return quote(name, safe="")


def _decoder(answer: type[T]) -> Callable[[bytes], T]:
    return cast("Callable[[bytes], T]", msgspec.json.Decoder(answer).decode)


def _nothing(_: bytes) -> None:
    return None


def _get(path: str, answer: type[T]) -> Call[T]:
    return Call("GET", path, _decoder(answer))


def _delete(path: str) -> Call[None]:
    # After a lost answer a second one would be told 404 for what the first one removed.
    return Call("DELETE", path, _nothing, repeatable=False)


def _post(
    path: str,
    body: Mapping[str, Any] | msgspec.Struct,
    answer: type[T],
    *,
    headers: Mapping[str, str] | None = None,
    credential: Literal["key", "token"] = "key",
    repeatable: bool = True,
) -> Call[T]:
    return Call(
        "POST",
        path,
        _decoder(answer),
        msgspec.json.encode(body),
        {**_JSON, **(headers or {})},
        credential,
        repeatable,
    )
