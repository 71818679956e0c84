"""How many connections each tenant has on the other nodes: its limit is one for all of them.

Each node tells the others which of its tenants' counts changed, at once where that is not too
often, and with each beat all of them, for who did not hear that. Nobody asks before he admits: what
comes to several nodes before they are told may be over the limit by as much.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from heapq import nlargest

from notifyd.cluster.bus import Bus
from notifyd.cluster.messages import ALONE, Connected, encode
from notifyd.cluster.nodes import Nodes
from notifyd.connections.registry import Registry
from notifyd.errors import Unavailable
from notifyd.eventually import retrieve
from notifyd.queue.redis_keys import ClusterKeys
from notifyd.redis_client import Redis
from notifyd.tenants import MAX_TENANTS

TELL_SECONDS = 0.05
TOLD_AT_ONCE = 20
"""Changes are told once in so many seconds; after a pause so many times at once."""

MAX_NODES = 1000
"""What more call themselves nodes, between two beats, is not theirs to say."""

DOUBT_SECONDS = 1.0
"""Whether a node is still there is looked at no more often."""


class Occupancy:
    """What is known of the other nodes, and what they are told.

    Of each node so many tenants count as limits are kept for; of more, those with the most
    connections. What a node said holds as long as its lease.
    """

    def __init__(
        self, redis: Redis, keys: ClusterKeys, bus: Bus, nodes: Nodes, registry: Registry
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._bus = bus
        self._nodes = nodes
        self._registry = registry
        self._elsewhere: dict[str, dict[str, int]] = {}
        self._changed: set[str] = set()
        self._timer: asyncio.Handle | None = None
        self._next_at = 0.0
        self._doubted_at = 0.0

    # --- what the others have ---

    def elsewhere(self, tenant: str) -> int:
        """A tenant's connections on the other nodes, as they said last."""
        nodes = self._nodes
        return sum(
            [
                counts[tenant]
                for node, counts in self._elsewhere.items()
                if tenant in counts and nodes.is_alive(node)
            ]
        )

    def learn(self, node: str, said: Connected) -> None:
        """A node says what it has."""
        if node not in self._elsewhere and len(self._elsewhere) >= MAX_NODES:
            return
        if said.whole:
            self._elsewhere[node] = said.counts
            return
        known = self._elsewhere.setdefault(node, {})
        for tenant, connections in said.counts.items():
            if not connections:
                known.pop(tenant, None)
            elif tenant in known or len(known) < MAX_TENANTS:
                known[tenant] = connections

    def doubt(self, tenant: str) -> None:
        """Somebody is refused for what other nodes have of his tenant. One that was killed has
        nothing any more, and its lease may hold for long: who does not listen has none."""
        now = asyncio.get_running_loop().time()
        if now - self._doubted_at < DOUBT_SECONDS:
            return
        self._doubted_at = now
        for node in [each for each, counts in self._elsewhere.items() if tenant in counts]:
            self._look_after(node)

    def _look_after(self, node: str) -> None:
        def heard(listeners: int) -> None:
            if not listeners:
                self._elsewhere.pop(node, None)

        message = ALONE + encode(self._bus.node, (Connected({}),))
        # Where Redis does not answer, nobody knows, and what was said last goes on to hold.
        with suppress(Unavailable):
            call = self._redis.command("PUBLISH", self._keys.node + node, message, convert=heard)
            call.add_done_callback(retrieve)

    # --- what is here ---

    def changed(self, tenant: str) -> None:
        """A connection of a tenant came or went; the others are told soon."""
        self._changed.add(tenant)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, self._next_at - loop.time()), self._tell)

    def _tell(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        self._next_at = max(self._next_at, now - TOLD_AT_ONCE * TELL_SECONDS) + TELL_SECONDS
        changed, self._changed = self._changed, set()
        tenant = self._registry.tenant
        self._bus.to_all(Connected({name: len(tenant(name).connections) for name in changed}))

    def tell_all(self) -> None:
        """With each beat: say everything, and forget the nodes that are no more."""
        for node in [each for each in self._elsewhere if not self._nodes.is_alive(each)]:
            del self._elsewhere[node]
        tenants = self._registry.tenants
        counts = {name: len(each.connections) for name, each in tenants.items()}
        if len(counts) > MAX_TENANTS:
            counts = dict(nlargest(MAX_TENANTS, counts.items(), key=lambda item: item[1]))
        self._bus.to_all(Connected(counts, whole=True))

    def close(self) -> None:
        """This node ends, and has told the others so."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
