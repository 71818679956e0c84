"""What the server answers, as structs; fields that a newer server adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec


class RecipientResult(msgspec.Struct, frozen=True):
    """What became of one user of a `users` target; `connections` took it."""

    outcome: str
    connections: int = 0
    reason: str | None = None


class ChannelResult(msgspec.Struct, frozen=True):
    """How many connections took it for one channel of a `channels` target."""

    delivered_to: int = 0


class Receipt(msgspec.Struct, frozen=True):
    """What became of a notification.

    `outcome` is the best of its recipients' (`delivered`, `routed`, `queued`, `nobody`, `filtered`,
    `expired`, `failed`) and the one to look at; `success` is delivered_to + routed + queued > 0.
    `delivered_to` and `routed` count connections (of a channel or a broadcast, `routed` counts the
    nodes that are silent), `queued` and `failed` recipients. `results` is filled for `users`,
    `channels` and `total_delivered` for `channels`; `hint` in development only.
    """

    success: bool
    notification_id: str
    timestamp: datetime
    outcome: str = ""
    delivered_to: int = 0
    routed: int = 0
    queued: int = 0
    failed: int = 0
    reason: str | None = None
    hint: str | None = None
    channel: str | None = None
    channels: dict[str, ChannelResult] = {}
    total_delivered: int | None = None
    results: dict[str, RecipientResult] = {}


class BatchResult(msgspec.Struct, frozen=True):
    """What became of the item at `index`; `error` says why a bad one was refused.

    One that was skipped, or not reached after `stop_on_error`, has no outcome.
    """

    index: int
    success: bool = False
    notification_id: str | None = None
    delivered_to: int = 0
    queued: int = 0
    failed: int = 0
    outcome: str | None = None
    skipped: bool = False
    error: str | None = None


class BatchSummary(msgspec.Struct, frozen=True):
    """The sums over a batch."""

    total: int
    succeeded: int
    failed: int
    skipped: int = 0
    total_delivered: int = 0


class BatchReceipt(msgspec.Struct, frozen=True):
    """What became of a batch; a bad item fails alone."""

    batch_id: str
    results: list[BatchResult]
    summary: BatchSummary
    timestamp: datetime


class ChannelInfo(msgspec.Struct, frozen=True):
    """A channel that somebody is subscribed to; `created_at` is not told in lists."""

    name: str
    subscriber_count: int
    created_at: datetime | None = None


class ChannelList(msgspec.Struct, frozen=True):
    """All channels that somebody is subscribed to."""

    channels: list[ChannelInfo]
    total_channels: int


class UserSubscriptions(msgspec.Struct, frozen=True):
    """What a connected user is subscribed to, over all his connections."""

    user_id: str
    connection_count: int
    subscriptions: list[str]


class ConnectionInfo(msgspec.Struct, frozen=True):
    """One of a user's devices; `address` and `user_agent` are what it told."""

    id: str
    transport: str = ""
    address: str | None = None
    user_agent: str | None = None
    since: datetime | None = None
    last_heard: datetime | None = None


class ConnectionList(msgspec.Struct, frozen=True):
    """A user's devices."""

    connections: list[ConnectionInfo]
    user_id: str = ""


class Presence(msgspec.Struct, frozen=True):
    """How many connections each of the users asked about has."""

    online: dict[str, int]


class TenantLimits(msgspec.Struct, frozen=True):
    """What a tenant may have at a node."""

    max_connections: int
    max_connections_per_user: int
    max_subscriptions_per_connection: int


class TenantSums(msgspec.Struct, frozen=True):
    """Of a day and a month, in UTC."""

    today: int
    this_month: int


class Tenant(msgspec.Struct, frozen=True):
    """A tenant's figures; `notifications` and `deliveries` are None while the server's store does
    not answer."""

    id: str
    connections: int
    users: int
    channels: int
    limits: TenantLimits
    notifications: TenantSums | None = None
    deliveries: TenantSums | None = None


class TenantList(msgspec.Struct, frozen=True):
    """All tenants."""

    tenants: list[Tenant]
    total: int


class TenantLimitsSet(msgspec.Struct, frozen=True):
    """The limits that a tenant has from now on."""

    id: str
    limits: TenantLimits


class Token(msgspec.Struct, frozen=True):
    """A user's JWT, minted by the server."""

    token: str
    expires_at: datetime


class Template(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a notification is made of: `{{name}}` stands for a variable; `ttl` is in seconds.

    `created_at` and `updated_at` are the server's and None in one that is to be created.
    """

    id: str
    name: str
    event_type: str
    payload_template: Any
    priority: str | None = None
    ttl: int | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class TemplateList(msgspec.Struct, frozen=True):
    """All templates."""

    templates: list[Template]


class AckReceipt(msgspec.Struct, frozen=True):
    """Which notifications are settled now, and which the server does not know."""

    acked: list[str]
    refused: list[str] = []


class Health(msgspec.Struct, frozen=True):
    """`status` is `healthy` or `degraded`; the parts are told to keys with `read` only."""

    status: str
    version: str = ""
    uptime_seconds: float = 0.0
    redis: Any = None
    postgres: Any = None
    connections: Any = None
    queue: Any = None
    cluster: Any = None
