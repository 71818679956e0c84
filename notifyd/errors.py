"""Every error that a caller can meet, in one tree.

| class              | code                | HTTP | WebSocket close |
|--------------------|---------------------|------|-----------------|
| BadRequest         | BAD_REQUEST         | 400  | -               |
| Unauthorized       | UNAUTHORIZED        | 401  | 4001            |
| TokenExpired       | TOKEN_EXPIRED       | 401  | 4010            |
| Forbidden          | FORBIDDEN           | 403  | 4003            |
| NotFound           | NOT_FOUND           | 404  | -               |
| MethodNotAllowed   | METHOD_NOT_ALLOWED  | 405  | -               |
| RequestTimeout     | REQUEST_TIMEOUT     | 408  | -               |
| Conflict           | CONFLICT            | 409  | -               |
| PayloadTooLarge    | PAYLOAD_TOO_LARGE   | 413  | 1009            |
| ValidationError    | VALIDATION_ERROR    | 422  | -               |
| UpgradeRequired    | UPGRADE_REQUIRED    | 426  | -               |
| RateLimited        | RATE_LIMITED        | 429  | 4029            |
| ConnectionLimit    | CONNECTION_LIMIT    | 429  | 4029            |
| UserConnectionLimit| CONNECTION_LIMIT    | 429  | 4009            |
| HeadTooLarge       | HEAD_TOO_LARGE      | 431  | -               |
| Internal           | INTERNAL            | 500  | 1011            |
| Unavailable        | UNAVAILABLE         | 503  | 1011            |
| ShuttingDown       | UNAVAILABLE         | 503  | 1001            |
"""

from __future__ import annotations

from typing import ClassVar


class NotifydError(Exception):
    """An error with a stable code, told to the caller as it stands.

    `message` is one plain sentence; `field` names the offending input as a path (`payload.x`),
    `constraint` the rule it broke; `hint` says how to mend it and is shown in development only;
    `retry_after` is in whole seconds.
    """

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    close_code: ClassVar[int] = 1011

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        constraint: str | None = None,
        hint: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.constraint = constraint
        self.hint = hint
        self.retry_after = retry_after


class BadRequest(NotifydError):
    """The bytes are not what the protocol asks for: not JSON, not UTF-8, not HTTP."""

    code = "BAD_REQUEST"
    http_status = 400


class Unauthorized(NotifydError):
    """No credentials, or credentials that do not hold."""

    code = "UNAUTHORIZED"
    http_status = 401
    close_code = 4001


class TokenExpired(Unauthorized):
    """A token that has expired."""

    code = "TOKEN_EXPIRED"
    close_code = 4010


class Forbidden(NotifydError):
    """Good credentials that do not cover this."""

    code = "FORBIDDEN"
    http_status = 403
    close_code = 4003


class NotFound(NotifydError):
    """Nothing stands under that name."""

    code = "NOT_FOUND"
    http_status = 404


class MethodNotAllowed(NotifydError):
    """The path is known, the method is not."""

    code = "METHOD_NOT_ALLOWED"
    http_status = 405


class RequestTimeout(NotifydError):
    """The request did not arrive whole in time."""

    code = "REQUEST_TIMEOUT"
    http_status = 408


class Conflict(NotifydError):
    """The name is taken."""

    code = "CONFLICT"
    http_status = 409


class PayloadTooLarge(NotifydError):
    """A body or message over its limit."""

    code = "PAYLOAD_TOO_LARGE"
    http_status = 413
    close_code = 1009


class ValidationError(NotifydError):
    """JSON of the wrong shape or with values out of bounds."""

    code = "VALIDATION_ERROR"
    http_status = 422


class UpgradeRequired(NotifydError):
    """What is there is a WebSocket, and no plain request was meant for it."""

    code = "UPGRADE_REQUIRED"
    http_status = 426


class RateLimited(NotifydError):
    """Too much, too fast; `retry_after` says when to come back."""

    code = "RATE_LIMITED"
    http_status = 429
    close_code = 4029


class ConnectionLimit(NotifydError):
    """The server has as many connections as it may hold."""

    code = "CONNECTION_LIMIT"
    http_status = 429
    close_code = 4029


class UserConnectionLimit(ConnectionLimit):
    """This user has as many connections as one user may hold."""

    close_code = 4009


class HeadTooLarge(NotifydError):
    """A request head over 16 KiB or 100 headers."""

    code = "HEAD_TOO_LARGE"
    http_status = 431


class Internal(NotifydError):
    """A fault of the server's own."""


class Unavailable(NotifydError):
    """Something the server depends on is away."""

    code = "UNAVAILABLE"
    http_status = 503

    def again(self) -> Unavailable:
        """The same for who waits for a future. What was raised holds the frames that it came
        through, and one of them as a rule that future: only the garbage collector would undo that,
        in a pause that everybody feels.
        """
        copy = Unavailable(self.message, retry_after=self.retry_after)
        copy.__cause__ = self.__cause__
        return copy


class ShuttingDown(Unavailable):
    """The server is about to stop."""

    close_code = 1001


class ConfigurationError(Exception):
    """Settings that the server refuses to start with; the text names the option and the fix."""
