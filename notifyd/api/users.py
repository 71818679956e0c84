"""Users and their connections: who is there, and what an administrator may do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from notifyd.api.channels import Time
from notifyd.api.guard import Answer, Description, Endpoint, Guard, Request, encode
from notifyd.api.notifications import UserId
from notifyd.api.others import Device as FoundDevice
from notifyd.api.others import Others, device_of
from notifyd.auth import TokenVerifier
from notifyd.compose import MAX_CHANNELS, checked_names
from notifyd.connections.connection import Connection
from notifyd.connections.lifecycle import Lifecycle
from notifyd.connections.registry import Registry
from notifyd.decoding import Decoder
from notifyd.errors import Forbidden, NotFound
from notifyd.eventually import Eventually, then
from notifyd.identifiers import canonical_uuid, timestamp_text
from notifyd.names import channel_name, user_id
from notifyd.wire import second_text

MAX_PRESENCE = 1000
DISCONNECTED = "Disconnected by an administrator."


class UserSubscriptions(msgspec.Struct, gc=False):
    """What a user's connections are subscribed to, taken together."""

    user_id: str
    connection_count: int
    subscriptions: list[str]


class Device(msgspec.Struct, gc=False):
    """One connection; `address` and `user_agent` as far as known."""

    id: str
    transport: Literal["websocket", "sse"]
    address: str
    user_agent: str
    since: Time
    last_heard: Time


class UserConnections(msgspec.Struct, gc=False):
    """A user's connections, oldest first; none where he is not connected."""

    user_id: str
    connections: list[Device]


class DisconnectBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """`reason` is told to the client; `revoke` refuses all tokens that the user has by now."""

    reason: Annotated[str, Meta(min_length=1, max_length=120)] = DISCONNECTED
    revoke: bool = False


class Disconnected(msgspec.Struct, gc=False):
    """How many connections were closed."""

    user_id: str
    disconnected: int
    revoked: bool


class SubscriptionBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Channels for a user's live connections."""

    channels: Annotated[list[str], Meta(min_length=1, max_length=MAX_CHANNELS)]


class SubscriptionChange(msgspec.Struct, gc=False):
    """`changed` counts the connections that had not all of it yet, or any of it still."""

    user_id: str
    channels: list[str]
    changed: int


class PresenceBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Whom to look for."""

    user_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_PRESENCE)]


class Presence(msgspec.Struct, gc=False):
    """The connections of each of them who is connected; the others are left out."""

    online: dict[str, int]


class TokenBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A token to be made; `ttl` in seconds, `channels` names or patterns to be held to.
    `tenant_id`, if given, is the tenant that the call is for.
    """

    user_id: UserId
    ttl: Annotated[int, Meta(ge=1, le=31_536_000, examples=[3600])]
    roles: list[str] | None = None
    channels: list[str] | None = None
    tenant_id: str | None = None


class Token(msgspec.Struct, gc=False):
    """A user's JWT."""

    token: str
    expires_at: Time


class Users:
    """The handlers of users, connections, presence and tokens. `clock` gives Unix seconds, `others`
    is None where this is the only node.
    """

    def __init__(
        self,
        guard: Guard,
        registry: Registry,
        lifecycle: Lifecycle,
        verifier: TokenVerifier,
        *,
        clock: Callable[[], float],
        others: Others | None = None,
    ) -> None:
        self._guard = guard
        self._others = others
        self._registry = registry
        self._lifecycle = lifecycle
        self._verifier = verifier
        self._clock = clock
        self._disconnect_body = Decoder(DisconnectBody)
        self._subscription_body = Decoder(SubscriptionBody)
        self._presence_body = Decoder(PresenceBody)
        self._token_body = Decoder(TokenBody)

    def endpoints(self) -> list[Endpoint]:
        """Looking first, then changing."""
        guard = self._guard
        return [
            Endpoint(
                guard,
                "GET",
                "/api/v1/users/{id}/subscriptions",
                self.subscriptions,
                Description(
                    "What a user is subscribed to",
                    "Users",
                    answer=UserSubscriptions,
                    errors=(404,),
                ),
                access="read",
            ),
            Endpoint(
                guard,
                "GET",
                "/api/v1/users/{id}/connections",
                self.connections,
                Description("A user's devices", "Users", answer=UserConnections),
                access="read",
            ),
            Endpoint(
                guard,
                "POST",
                "/api/v1/users/{id}/disconnect",
                self.disconnect_user,
                Description(
                    "Close a user's connections", "Users", DisconnectBody, answer=Disconnected
                ),
                access="admin",
            ),
            Endpoint(
                guard,
                "POST",
                "/api/v1/users/{id}/subscribe",
                self.subscribe,
                Description(
                    "Subscribe a user's connections", "Users", SubscriptionBody, SubscriptionChange
                ),
                access="admin",
            ),
            Endpoint(
                guard,
                "POST",
                "/api/v1/users/{id}/unsubscribe",
                self.unsubscribe,
                Description(
                    "Unsubscribe a user's connections",
                    "Users",
                    SubscriptionBody,
                    SubscriptionChange,
                ),
                access="admin",
            ),
            Endpoint(
                guard,
                "DELETE",
                "/api/v1/connections/{id}",
                self.disconnect,
                Description("Close a connection", "Users", DisconnectBody, errors=(404,)),
                access="admin",
                status=204,
            ),
            Endpoint(
                guard,
                "POST",
                "/api/v1/presence",
                self.presence,
                Description("Who of these is connected", "Users", PresenceBody, Presence),
                access="read",
            ),
            Endpoint(
                guard,
                "POST",
                "/api/v1/tokens",
                self.token,
                Description("Make a token for a user", "Users", TokenBody, Token, (409,)),
                access="admin",
            ),
        ]

    def _of(self, request: Request, name: str) -> tuple[Connection, ...]:
        return self._registry.tenant(request.tenant).of_user(name)

    def _devices(self, tenant: str, name: str) -> Eventually[list[FoundDevice]]:
        """A user's connections on all nodes, oldest first."""
        here = [device_of(each) for each in self._registry.tenant(tenant).of_user(name)]
        return here if self._others is None else _with_others(here, self._others, tenant, name)

    def subscriptions(self, request: Request) -> Eventually[UserSubscriptions]:
        """GET /api/v1/users/{id}/subscriptions."""
        name = user_id(request.path_params["id"], "id")

        def answer(devices: list[FoundDevice]) -> UserSubscriptions:
            if not devices:
                raise NotFound("This user is not connected.")
            channels = {channel for device in devices for channel in device.subscriptions}
            return UserSubscriptions(name, len(devices), sorted(channels))

        return then(self._devices(request.tenant, name), answer)

    def connections(self, request: Request) -> Eventually[UserConnections]:
        """GET /api/v1/users/{id}/connections."""
        name = user_id(request.path_params["id"], "id")

        def answer(devices: list[FoundDevice]) -> UserConnections:
            return UserConnections(
                name,
                [
                    Device(
                        device.id,
                        device.transport,
                        device.address,
                        device.user_agent,
                        timestamp_text(device.since),
                        timestamp_text(device.last_heard),
                    )
                    for device in devices
                ],
            )

        return then(self._devices(request.tenant, name), answer)

    def disconnect_user(self, request: Request) -> Eventually[Disconnected]:
        """POST /api/v1/users/{id}/disconnect; the body may be left out."""
        name = user_id(request.path_params["id"], "id")
        body = self._disconnect_body(request.body or b"{}")
        at = self._clock()
        if body.revoke:
            # Before the connections close: their clients come back at once, with the same token.
            self._verifier.revoke(request.tenant, name, at)
        connections = self._of(request, name)
        if self._others is None:
            for connection in connections:
                self._lifecycle.disconnect(connection, body.reason)
            return Disconnected(name, len(connections), body.revoke)
        return self._disconnect_everywhere(self._others, request.tenant, name, body, at)

    async def _disconnect_everywhere(
        self, others: Others, tenant: str, name: str, body: DisconnectBody, at: float
    ) -> Disconnected:
        try:
            if body.revoke:
                await others.revoke(tenant, name, at)
        finally:
            # What is here goes, whether the others can be told or not.
            connections = self._registry.tenant(tenant).of_user(name)
            for connection in connections:
                self._lifecycle.disconnect(connection, body.reason)
        elsewhere = await others.disconnect_user(tenant, name, body.reason)
        return Disconnected(name, len(connections) + elsewhere, body.revoke)

    def disconnect(self, request: Request) -> Eventually[None]:
        """DELETE /api/v1/connections/{id}; the body may be left out."""
        id = canonical_uuid(request.path_params["id"])
        body = self._disconnect_body(request.body or b"{}")
        connection = self._registry.tenant(request.tenant).connections.get(id)
        if self._others is not None:
            return self._disconnect_anywhere(self._others, request.tenant, id, body, connection)
        if connection is None:
            raise NotFound("There is no connection with this id.")
        if body.revoke:
            self._verifier.revoke(request.tenant, connection.identity.user_id, self._clock())
        self._lifecycle.disconnect(connection, body.reason)
        return None

    async def _disconnect_anywhere(
        self,
        others: Others,
        tenant: str,
        id: str,
        body: DisconnectBody,
        connection: Connection | None,
    ) -> None:
        owner: str | None
        if connection is not None:
            owner = connection.identity.user_id
        else:
            owner = await others.owner(tenant, id)
        if owner is None:
            raise NotFound("There is no connection with this id.")
        try:
            if body.revoke:
                at = self._clock()
                self._verifier.revoke(tenant, owner, at)
                await others.revoke(tenant, owner, at)
        finally:
            if connection is not None:
                self._lifecycle.disconnect(connection, body.reason)
        if connection is None:
            await others.disconnect(tenant, id, body.reason)

    def subscribe(self, request: Request) -> Eventually[SubscriptionChange]:
        """POST /api/v1/users/{id}/subscribe."""
        name, channels = self._named(request)
        if self._others is not None:
            return self._subscribe_everywhere(self._others, request.tenant, name, channels)
        changed = self._lifecycle.subscribe_user(request.tenant, name, channels)
        return SubscriptionChange(name, list(channels), changed)

    async def _subscribe_everywhere(
        self, others: Others, tenant: str, name: str, channels: tuple[str, ...]
    ) -> SubscriptionChange:
        self._lifecycle.check_user_subscriptions(tenant, name, channels)
        await others.check_room(tenant, name, channels)
        changed = self._lifecycle.subscribe_user(tenant, name, channels)
        changed += await others.change("subscribe", tenant, name, channels)
        return SubscriptionChange(name, list(channels), changed)

    def unsubscribe(self, request: Request) -> Eventually[SubscriptionChange]:
        """POST /api/v1/users/{id}/unsubscribe."""
        name, channels = self._named(request)
        changed = self._lifecycle.unsubscribe_user(request.tenant, name, channels)
        elsewhere: Eventually[int] = 0
        if self._others is not None:
            elsewhere = self._others.change("unsubscribe", request.tenant, name, channels)
        return then(
            elsewhere, lambda more: SubscriptionChange(name, list(channels), changed + more)
        )

    def _named(self, request: Request) -> tuple[str, tuple[str, ...]]:
        name = user_id(request.path_params["id"], "id")
        body = self._subscription_body(request.body)
        return name, checked_names(body.channels, channel_name, "channels")

    def presence(self, request: Request) -> Eventually[Presence]:
        """POST /api/v1/presence."""
        names = checked_names(self._presence_body(request.body).user_ids, user_id, "user_ids")
        if self._others is not None:
            return _presence_everywhere(self._others, request.tenant, names)
        return Presence({name: len(found) for name in names if (found := self._of(request, name))})

    def token(self, request: Request) -> Answer:
        """POST /api/v1/tokens."""
        body = self._token_body(request.body)
        tenant = request.tenant
        if body.tenant_id is not None:
            tenant = self._guard.tenants.named(body.tenant_id)
            if tenant != request.tenant:
                raise Forbidden(
                    "This call is for another tenant.",
                    field="tenant_id",
                    constraint="the tenant of the API key or of X-Tenant-ID, or absent",
                )
        token, expires_at = self._verifier.mint(
            body.user_id,
            ttl=body.ttl,
            roles=body.roles or (),
            channels=body.channels,
            tenant=tenant,
        )
        # A credential must not stay in a cache on the way (RFC 9111, section 5.2.2.5).
        headers = ((b"cache-control", b"no-store"),)
        return Answer(200, encode(Token(token, second_text(expires_at))), headers)


async def _with_others(
    here: list[FoundDevice], others: Others, tenant: str, name: str
) -> list[FoundDevice]:
    return sorted([*here, *await others.devices(tenant, name)], key=lambda device: device.since)


async def _presence_everywhere(others: Others, tenant: str, names: Sequence[str]) -> Presence:
    found = await others.find(tenant, names)
    return Presence({name: sum(found[name].values()) for name in names if name in found})
