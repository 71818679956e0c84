"""Who is connected here: three indexes (user, channel, tenant) that always agree.

Synchronous throughout: with no `await` inside, no other code can see the indexes half changed.
Names are looked up inside their tenant's own maps, so that nothing is ever found across tenants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from notifyd.connections.connection import Connection
from notifyd.connections.outbox import Recipients


class Channel:
    """A channel with at least one subscriber; `created_at` in Unix seconds."""

    __slots__ = ("_recipients", "connections", "created_at", "name")

    def __init__(self, name: str, created_at: float) -> None:
        self.name = name
        self.created_at = created_at
        self.connections: dict[Connection, None] = {}
        self._recipients: Recipients | None = None

    def add(self, connection: Connection) -> None:
        """Add a subscriber."""
        self.connections[connection] = None
        self._recipients = None

    def remove(self, connection: Connection) -> None:
        """Remove a subscriber."""
        del self.connections[connection]
        self._recipients = None

    @property
    def recipients(self) -> Recipients:
        """The subscribers as they are now; the same object until one comes or goes."""
        recipients = self._recipients
        if recipients is None:
            recipients = self._recipients = Recipients(self.connections)
        return recipients


class TenantConnections:
    """One tenant's connections, by their id, user and channel."""

    __slots__ = ("_recipients", "channels", "connections", "name", "users")

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections: dict[str, Connection] = {}
        # A tuple is a third of a set's size, safe to iterate while it changes, and users have few.
        self.users: dict[str, tuple[Connection, ...]] = {}
        self.channels: dict[str, Channel] = {}
        self._recipients: Recipients | None = None

    def add(self, connection: Connection) -> None:
        """Add a connection."""
        self.connections[connection.id] = connection
        user_id = connection.identity.user_id
        self.users[user_id] = (*self.users.get(user_id, ()), connection)
        self._recipients = None

    def remove(self, connection: Connection) -> bool:
        """Remove a connection; False where it was not there."""
        if self.connections.pop(connection.id, None) is None:
            return False
        user_id = connection.identity.user_id
        others = tuple(other for other in self.users[user_id] if other is not connection)
        if others:
            self.users[user_id] = others
        else:
            del self.users[user_id]
        self._recipients = None
        return True

    @property
    def recipients(self) -> Recipients:
        """Everybody as it is now; the same object until one comes or goes."""
        recipients = self._recipients
        if recipients is None:
            recipients = self._recipients = Recipients(self.connections.values())
        return recipients

    def of_user(self, user_id: str) -> tuple[Connection, ...]:
        """The user's connections, oldest first."""
        return self.users.get(user_id, ())


class Registry:
    """Every authenticated connection of this process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.tenants: dict[str, TenantConnections] = {}
        self._nobody = TenantConnections("")
        self.subscriptions = 0
        self.by_transport = {"websocket": 0, "sse": 0}

    def tenant(self, name: str) -> TenantConnections:
        """The tenant's connections; an unknown tenant has none."""
        return self.tenants.get(name, self._nobody)

    def __len__(self) -> int:
        return self.by_transport["websocket"] + self.by_transport["sse"]

    def __iter__(self) -> Iterator[Connection]:
        for tenant in self.tenants.values():
            yield from tenant.connections.values()

    @property
    def users(self) -> int:
        """Users with at least one connection, over all tenants."""
        return sum(len(tenant.users) for tenant in self.tenants.values())

    def user_keys(self) -> Iterator[tuple[str, str]]:
        """Tenant and user id of each of them."""
        for tenant in self.tenants.values():
            for user_id in tenant.users:
                yield tenant.name, user_id

    @property
    def channels(self) -> int:
        """Channels with at least one subscriber, over all tenants."""
        return sum(len(tenant.channels) for tenant in self.tenants.values())

    def add(self, connection: Connection) -> None:
        """Index a connection by tenant and user."""
        name = connection.identity.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = TenantConnections(name)
        tenant.add(connection)
        self.by_transport[connection.transport] += 1

    def remove(self, connection: Connection) -> None:
        """Take a connection out of every index; once out, again changes nothing."""
        tenant = self.tenants.get(connection.identity.tenant)
        if tenant is None or not tenant.remove(connection):
            return
        for channel in connection.subscriptions:
            self._leave(tenant, connection, channel)
        connection.subscriptions = ()
        self.by_transport[connection.transport] -= 1
        if not tenant.connections:
            del self.tenants[tenant.name]

    def subscribe(self, connection: Connection, channel_name: str) -> bool:
        """Index a connection by a channel; False where it was subscribed already, or has ended."""
        if channel_name in connection.subscriptions:
            return False
        tenant = self.tenant(connection.identity.tenant)
        if connection.id not in tenant.connections:
            # Whoever tells several connections can find one of them closed by what he told another.
            return False
        channel = tenant.channels.get(channel_name)
        if channel is None:
            channel = tenant.channels[channel_name] = Channel(channel_name, self._clock())
        channel.add(connection)
        # The channel's own string, so that ten thousand subscribers share one.
        connection.subscriptions = (*connection.subscriptions, channel.name)
        self.subscriptions += 1
        return True

    def unsubscribe(self, connection: Connection, channel_name: str) -> bool:
        """The reverse of `subscribe`; False where it was not subscribed."""
        if channel_name not in connection.subscriptions:
            return False
        self._leave(self.tenants[connection.identity.tenant], connection, channel_name)
        connection.subscriptions = tuple(
            name for name in connection.subscriptions if name != channel_name
        )
        return True

    def _leave(self, tenant: TenantConnections, connection: Connection, channel_name: str) -> None:
        channel = tenant.channels[channel_name]
        channel.remove(connection)
        self.subscriptions -= 1
        if not channel.connections:
            del tenant.channels[channel_name]
