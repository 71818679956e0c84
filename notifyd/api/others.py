"""What the API asks of the other nodes of a cluster, and what it answers them.

A node that does not answer in time is left out of what is only looked at. What changes something is
done here first, and is an error where the others cannot be told: the caller repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Raw

from notifyd.cluster.nodes import Node
from notifyd.cluster.presence import Found
from notifyd.cluster.router import Cluster
from notifyd.connections.connection import Connection
from notifyd.connections.lifecycle import Lifecycle
from notifyd.connections.registry import Registry
from notifyd.errors import Unavailable, ValidationError
from notifyd.metrics import Metrics, Samples, Worker

T = TypeVar("T")


class Device(msgspec.Struct, frozen=True, gc=False):
    """One connection; times in Unix seconds."""

    id: str
    transport: Literal["websocket", "sse"]
    address: str
    user_agent: str
    since: float
    last_heard: float
    subscriptions: tuple[str, ...]


class ChannelFound(msgspec.Struct, frozen=True, gc=False):
    """A channel's subscribers on one node, since when (Unix seconds)."""

    subscribers: int
    created_at: float


class NodeFigures(msgspec.Struct, frozen=True, gc=False):
    """One node's figures: connections of a tenant now, and what it counted since its start. Of
    channels that were too many to name, `more` says how many they are and `more_subscriptions` how
    many connections are subscribed to them."""

    websocket: int
    sse: int
    users: int
    channels: dict[str, int]
    counted: dict[str, int] = {}
    more: int = 0
    more_subscriptions: int = 0


class TenantHere(msgspec.Struct, frozen=True, gc=False):
    """What a node has of one of many tenants. Of channels the names, so that one on two nodes
    counts once; those that were too many to name are `more`."""

    connections: int
    users: int
    channels: list[str]
    more: int = 0


MAX_NAMED = 50_000
"""Channels that a node names of all tenants together, or of the one that is asked about; of further
ones it tells how many. With the longest names, these fit into one message."""


class Others:
    """The other nodes, as the API needs them. `counted` gives this node's own figures; `worker`
    says which of several processes on one port this is, if it is one."""

    def __init__(
        self,
        cluster: Cluster,
        registry: Registry,
        lifecycle: Lifecycle,
        *,
        metrics: Metrics,
        counted: Callable[[], dict[str, int]],
        worker: Worker | None = None,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._counted = counted
        self.worker = worker
        cluster.answers.update(
            devices=_asked(tuple[str, str], lambda about: self.devices_here(*about)),
            figures=_asked(str, self.figures_here),
            tenants=lambda about: self.tenants_here(),
            metrics=_asked(str, self._samples_here),
            channel=_asked(tuple[str, str], lambda about: self._channel_here(*about)),
            owner=_asked(tuple[str, str], lambda about: self._owner_here(*about)),
            disconnect=_asked(tuple[str, str, str], lambda about: self._disconnect_here(*about)),
            disconnect_user=_asked(
                tuple[str, str, str], lambda about: self._disconnect_user_here(*about)
            ),
            has_room=_asked(
                tuple[str, str, tuple[str, ...]], lambda about: self._has_room_here(*about)
            ),
            subscribe=_asked(
                tuple[str, str, tuple[str, ...]], lambda about: lifecycle.subscribe_user(*about)
            ),
            unsubscribe=_asked(
                tuple[str, str, tuple[str, ...]], lambda about: lifecycle.unsubscribe_user(*about)
            ),
        )

    # --- looking ---

    async def devices(self, tenant: str, user: str) -> list[Device]:
        """A user's connections on other nodes."""
        answers = await self._look("devices", (tenant, user), list[Device])
        return [device for devices in answers.values() for device in devices]

    async def figures(self, tenant: str) -> dict[str, NodeFigures]:
        """The figures of other nodes, by their ids."""
        return await self._look("figures", tenant, NodeFigures)

    async def tenants(self) -> list[dict[str, TenantHere]]:
        """All tenants with a connection, of each other node."""
        return list((await self._look("tenants", None, dict[str, TenantHere])).values())

    async def samples(self, group: str) -> dict[int, Samples]:
        """What the other processes on this port count, by their numbers."""
        return dict((await self._look("metrics", group, tuple[int, Samples])).values())

    async def users_by_tenant(self) -> dict[str, int]:
        """Users on any node, each once, of all tenants; of none where that cannot be had."""
        try:
            return await self._cluster.presence.count_all()
        except Unavailable:
            return {}

    async def channel(self, tenant: str, name: str) -> list[ChannelFound]:
        """A channel on those other nodes that have it."""
        return list((await self._look("channel", (tenant, name), ChannelFound)).values())

    async def users(self, tenant: str) -> int | None:
        """Users of a tenant on any node, each once; None where that cannot be had."""
        try:
            return await self._cluster.presence.count(tenant)
        except Unavailable:
            return None

    async def find(self, tenant: str, users: Sequence[str]) -> Found:
        """Where these users are, as far as is known; this node knows of its own."""
        found = await self._cluster.find(tenant, users)
        here = self._registry.tenant(tenant)
        for user in users:
            nodes = found.setdefault(user, {})
            nodes.pop(self._cluster.id, None)
            if connections := len(here.of_user(user)):
                nodes[self._cluster.id] = connections
            if not nodes:
                del found[user]
        return found

    def nodes(self) -> list[Node]:
        """The nodes whose leases hold, this one first."""
        return self._cluster.alive()

    @property
    def well(self) -> bool:
        """Whether this node hears the others and is known to them."""
        return self._cluster.well

    @property
    def node_id(self) -> str:
        """This node's."""
        return self._cluster.id

    # --- changing ---

    async def disconnect(self, tenant: str, connection_id: str, reason: str) -> int:
        """Close a connection; how many there were. Raises Unavailable."""
        about = (tenant, connection_id, reason)
        return sum((await self._ask("disconnect", about, int)).values())

    async def disconnect_user(self, tenant: str, user: str, reason: str) -> int:
        """Close a user's connections; how many there were. Raises Unavailable."""
        about = (tenant, user, reason)
        return sum((await self._ask("disconnect_user", about, int)).values())

    async def owner(self, tenant: str, connection_id: str) -> str | None:
        """Whose connection this is, on another node. Raises Unavailable."""
        answers = await self._ask("owner", (tenant, connection_id), str)
        return next(iter(answers.values()), None)

    async def revoke(self, tenant: str, user: str, at: float) -> None:
        """Refuse a user's tokens on the other nodes, those to come too. Raises Unavailable."""
        await self._cluster.revoke(tenant, user, at)

    async def check_room(self, tenant: str, user: str, channels: Sequence[str]) -> None:
        """Raises ValidationError where a connection on another node has no room for these channels,
        and Unavailable."""
        answers = await self._ask("has_room", (tenant, user, tuple(channels)), bool)
        if not all(answers.values()):
            raise ValidationError(
                "A connection of this user on another node would have too many subscriptions.",
                field="channels",
                constraint="at most websocket.max_subscriptions_per_connection",
            )

    async def change(self, what: str, tenant: str, user: str, channels: Sequence[str]) -> int:
        """`subscribe` or `unsubscribe` a user's connections; how many changed. Raises
        Unavailable."""
        return sum((await self._ask(what, (tenant, user, tuple(channels)), int)).values())

    # --- asking ---

    async def _look(self, what: str, about: object, kind: type[T]) -> dict[str, T]:
        try:
            return await self._ask(what, about, kind)
        except Unavailable:
            return {}

    async def _ask(self, what: str, about: object, kind: type[T]) -> dict[str, T]:
        answers = await self._cluster.ask(what, about)
        decoder = msgspec.msgpack.Decoder(kind)
        decoded = {}
        for node, said in answers.items():
            try:
                decoded[node] = decoder.decode(said)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._cluster.bus.tell_bad(node, str(error))
        return decoded

    # --- what is answered ---

    def devices_here(self, tenant: str, user: str) -> list[Device]:
        """A user's connections on this node, oldest first."""
        return [device_of(each) for each in self._registry.tenant(tenant).of_user(user)]

    def _samples_here(self, group: str) -> tuple[int, Samples] | None:
        worker = self.worker
        if worker is None or worker.group != group:
            return None
        return worker.number, self._metrics.samples()

    def figures_here(self, tenant: str) -> NodeFigures:
        """This node's own figures."""
        here = self._registry.tenant(tenant)
        streams = sum(each.transport == "sse" for each in here.connections.values())
        counts = ((name, len(channel.connections)) for name, channel in here.channels.items())
        named = dict(islice(counts, MAX_NAMED))
        rest = [connections for _, connections in counts]
        return NodeFigures(
            len(here.connections) - streams,
            streams,
            len(here.users),
            named,
            self._counted(),
            len(rest),
            sum(rest),
        )

    def tenants_here(self) -> dict[str, TenantHere]:
        """This node's own, of all tenants."""
        room = MAX_NAMED
        found = {}
        for name, here in self._registry.tenants.items():
            named = list(islice(here.channels, room))
            room -= len(named)
            found[name] = TenantHere(
                len(here.connections), len(here.users), named, len(here.channels) - len(named)
            )
        return found

    def _channel_here(self, tenant: str, name: str) -> ChannelFound | None:
        channel = self._registry.tenant(tenant).channels.get(name)
        return (
            None if channel is None else ChannelFound(len(channel.connections), channel.created_at)
        )

    def _owner_here(self, tenant: str, connection_id: str) -> str | None:
        connection = self._registry.tenant(tenant).connections.get(connection_id)
        return None if connection is None else connection.identity.user_id

    def _disconnect_here(self, tenant: str, connection_id: str, reason: str) -> int:
        connection = self._registry.tenant(tenant).connections.get(connection_id)
        if connection is None:
            return 0
        self._lifecycle.disconnect(connection, reason)
        return 1

    def _disconnect_user_here(self, tenant: str, user: str, reason: str) -> int:
        connections = self._registry.tenant(tenant).of_user(user)
        for connection in connections:
            self._lifecycle.disconnect(connection, reason)
        return len(connections)

    def _has_room_here(self, tenant: str, user: str, channels: Sequence[str]) -> bool:
        try:
            self._lifecycle.check_user_subscriptions(tenant, user, channels)
        except ValidationError:
            return False
        return True


def device_of(connection: Connection) -> Device:
    """A connection of this node."""
    return Device(
        connection.id,
        connection.transport,
        connection.address,
        connection.user_agent,
        connection.opened_at,
        connection.last_heard,
        connection.subscriptions,
    )


def _asked(kind: Any, answer: Callable[[Any], object]) -> Callable[[Raw], object]:
    decoder = msgspec.msgpack.Decoder(kind)
    return lambda about: answer(decoder.decode(about))
