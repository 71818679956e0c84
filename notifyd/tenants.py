"""Tenants: whose a request is, what each may have, and what each has sent.

Tenants share a process and its stores, and see nothing of one another. Whatever is kept or looked
up by name is so within a tenant: in memory by the pair of both, in a store by what `scoped` makes
of them. Which tenant a caller speaks for is decided here alone: by a token's claim, by the API key
that is bound to one, or by the X-Tenant-ID of a key that is not.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Annotated, Protocol
from urllib.parse import quote

import msgspec
from msgspec import Meta

from notifyd import names
from notifyd.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from notifyd.eventually import Eventually, settled
from notifyd.identity import DEFAULT_TENANT, Identity, Principal
from notifyd.options import TenantSettings, WebSocketSettings

MAX_TENANTS = 10_000
"""Whose limits are kept, and whose figures, at most; others exist all the same, without."""

SYNC_SECONDS = 5.0
"""How often limits are read that another node may have set, and figures are stored."""

_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch


def scoped(tenant: str, name: str) -> str:
    """A name within its tenant, as part of a key and as a member of a set.

    Percent-encoded, so that no name reaches another tenant's: neither part can hold the bar.
    """
    return f"{_encoded_tenant(tenant)}|{encoded(name)}"


def encoded(name: str) -> str:
    """A name as part of a key: whatever separates parts is escaped."""
    return name if _PLAIN(name) is not None else quote(name, safe="")


# There are few, and each is asked for several times with every notification.
_encoded_tenant = lru_cache(maxsize=1024)(encoded)


class TenantLimits(msgspec.Struct, frozen=True):
    """What one tenant may have: connections at all nodes together, those of one user at each."""

    max_connections: int
    max_connections_per_user: int
    max_subscriptions_per_connection: int


Most = Annotated[int, Meta(ge=1, le=10_000_000)]


class LimitChanges(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Limits that differ from the settings'; what is None is as there."""

    max_connections: Most | None = None
    max_connections_per_user: Most | None = None
    max_subscriptions_per_connection: Most | None = None

    def over(self, limits: TenantLimits) -> TenantLimits:
        """The limits with these in their place."""
        return TenantLimits(
            self.max_connections or limits.max_connections,
            self.max_connections_per_user or limits.max_connections_per_user,
            self.max_subscriptions_per_connection or limits.max_subscriptions_per_connection,
        )


class Kept(msgspec.Struct, frozen=True):
    """The limits that were set at run time, as of a version, which is another after each change."""

    version: int
    limits: Mapping[str, LimitChanges]


class Counts(msgspec.Struct, frozen=True, gc=False):
    """Notifications that were sent, and connections that took one when it was."""

    notifications: int = 0
    deliveries: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.notifications + other.notifications, self.deliveries + other.deliveries)


class Figures(msgspec.Struct, frozen=True, gc=False):
    """A tenant's counts of a day, and of its month up to that day."""

    today: Counts = Counts()
    this_month: Counts = Counts()


class TenantStore(Protocol):
    """Where limits that were set at run time and figures are kept. Days are UTC's."""

    def read(self, known: int | None) -> Eventually[Kept | None]:
        """All limits; None where they are still those of the version `known`."""

    def put(self, tenant: str, limits: LimitChanges) -> Eventually[None]:
        """Keep a tenant's limits. Raises Conflict where so many tenants have some already."""

    def add(self, day: date, counts: Mapping[str, Counts]) -> Eventually[None]:
        """Add to the tenants' counts of a day."""

    def figures(self, day: date, tenant: str | None = None) -> Eventually[Mapping[str, Figures]]:
        """Figures of one tenant or all, without those that sent nothing this month."""


class MemoryTenants:
    """`TenantStore` in this process's memory."""

    def __init__(self, *, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._version = 0
        self._limits: dict[str, LimitChanges] = {}
        self._days: dict[date, dict[str, Counts]] = {}

    def read(self, known: int | None) -> Kept | None:
        """See `TenantStore.read`."""
        return None if known == self._version else Kept(self._version, dict(self._limits))

    def put(self, tenant: str, limits: LimitChanges) -> None:
        """See `TenantStore.put`."""
        if tenant not in self._limits and len(self._limits) >= self._max_tenants:
            raise too_many(self._max_tenants)
        self._limits[tenant] = limits
        self._version += 1

    def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        """See `TenantStore.add`. Other months than this day's are forgotten."""
        for other in [each for each in self._days if not _same_month(each, day)]:
            del self._days[other]
        known = self._days.setdefault(day, {})
        for tenant, added in counts.items():
            if tenant in known or len(known) < self._max_tenants:
                known[tenant] = known.get(tenant, Counts()) + added

    def figures(self, day: date, tenant: str | None = None) -> Mapping[str, Figures]:
        """See `TenantStore.figures`."""
        found: dict[str, Figures] = {}
        for each, counts in self._days.items():
            if each > day or not _same_month(each, day):
                continue
            for name in counts if tenant is None else {tenant} & counts.keys():
                before = found.get(name, Figures())
                found[name] = Figures(
                    counts[name] if each == day else before.today, before.this_month + counts[name]
                )
        return found


def _same_month(one: date, other: date) -> bool:
    return (one.year, one.month) == (other.year, other.month)


def too_many(most: int) -> Conflict:
    """The refusal of one more tenant's limits."""
    return Conflict(f"Limits are already set for {most} tenants, the maximum.")


class _Tally:
    """What a tenant sent since it was stored last."""

    __slots__ = ("deliveries", "notifications")

    def __init__(self) -> None:
        self.notifications = 0
        self.deliveries = 0


class Tenants:
    """Every tenant: which there are, their limits, and what they send.

    Switched off there is `default` and no other, with `limits`, which are those of the section
    websocket. `named` are tenants that the settings name elsewhere, as API keys do. Limits set at
    run time are in `store`; `sync` reads what other nodes set. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        settings: TenantSettings,
        store: TenantStore,
        *,
        limits: TenantLimits,
        named: Iterable[str] = (),
        clock: Callable[[], float],
    ) -> None:
        self.enabled = settings.enabled
        self._auto_create = settings.auto_create
        self._store = store
        self._clock = clock
        self._default = limits
        self._configured: dict[str, TenantLimits] = {}
        if settings.enabled:
            self._default = TenantLimits(
                settings.max_connections,
                settings.max_connections_per_user,
                settings.max_subscriptions_per_connection,
            )
            self._configured = dict.fromkeys(named, self._default)
            for name, override in settings.overrides.items():
                self._configured[name] = _changes(override).over(self._default)
        self._limits = dict(self._configured)
        self._version: int | None = None
        self._tallies: dict[str, _Tally] = {}

    # --- which tenant ---

    def exists(self, tenant: str) -> bool:
        """Whether there is such a tenant: one that was named or created, or may be so by use."""
        if not self.enabled:
            return tenant == DEFAULT_TENANT
        return self._auto_create or tenant in self._limits

    def of_key(self, principal: Principal, header: bytes | None) -> str:
        """Whom a backend speaks for; `header` is its X-Tenant-ID.

        Raises Forbidden where the key is bound to another, BadRequest where it is bound to none and
        names none that exists.
        """
        if not self.enabled:
            if header is not None and header != DEFAULT_TENANT.encode():
                raise _no_tenants()
            return DEFAULT_TENANT
        if principal.tenant is not None:
            if header is not None and header != principal.tenant.encode():
                raise Forbidden(
                    f'The API key "{principal.name}" is bound to another tenant.',
                    field="X-Tenant-ID",
                    constraint="the key's own tenant, or no such header",
                )
            return principal.tenant
        if header is None:
            raise BadRequest(
                f'The API key "{principal.name}" is bound to no tenant: name one.',
                field="X-Tenant-ID",
                constraint=_RULE,
                hint="send X-Tenant-ID, or give the key a tenant_id in auth.api_keys",
            )
        return self._existing(header.decode("latin-1"))

    def _existing(self, name: str) -> str:
        try:
            names.tenant_id(name)
        except ValidationError as error:
            raise BadRequest(
                f"X-Tenant-ID must be {_RULE}.", field="X-Tenant-ID", constraint=_RULE
            ) from error
        if not self.exists(name):
            raise BadRequest(
                f'There is no tenant "{name}" here.',
                field="X-Tenant-ID",
                constraint="a tenant that exists",
                hint=_HOW_TO_CREATE,
            )
        return name

    def of_operator(self, principal: Principal, header: bytes | None) -> str:
        """As `of_key`, for what is of no tenant in particular: an unbound key need not name one."""
        if self.enabled and principal.tenant is None and header is None:
            return DEFAULT_TENANT
        return self.of_key(principal, header)

    def of_claim(self, claim: str | None, name: str) -> str:
        """Whose user a token is of; `name` is the claim's. Raises Unauthorized."""
        if claim is None:
            claim = DEFAULT_TENANT
        if not self.enabled:
            if claim != DEFAULT_TENANT:
                raise Unauthorized(
                    "The token is of a tenant, and this server has none.",
                    hint=f'without tenants, the {name} claim is absent or "{DEFAULT_TENANT}"',
                )
            return claim
        try:
            names.tenant_id(claim)
        except ValidationError as error:
            raise Unauthorized(f"The token's {name} claim is no tenant id: {_RULE}.") from error
        if not self.exists(claim):
            raise Unauthorized(
                "The token is of a tenant that does not exist here.",
                hint=f'there is no tenant "{claim}"; {_HOW_TO_CREATE}',
            )
        return claim

    def of_user(self, identity: Identity, header: bytes | None = None) -> str:
        """Whose user an identity is of; `header` is the X-Tenant-ID of his call.

        Raises Unauthorized where there is no such tenant, Forbidden or BadRequest for a header that
        names another.
        """
        if header is not None and header != identity.tenant.encode():
            if not self.enabled:
                raise _no_tenants()
            raise Forbidden(
                "The token is of another tenant.",
                field="X-Tenant-ID",
                constraint="the token's own tenant, or no such header",
            )
        return self.of_claim(identity.tenant, "tenant")

    def named(self, name: str, field: str = "tenant_id") -> str:
        """The tenant that a caller who may speak for any means. Raises ValidationError."""
        if not self.enabled and name != DEFAULT_TENANT:
            constraint = f'absent or "{DEFAULT_TENANT}", as there are no tenants'
            raise ValidationError(
                f"{field} must be {constraint}.", field=field, constraint=constraint
            )
        names.tenant_id(name, field)
        if not self.exists(name):
            raise ValidationError(
                f'There is no tenant "{name}" here.',
                field=field,
                constraint="a tenant that exists",
                hint=_HOW_TO_CREATE,
            )
        return name

    def of_message(self, named: str | None) -> str:
        """Whom a service that publishes in Redis speaks for: it may for any, and has to name one.

        Raises ValidationError.
        """
        if named is not None:
            return self.named(named)
        if self.enabled:
            raise ValidationError(
                "A message must name its tenant.", field="tenant_id", constraint=_RULE
            )
        return DEFAULT_TENANT

    def visible(self, principal: Principal, name: str) -> str:
        """The tenant that an operator asks about by `name`, who need not be there already.

        Raises NotFound while tenants are switched off, Forbidden where the key is bound to another,
        ValidationError for what is no tenant id.
        """
        self.require()
        if principal.tenant is not None and name != principal.tenant:
            raise Forbidden(f'The API key "{principal.name}" is bound to another tenant.')
        return names.tenant_id(name, "id")

    def require(self) -> None:
        """Raises NotFound while tenants are switched off."""
        if not self.enabled:
            raise NotFound("There are no tenants here.", hint="set tenant.enabled to true")

    def known(self) -> list[str]:
        """Those that the settings name, and those that were given limits."""
        return list(self._limits)

    # --- what it may have ---

    def limits(self, tenant: str) -> TenantLimits:
        """The limits in force here."""
        return self._limits.get(tenant, self._default)

    async def set_limits(self, tenant: str, changes: LimitChanges) -> TenantLimits:
        """Put `changes` in place of what was set before, here at once and at other nodes within
        `SYNC_SECONDS`; a tenant that did not exist does now. Raises Conflict, Unavailable.
        """
        await settled(self._store.put(tenant, changes))
        await self.load()
        return self.limits(tenant)

    async def load(self) -> None:
        """Read the limits that were set at run time. Raises Unavailable."""
        kept = await settled(self._store.read(self._version))
        if kept is None:
            return
        limits = dict(self._configured)
        for tenant, changes in kept.limits.items():
            limits[tenant] = changes.over(limits.get(tenant, self._default))
        self._limits, self._version = limits, kept.version

    # --- what it sends ---

    def tally(self, tenant: str, deliveries: int) -> None:
        """A notification was sent, and so many connections took it."""
        tally = self._tallies.get(tenant)
        if tally is None:
            if len(self._tallies) >= MAX_TENANTS:
                return
            tally = self._tallies[tenant] = _Tally()
        tally.notifications += 1
        tally.deliveries += deliveries

    async def figures(self, tenant: str | None = None) -> Mapping[str, Figures]:
        """What was sent today and this month by one tenant or all, at every node that has stored
        it. Raises Unavailable."""
        await self._flush()
        return await settled(self._store.figures(self._today(), tenant))

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock(), UTC).date()

    async def _flush(self) -> None:
        """Store what was counted here. Without an answer of the store, or cancelled, it is kept and
        added another time: nobody knows whether it was."""
        if not self._tallies:
            return
        tallies, self._tallies = self._tallies, {}
        counts = {
            name: Counts(each.notifications, each.deliveries) for name, each in tallies.items()
        }
        stored = False
        try:
            await settled(self._store.add(self._today(), counts))
            stored = True
        finally:
            if not stored:
                for name, each in self._tallies.items():
                    known = tallies.setdefault(name, _Tally())
                    known.notifications += each.notifications
                    known.deliveries += each.deliveries
                self._tallies = tallies

    async def sync(self) -> None:
        """Read what other nodes set and store what was counted; while the store is down, what was
        known last holds, and what is counted waits."""
        try:
            await self.load()
            await self._flush()
        except Unavailable:
            # The store's own client logs that, once for all who use it.
            return

    async def finish(self, seconds: float) -> bool:
        """Store what was counted last, in so many seconds; whether there is nothing left."""
        try:
            async with asyncio.timeout(seconds):
                await self._flush()
        except (TimeoutError, Unavailable):
            return False
        return True


_RULE = f"1 to {names.MAX_TENANT_ID} letters, digits, dots, - or _"
_HOW_TO_CREATE = (
    "name it in tenant.overrides, give it limits by PUT /api/v1/tenants/{id}/limits, or set "
    "tenant.auto_create to true"
)


def _no_tenants() -> BadRequest:
    return BadRequest(
        f'There are no tenants here but "{DEFAULT_TENANT}".',
        field="X-Tenant-ID",
        constraint=f'"{DEFAULT_TENANT}", or no such header',
        hint="set tenant.enabled to true",
    )


def _changes(override: msgspec.Struct) -> LimitChanges:
    return msgspec.convert(override, LimitChanges, from_attributes=True)


def only_default() -> Tenants:
    """Tenants switched off: all is of `default`, with the limits that a setting has by default."""
    of = WebSocketSettings()
    limits = TenantLimits(
        of.max_connections, of.max_connections_per_user, of.max_subscriptions_per_connection
    )
    return Tenants(TenantSettings(), MemoryTenants(), limits=limits, clock=time.time)
