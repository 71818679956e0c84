"""What is known of the tenants of other nodes, with a bus and nodes that the test plays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from notifyd.cluster import occupancy
from notifyd.cluster.messages import Body, Connected
from notifyd.cluster.occupancy import Occupancy
from notifyd.connections.registry import Registry


class Others:
    """The nodes that live, and what they were told."""

    def __init__(self) -> None:
        self.living = {"n1", "n2"}
        self.told: list[Body] = []

    def is_alive(self, node: str) -> bool:
        return node in self.living

    def to_all(self, body: Body) -> None:
        self.told.append(body)


def made(others: Others, **tenants: int) -> Occupancy:
    known = {name: SimpleNamespace(connections=[None] * n) for name, n in tenants.items()}
    registry = SimpleNamespace(tenants=known, tenant=known.__getitem__)
    nothing = cast(Any, None)
    return Occupancy(
        nothing, nothing, cast(Any, others), cast(Any, others), cast(Registry, registry)
    )


def test_what_nodes_say_is_added_up() -> None:
    seen = made(Others())
    seen.learn("n1", Connected({"acme": 3, "globex": 1}, whole=True))
    seen.learn("n2", Connected({"acme": 2}))
    assert (seen.elsewhere("acme"), seen.elsewhere("globex"), seen.elsewhere("x")) == (5, 1, 0)
    seen.learn("n1", Connected({"acme": 4}))
    seen.learn("n2", Connected({"acme": 0}))
    assert (seen.elsewhere("acme"), seen.elsewhere("globex")) == (4, 1)
    # What was not heard is made good by the next beat.
    seen.learn("n1", Connected({"initech": 1}, whole=True))
    assert (seen.elsewhere("acme"), seen.elsewhere("initech")) == (0, 1)


def test_what_a_node_said_ends_with_its_lease() -> None:
    others = Others()
    seen = made(others)
    seen.learn("n1", Connected({"acme": 3}, whole=True))
    others.living.remove("n1")
    assert seen.elsewhere("acme") == 0
    seen.tell_all()
    others.living.add("n1")
    assert seen.elsewhere("acme") == 0


def test_who_calls_himself_a_node_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "MAX_NODES", 2)
    others = Others()
    seen = made(others)
    for name in ("stranger", "n1", "n2"):
        seen.learn(name, Connected({"acme": 1}))
    assert seen.elsewhere("acme") == 1
    # The next beat tells who is one.
    seen.tell_all()
    seen.learn("n2", Connected({"acme": 1}))
    assert seen.elsewhere("acme") == 2


def test_of_more_tenants_than_are_kept_the_largest_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(occupancy, "MAX_TENANTS", 2)
    others = Others()
    seen = made(others, a=1, b=3, c=2)
    seen.tell_all()
    assert others.told == [Connected({"b": 3, "c": 2}, whole=True)]
    for name in ("x", "y", "z"):
        seen.learn("n1", Connected({name: 1}))
    assert [seen.elsewhere(name) for name in ("x", "y", "z")] == [1, 1, 0]
    seen.learn("n1", Connected({"x": 2}))
    assert seen.elsewhere("x") == 2
