"""Tenants: which there are, what they have and send, and what they may."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import msgspec

from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.api.others import Others
from notifyd.api.stats import ConnectionTotals
from notifyd.connections.registry import Registry
from notifyd.decoding import Decoder
from notifyd.errors import Forbidden, NotFound, Unavailable
from notifyd.tenants import Figures, LimitChanges, TenantLimits


class Sums(msgspec.Struct, gc=False):
    """Of this day and this month, in UTC."""

    today: int
    this_month: int


class TenantFigures(msgspec.Struct, gc=False):
    """One tenant. `connections`, `users` and `channels` are those of all nodes that answer, now;
    what was sent is null while the store does not answer. `deliveries` counts the connections that
    took a notification when it was sent.
    """

    id: str
    connections: int
    users: int
    channels: int
    notifications: Sums | None
    deliveries: Sums | None
    limits: TenantLimits


class TenantList(msgspec.Struct, gc=False):
    """Tenants by id: those that the settings name, that were given limits, that are connected, or
    that sent anything this month."""

    tenants: list[TenantFigures]
    total: int


class LimitsAnswer(msgspec.Struct, gc=False):
    """The limits in force from now on."""

    id: str
    limits: TenantLimits


class TenantApi:
    """The handlers of /api/v1/tenants. `others` is None where this is the only node."""

    def __init__(self, guard: Guard, registry: Registry, others: Others | None) -> None:
        self._guard = guard
        self._tenants = guard.tenants
        self._registry = registry
        self._others = others
        self._body = Decoder(LimitChanges)

    def endpoints(self) -> list[Endpoint]:
        """All of them, one of them, and what it may."""
        one = "/api/v1/tenants/{id}"
        tag = "Tenants"
        return [
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/tenants",
                self.all,
                Description("List tenants", tag, answer=TenantList, errors=(404,)),
                access="read",
                operating=True,
            ),
            Endpoint(
                self._guard,
                "GET",
                one,
                self.one,
                Description("Look up a tenant", tag, answer=TenantFigures, errors=(404,)),
                access="read",
                operating=True,
            ),
            Endpoint(
                self._guard,
                "PUT",
                f"{one}/limits",
                self.limit,
                Description(
                    "Set a tenant's limits", tag, LimitChanges, LimitsAnswer, errors=(404, 409)
                ),
                access="admin",
                operating=True,
            ),
        ]

    async def all(self, request: Request) -> TenantList:
        """GET /api/v1/tenants. Raises Forbidden for a key that is bound to one."""
        self._tenants.require()
        self._require_unbound(request, "It sees /api/v1/tenants/{id} of its own.")
        sent = await self._sent(None)
        connected = await self._all_connected()
        names = {*self._tenants.known(), *connected, *(sent or ())}
        nothing = ConnectionTotals(0, 0, 0)
        tenants = [
            self._figures(name, connected.get(name, nothing), sent) for name in sorted(names)
        ]
        return TenantList(tenants, len(tenants))

    async def one(self, request: Request) -> TenantFigures:
        """GET /api/v1/tenants/{id}."""
        name = self._tenants.visible(request.principal, request.path_params["id"])
        if not self._tenants.exists(name):
            raise NotFound("There is no tenant with this id.")
        return self._figures(name, await self._connected(name), await self._sent(name))

    async def limit(self, request: Request) -> LimitsAnswer:
        """PUT /api/v1/tenants/{id}/limits. What is left out is as in the settings again."""
        name = self._tenants.visible(request.principal, request.path_params["id"])
        self._require_unbound(request, "Its limits are not its own to set.")
        body = self._body(request.body)
        return LimitsAnswer(name, await self._tenants.set_limits(name, body))

    @staticmethod
    def _require_unbound(request: Request, otherwise: str) -> None:
        principal = request.principal
        if principal.tenant is not None:
            raise Forbidden(
                f'The API key "{principal.name}" is bound to one tenant. {otherwise}',
                hint="use a key without tenant_id",
            )

    async def _sent(self, name: str | None) -> Mapping[str, Figures] | None:
        try:
            return await self._tenants.figures(name)
        except Unavailable:
            # What this node knows by itself is needed most when a store is down.
            return None

    async def _connected(self, name: str) -> ConnectionTotals:
        here = self._registry.tenant(name)
        if self._others is None:
            return ConnectionTotals(len(here.connections), len(here.users), len(here.channels))
        nodes = list((await self._others.figures(name)).values())
        users = await self._others.users(name)
        return ConnectionTotals(
            len(here.connections) + sum(each.websocket + each.sse for each in nodes),
            len(here.users) + sum(each.users for each in nodes) if users is None else users,
            len({*here.channels, *chain.from_iterable(each.channels for each in nodes)})
            + sum(each.more for each in nodes),
        )

    async def _all_connected(self) -> dict[str, ConnectionTotals]:
        """As `_connected`, of all tenants that have any connection, asked for in one."""
        if self._others is None:
            return {name: await self._connected(name) for name in self._registry.tenants}
        nodes = [self._others.tenants_here(), *await self._others.tenants()]
        users = await self._others.users_by_tenant()
        found = {}
        for name in {*chain.from_iterable(nodes)}:
            on = [node[name] for node in nodes if name in node]
            channels = {*chain.from_iterable(each.channels for each in on)}
            found[name] = ConnectionTotals(
                sum(each.connections for each in on),
                users.get(name) or sum(each.users for each in on),
                len(channels) + sum(each.more for each in on),
            )
        return found

    def _figures(
        self, name: str, connected: ConnectionTotals, sent: Mapping[str, Figures] | None
    ) -> TenantFigures:
        notifications = deliveries = None
        if sent is not None:
            figures = sent.get(name, Figures())
            today, month = figures.today, figures.this_month
            notifications = Sums(today.notifications, month.notifications)
            deliveries = Sums(today.deliveries, month.deliveries)
        return TenantFigures(
            name,
            connected.total,
            connected.unique_users,
            connected.channels,
            notifications,
            deliveries,
            self._tenants.limits(name),
        )
