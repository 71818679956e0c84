from __future__ import annotations

import pytest

from notifyd.dispatch.targets import (
    admits,
    admitted,
    count_per_channel,
    may_await,
    narrowed,
    resolve,
)
from notifyd.notification import EVERYONE, Audience, Target
from tests.unit.connected import Connected, World


class Tenant:
    """ann in a and b, bob in b, cleo in none; dora in another tenant's a."""

    def __init__(self) -> None:
        self.world = World()
        self.ann = self.connect("ann", "a", "b", roles=("admin",))
        self.bob = self.connect("bob", "b", transport="sse")
        self.cleo = self.connect("cleo")
        self.dora = self.connect("dora", "a", tenant="acme")
        self.here = self.world.registry.tenant("default")

    def connect(self, user_id: str, *channels: str, **given: object) -> Connected:
        return self.world.connect(user_id, subscribe=channels, **given)  # type: ignore[arg-type]  # passed on

    def found(self, type: str, *names: str) -> list[str]:
        target = Target(type, names)  # type: ignore[arg-type]  # one of them
        recipients = resolve(self.here, target)
        return [each.identity.user_id for each in recipients.connections]


class TestResolve:
    @pytest.mark.parametrize(
        ("target", "users"),
        [
            (("broadcast",), ["ann", "bob", "cleo"]),
            (("channel", "a"), ["ann"]),
            (("channel", "b"), ["ann", "bob"]),
            (("channel", "none"), []),
            (("channels", "b", "a"), ["ann", "bob"]),
            (("channels", "none", "b"), ["ann", "bob"]),
            (("channels", "none", "neither"), []),
            (("channels", "a", "a"), ["ann"]),
        ],
    )
    def test_each_connection_once_and_none_of_another_tenant(
        self, target: tuple[str, ...], users: list[str]
    ) -> None:
        assert Tenant().found(*target) == users

    @pytest.mark.parametrize("target", [Target("broadcast"), Target("channel", ("b",))])
    def test_the_same_set_is_the_same_object_until_it_changes(self, target: Target) -> None:
        tenant = Tenant()
        first = resolve(tenant.here, target)
        assert resolve(tenant.here, target) is first
        late = tenant.connect("late", "b")
        second = resolve(tenant.here, target)
        assert late.connection in second.connections
        late.lose()
        third = resolve(tenant.here, target)
        assert third.connections == first.connections
        # What was found before stays what it was.
        assert late.connection in second.connections
        assert (first.websockets, first.streams) == (len(first.connections) - 1, 1)


class TestNarrowing:
    def test_everybody_is_the_same_set(self) -> None:
        tenant = Tenant()
        everybody = resolve(tenant.here, Target("broadcast"))
        assert narrowed(everybody, EVERYONE, None) is everybody
        assert narrowed(everybody, Audience(), None) is everybody

    def test_without_the_sender(self) -> None:
        tenant = Tenant()
        everybody = resolve(tenant.here, Target("broadcast"))
        rest = narrowed(everybody, EVERYONE, tenant.ann.id)
        assert rest.connections == (tenant.bob.connection, tenant.cleo.connection)
        assert narrowed(everybody, EVERYONE, "unknown").connections == everybody.connections

    def test_by_audience_and_sender(self) -> None:
        tenant = Tenant()
        connections = (tenant.ann.connection, tenant.bob.connection, tenant.cleo.connection)
        audience = Audience("Channels", frozenset({"b"}))
        assert admitted(connections, audience, tenant.ann.id) == [tenant.bob.connection]
        assert admits(Audience("Roles", frozenset({"admin"})), tenant.ann.connection)
        assert not admits(Audience("Roles", frozenset({"admin"})), tenant.bob.connection)


class TestAway:
    def test_only_what_can_be_known_is_held_against_him(self) -> None:
        assert may_await(EVERYONE, "ann")
        assert may_await(Audience("Roles", frozenset({"admin"})), "ann")
        assert may_await(Audience("Users", frozenset({"ann"})), "ann")
        assert not may_await(Audience("Users", frozenset({"bob"})), "ann")
        assert not may_await(Audience("Channels", frozenset({"a"})), "ann")


def test_counts_per_channel() -> None:
    tenant = Tenant()
    target = Target("channels", ("a", "b", "none"))
    recipients = narrowed(resolve(tenant.here, target), EVERYONE, tenant.bob.id)
    assert count_per_channel(tenant.here, target.names, recipients) == {"a": 1, "b": 1, "none": 0}
