"""What a client shows at the door, and how it gets a new token, without I/O."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FetchToken:
    """Call the user's token function; the answer is the token."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Let `seconds` pass."""

    seconds: float


@dataclass(slots=True)
class Credentials:
    """An API key for a backend's calls and the tenant that they are for, a JWT for a user's.

    `token` is the one in use, None until one is fetched; `renewable` says whether another can be
    fetched when the server refuses this one. Neither key nor token is shown by `repr`.
    """

    api_key: str | None = field(default=None, repr=False)
    tenant: str | None = None
    token: str | None = field(default=None, repr=False)
    renewable: bool = False
