"""Who speaks: a user with a token, or a backend with an API key."""

from __future__ import annotations

from typing import Literal

import msgspec

DEFAULT_TENANT = "default"

Scope = Literal["read", "publish", "admin"]


class Identity(msgspec.Struct, frozen=True, gc=False):
    """A user, as a verified token (or the embedder's `authenticate`) describes him.

    `channels`: names or patterns that he may subscribe to, None where the token does not say.
    `subscribe`: channels subscribed at once on connecting.
    `expires_at`, `issued_at`: Unix seconds, None where there is no such claim.
    """

    user_id: str
    tenant: str = DEFAULT_TENANT
    roles: tuple[str, ...] = ()
    channels: tuple[str, ...] | None = None
    subscribe: tuple[str, ...] = ()
    expires_at: float | None = None
    issued_at: float | None = None


class Principal(msgspec.Struct, frozen=True, gc=False):
    """A backend, as its API key describes it.

    `tenant` is None for a key that is bound to no tenant; `expires_at` is in Unix seconds.
    """

    name: str
    scopes: frozenset[Scope]
    tenant: str | None = None
    expires_at: float | None = None

    def may(self, scope: Scope) -> bool:
        """Whether this key covers `scope`; `admin` covers everything."""
        return scope in self.scopes or "admin" in self.scopes
