"""The nodes of the cluster, and where its users are."""

from __future__ import annotations

from typing import Literal

import msgspec

from notifyd.api.channels import Time
from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.api.others import NodeFigures, Others
from notifyd.connections.registry import Registry
from notifyd.eventually import Eventually
from notifyd.identifiers import timestamp_text
from notifyd.names import user_id


class NodeStatus(msgspec.Struct, gc=False):
    """One node; its figures are null where it did not answer in time."""

    id: str
    name: str
    version: str
    started_at: Time
    connections: int | None
    users: int | None


class ClusterTotals(msgspec.Struct, gc=False):
    """Over the nodes that answered; a user on two of them counts once where Redis answers."""

    nodes: int
    connections: int
    users: int
    channels: int


class ClusterStatus(msgspec.Struct, gc=False):
    """`degraded`: this node does not hear the others, and serves its own connections only."""

    enabled: bool
    status: Literal["healthy", "degraded", "disabled"]
    node_id: str | None
    nodes: list[NodeStatus]
    totals: ClusterTotals


class UserNode(msgspec.Struct, gc=False):
    """A user's connections on one node."""

    node_id: str
    connections: int


class ClusterUser(msgspec.Struct, gc=False):
    """Where a user is connected; nowhere where `nodes` is empty."""

    user_id: str
    connections: int
    nodes: list[UserNode]


class ClusterStatusApi:
    """The handlers of /api/v1/cluster. `others` is None where this is the only node."""

    def __init__(self, guard: Guard, registry: Registry, others: Others | None) -> None:
        self._guard = guard
        self._registry = registry
        self._others = others

    def endpoints(self) -> list[Endpoint]:
        """Nodes, and a user's."""
        return [
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/cluster/status",
                self.status,
                Description("The nodes of the cluster", "Cluster", answer=ClusterStatus),
                access="read",
            ),
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/cluster/users/{id}",
                self.user,
                Description("Where a user is connected", "Cluster", answer=ClusterUser),
                access="read",
            ),
        ]

    def status(self, request: Request) -> Eventually[ClusterStatus]:
        """GET /api/v1/cluster/status."""
        if self._others is not None:
            return self._status_of(self._others, request.tenant)
        tenant = self._registry.tenant(request.tenant)
        totals = ClusterTotals(1, len(tenant.connections), len(tenant.users), len(tenant.channels))
        return ClusterStatus(False, "disabled", None, [], totals)

    async def _status_of(self, others: Others, tenant: str) -> ClusterStatus:
        figures = {others.node_id: others.figures_here(tenant), **await others.figures(tenant)}
        users = await others.users(tenant)
        if users is None:
            users = sum(each.users for each in figures.values())
        nodes = [
            NodeStatus(
                node.id,
                node.said.name,
                node.said.version,
                timestamp_text(node.said.started_at),
                _connections(figures.get(node.id)),
                None if node.id not in figures else figures[node.id].users,
            )
            for node in others.nodes()
        ]
        totals = ClusterTotals(
            len(nodes),
            sum(each.websocket + each.sse for each in figures.values()),
            users,
            len({name for each in figures.values() for name in each.channels})
            + sum(each.more for each in figures.values()),
        )
        status: Literal["healthy", "degraded"] = "healthy" if others.well else "degraded"
        return ClusterStatus(True, status, others.node_id, nodes, totals)

    def user(self, request: Request) -> Eventually[ClusterUser]:
        """GET /api/v1/cluster/users/{id}."""
        name = user_id(request.path_params["id"], "id")
        if self._others is not None:
            return self._user_of(self._others, request.tenant, name)
        connections = len(self._registry.tenant(request.tenant).of_user(name))
        return ClusterUser(name, connections, [])

    async def _user_of(self, others: Others, tenant: str, name: str) -> ClusterUser:
        found = (await others.find(tenant, (name,))).get(name, {})
        nodes = [UserNode(node, connections) for node, connections in sorted(found.items())]
        return ClusterUser(name, sum(found.values()), nodes)


def _connections(figures: NodeFigures | None) -> int | None:
    return None if figures is None else figures.websocket + figures.sse
