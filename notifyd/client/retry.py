"""When a call is repeated: decided here, without I/O, clock or randomness of its own.

`exchange` is a generator in the manner of httpx's `auth_flow`: it yields what is to be done, and is
sent what came of it. Both clients drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import httpx
import msgspec

from notifyd.client.calls import Call
from notifyd.client.credentials import Credentials, FetchToken, Wait
from notifyd.client.errors import InvalidResponse, NotifydClientError, status_error, transport_error

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits that double from `initial` to `maximum` seconds, the upper half of each at random."""

    initial: float = 0.2
    maximum: float = 10.0

    def delay(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds to wait after `failures` in a row (from 1); `random` gives 0 to 1."""
        ceiling = min(self.maximum, self.initial * 2.0 ** min(failures - 1, 32))
        return ceiling * (0.5 + random() / 2)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long a call is repeated.

    At most `attempts` requests are made, and none is begun later than `total` seconds after the
    call: a `Retry-After` that reaches beyond it ends the call with the error at once.
    """

    attempts: int = 4
    total: float = 30.0
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Make this request; the answer is the response (read whole) or httpx's error."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes | None


Step: TypeAlias = Attempt | FetchToken | Wait
Reply: TypeAlias = httpx.Response | httpx.TransportError | str | None

# The request never left, or the server says that it did not act on it.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_NOT_ACTED_ON = frozenset({429, 503})
# The fate of the request is not known.
_UNCERTAIN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_UNCERTAIN_STATUS = frozenset({502, 504})


def exchange(
    call: Call[T],
    credentials: Credentials,
    *,
    policy: Retry,
    clock: Callable[[], float],
    random: Callable[[], float],
) -> Generator[Step, Reply, T]:
    """Make `call` and return its decoded answer; `clock` is monotonic, in seconds.

    Repeated are connection errors and timeouts, 429, 502, 503 and 504, and a 401 once where a new
    token can be fetched. Raises TransportError, StatusError and InvalidResponse.
    """
    last_start = clock() + policy.total
    renewed = False
    failures = 0
    while True:
        headers = dict(call.headers)
        if call.credential == "token":
            token = credentials.token
            if token is None:
                fetched = yield FetchToken()
                if not isinstance(fetched, str):
                    raise TypeError(f"a token function gave {type(fetched).__name__}, not str")
                token = credentials.token = fetched
            headers["Authorization"] = f"Bearer {token}"
        else:
            if credentials.api_key is not None:
                headers["X-API-Key"] = credentials.api_key
            if credentials.tenant is not None:
                headers["X-Tenant-ID"] = credentials.tenant

        reply = yield Attempt(call.method, call.path, headers, call.content)
        error: NotifydClientError
        told = None
        if isinstance(reply, httpx.Response):
            if reply.is_success:
                return _decode(call, reply)
            if reply.status_code == 401 and _renew(call, credentials) and not renewed:
                renewed = True
                continue
            error = status_error(reply.status_code, reply.headers, reply.content)
            told = error.retry_after
        elif isinstance(reply, httpx.TransportError):
            error = transport_error(reply)
        else:
            raise TypeError(f"an attempt was answered with {type(reply).__name__}")

        failures += 1
        delay = policy.backoff.delay(failures, random)
        if told is not None:
            # Those told the same second must not come back in the same instant.
            delay = max(delay, told + random() * policy.backoff.initial)
        if (
            failures >= policy.attempts
            or not _worth_repeating(reply, call)
            or clock() + delay > last_start
        ):
            raise error from (reply if isinstance(reply, httpx.TransportError) else None)
        yield Wait(delay)


def _renew(call: Call[T], credentials: Credentials) -> bool:
    """Let go of a refused token; False where another cannot be fetched."""
    if call.credential != "token" or not credentials.renewable:
        return False
    credentials.token = None
    return True


def _worth_repeating(reply: httpx.Response | httpx.TransportError, call: Call[T]) -> bool:
    if isinstance(reply, httpx.Response):
        if reply.status_code in _NOT_ACTED_ON:
            return True
        return call.repeatable and reply.status_code in _UNCERTAIN_STATUS
    if isinstance(reply, _NEVER_SENT):
        return True
    return call.repeatable and isinstance(reply, _UNCERTAIN)


def _decode(call: Call[T], response: httpx.Response) -> T:
    try:
        return call.decode(response.content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidResponse(
            f"{call.method} {call.path} answered {response.status_code} with a body that is not"
            f" what the protocol promises: {error}"
        ) from error
