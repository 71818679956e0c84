from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from notifyd.connections.connection import Connection, Transport
from notifyd.connections.outbox import Bounds, Flusher
from notifyd.connections.registry import Registry
from notifyd.identity import Identity
from tests.unit.connected import Clock, outbox_of

TENANTS = st.sampled_from(["default", "acme", "globex"])
USERS = st.sampled_from(["ann", "bob", "cleo"])
CHANNELS = st.sampled_from(["orders", "alerts", "news"])


def nobody_is_slow(outbox: object) -> None:
    raise AssertionError("nothing is written here")


FLUSHER = Flusher(Bounds(max_bytes=1000, max_messages=10, total_bytes=1000), on_slow=nobody_is_slow)


def a_connection(
    tenant: str = "default", user_id: str = "ann", transport: Transport = "websocket"
) -> Connection:
    connection = outbox_of(FLUSHER, transport=transport).connection
    connection.identity = Identity(user_id, tenant)
    return connection


class TestRegistry:
    def test_an_unknown_tenant_has_nobody_and_is_not_made(self) -> None:
        registry = Registry(Clock())
        tenant = registry.tenant("acme")
        assert (tenant.connections, tenant.users, tenant.channels) == ({}, {}, {})
        assert tenant.of_user("ann") == ()
        assert registry.tenants == {}
        assert (len(registry), list(registry), registry.users, registry.channels) == (0, [], 0, 0)

    def test_a_users_connections_are_in_order_of_coming(self) -> None:
        registry = Registry(Clock())
        first, second, third = (a_connection() for _ in range(3))
        for each in (first, second, third):
            registry.add(each)
        registry.remove(second)
        assert registry.tenant("default").of_user("ann") == (first, third)

    def test_the_same_user_id_in_another_tenant_is_another_user(self) -> None:
        registry = Registry(Clock())
        here, there = a_connection("acme"), a_connection("globex")
        registry.add(here)
        registry.add(there)
        registry.subscribe(here, "orders")
        assert registry.tenant("acme").of_user("ann") == (here,)
        assert "orders" not in registry.tenant("globex").channels
        assert (registry.users, registry.channels, len(registry)) == (2, 1, 2)

    def test_a_channel_lives_from_its_first_subscriber_to_its_last(self) -> None:
        clock = Clock()
        registry = Registry(clock)
        first, second = a_connection(), a_connection(user_id="bob")
        registry.add(first)
        registry.add(second)
        began = clock.now
        assert registry.subscribe(first, "orders")
        clock.now += 10
        assert registry.subscribe(second, "orders")
        assert not registry.subscribe(second, "orders")
        channel = registry.tenant("default").channels["orders"]
        assert (channel.name, channel.created_at) == ("orders", began)
        assert list(channel.connections) == [first, second]
        assert registry.unsubscribe(first, "orders")
        assert not registry.unsubscribe(first, "orders")
        registry.remove(second)
        assert registry.tenant("default").channels == {}
        registry.subscribe(first, "orders")
        assert registry.tenant("default").channels["orders"].created_at == began + 10

    def test_subscribers_share_the_channels_own_name(self) -> None:
        registry = Registry(Clock())
        first, second = a_connection(), a_connection()
        for each in (first, second):
            registry.add(each)
            registry.subscribe(each, "".join(["ord", "ers"]))
        assert first.subscriptions[0] is second.subscriptions[0]

    def test_what_has_ended_cannot_be_subscribed(self) -> None:
        registry = Registry(Clock())
        ended, other = a_connection(), a_connection()
        registry.add(ended)
        registry.add(other)
        registry.remove(ended)
        assert not registry.subscribe(ended, "orders")
        assert ended.subscriptions == ()
        assert registry.tenant("default").channels == {}
        registry.remove(other)
        assert not registry.subscribe(ended, "orders")
        assert (registry.tenants, registry.subscriptions) == ({}, 0)

    def test_removing_again_changes_nothing(self) -> None:
        registry = Registry(Clock())
        connection, other = a_connection(), a_connection()
        registry.add(connection)
        registry.add(other)
        registry.remove(connection)
        registry.remove(connection)
        assert registry.by_transport == {"websocket": 1, "sse": 0}
        registry.remove(other)
        registry.remove(other)
        assert len(registry) == 0


class TheThreeIndexesAgree(RuleBasedStateMachine):
    """Against a naive model: a dictionary of connections and what they are subscribed to."""

    connected = Bundle("connected")
    ended = Bundle("ended")

    @initialize()
    def nobody(self) -> None:
        self.registry = Registry(Clock())
        self.model: dict[Connection, list[str]] = {}

    @rule(
        target=connected,
        tenant=TENANTS,
        user=USERS,
        transport=st.sampled_from(["websocket", "sse"]),
    )
    def add(self, tenant: str, user: str, transport: Transport) -> Connection:
        connection = a_connection(tenant, user, transport)
        self.registry.add(connection)
        self.model[connection] = []
        return connection

    @rule(target=ended, connection=consumes(connected))
    def remove(self, connection: Connection) -> Connection:
        self.registry.remove(connection)
        del self.model[connection]
        return connection

    @rule(connection=ended)
    def remove_again(self, connection: Connection) -> None:
        self.registry.remove(connection)

    @rule(connection=connected, channel=CHANNELS)
    def subscribe(self, connection: Connection, channel: str) -> None:
        changed = self.registry.subscribe(connection, channel)
        assert changed == (channel not in self.model[connection])
        if changed:
            self.model[connection].append(channel)

    @rule(connection=connected, channel=CHANNELS)
    def unsubscribe(self, connection: Connection, channel: str) -> None:
        changed = self.registry.unsubscribe(connection, channel)
        assert changed == (channel in self.model[connection])
        if changed:
            self.model[connection].remove(channel)

    @rule(connection=ended, channel=CHANNELS)
    def subscribe_one_that_ended(self, connection: Connection, channel: str) -> None:
        assert not self.registry.subscribe(connection, channel)
        assert not self.registry.unsubscribe(connection, channel)

    @invariant()
    def the_indexes_are_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        tenants: dict[str, list[Connection]] = {}
        users: dict[tuple[str, str], list[Connection]] = {}
        channels: dict[tuple[str, str], list[Connection]] = {}
        for connection, subscriptions in self.model.items():
            tenant, user = connection.identity.tenant, connection.identity.user_id
            tenants.setdefault(tenant, []).append(connection)
            users.setdefault((tenant, user), []).append(connection)
            assert list(connection.subscriptions) == subscriptions
            for channel in subscriptions:
                channels.setdefault((tenant, channel), []).append(connection)
        registry = self.registry
        assert {
            name: list(tenant.connections.values()) for name, tenant in registry.tenants.items()
        } == tenants
        assert {
            (name, user): list(connections)
            for name, tenant in registry.tenants.items()
            for user, connections in tenant.users.items()
        } == users
        assert {
            (name, channel.name): set(channel.connections)
            for name, tenant in registry.tenants.items()
            for channel in tenant.channels.values()
        } == {key: set(connections) for key, connections in channels.items()}
        assert all(
            name == channel.name
            for tenant in registry.tenants.values()
            for name, channel in tenant.channels.items()
        )
        assert set(registry) == set(self.model)
        assert len(registry) == len(self.model)
        assert registry.users == len(users)
        assert registry.channels == len(channels)
        assert registry.subscriptions == sum(map(len, self.model.values()))
        for transport, count in registry.by_transport.items():
            assert count == sum(each.transport == transport for each in self.model)


TestTheThreeIndexesAgree = TheThreeIndexesAgree.TestCase
TestTheThreeIndexesAgree.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, database=None
)
