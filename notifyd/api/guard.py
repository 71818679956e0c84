"""Authentication, authorisation and responses, shared by every handler.

An `Endpoint` is a function from a Request to an Answer, at once or awaited, and never raises a
NotifydError. The server's fast lane and the ASGI routes call the same objects, so that keys,
limits, request ids, CORS, metrics and errors are the same whichever way a request came.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from time import perf_counter
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import structlog
from msgspec import Meta

from notifyd.auth import ApiKeys, Origins
from notifyd.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Internal,
    NotFound,
    NotifydError,
    PayloadTooLarge,
    Unauthorized,
    Unavailable,
    ValidationError,
)
from notifyd.eventually import Eventually, is_awaitable, settled, then
from notifyd.idempotency import (
    MAX_KEY_BYTES,
    Answered,
    IdempotencyKeys,
    KeptAnswer,
    answer_once,
    fingerprint,
    key_scope,
)
from notifyd.identifiers import request_id
from notifyd.identity import DEFAULT_TENANT, Identity, Principal
from notifyd.metrics import Counter, Metrics
from notifyd.ratelimit.base import RateExceeded, Verdict
from notifyd.ratelimit.limits import RateLimits
from notifyd.tenants import Tenants, only_default

MAX_BODY_BYTES = 65536
RETRY_AFTER_SECONDS = 1
"""Told with a 429 or 503 that does not know better."""

Access: TypeAlias = Literal["read", "publish", "admin", "user", "open"]
"""Who may call: a key with this scope, a user with his JWT, or anybody."""

Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]

encode = msgspec.json.Encoder().encode

_LOOKED_AT = frozenset(
    {b"x-api-key", b"authorization", b"x-request-id", b"x-tenant-id", b"idempotency-key", b"origin"}
)
_EXPOSED = (
    b"X-Request-ID, Retry-After, Idempotent-Replay, "
    b"X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset"
)
_REPLAYED: Headers = ((b"idempotent-replay", b"true"),)
_UPGRADE = ((b"upgrade", b"websocket"), (b"connection", b"upgrade"))  # RFC 9110, section 7.8
_NO_PRINCIPAL = Principal(name="", scopes=frozenset())
_NO_IDENTITY = Identity(user_id="")


class Request:
    """One HTTP request, read to its end.

    `route` is the path's pattern, `path_params` its decoded parts, `query` what stood behind the
    question mark; header names are in lower case. `scope` is the ASGI scope where there is one,
    `source` the way it came in, for the metrics. The last six are filled in by the guard.
    """

    __slots__ = (
        "address",
        "body",
        "headers",
        "idempotency_key",
        "identity",
        "method",
        "path_params",
        "principal",
        "query",
        "request_id",
        "route",
        "scope",
        "source",
        "tenant",
        "verdict",
    )

    def __init__(  # noqa: PLR0917  # made for every request, where keywords would cost
        self,
        method: str,
        route: str,
        path_params: dict[str, str],
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        address: str,
        scope: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.method = method
        self.route = route
        self.path_params = path_params
        self.query = query
        self.headers = headers
        self.body = body
        self.address = address
        self.scope = scope
        self.source = "http"
        self.request_id = ""
        self.tenant = DEFAULT_TENANT
        self.principal = _NO_PRINCIPAL
        self.identity = _NO_IDENTITY
        self.idempotency_key: str | None = None
        self.verdict: Verdict | None = None

    def header(self, name: bytes) -> bytes | None:
        """The header of that name, in lower case; several are one list (RFC 9110, section 5.3)."""
        return _header(self.headers, name)


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One HTTP answer; Content-Length and Content-Type are not among the headers."""

    status: int
    body: bytes
    headers: Headers = ()
    content_type: bytes = b"application/json"


class ErrorDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the mistake is, as a path (`payload.x`), and the rule that it broke."""

    field: str | None = None
    constraint: str | None = None


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong; `hint` says how to mend it, in development only."""

    code: Annotated[str, Meta(examples=["VALIDATION_ERROR"])]
    message: str
    details: ErrorDetails | None = None
    hint: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer from 400 on."""

    error: ErrorInfo


Handler: TypeAlias = Callable[[Request], Eventually[msgspec.Struct | None]]
"""Answers with a struct to be encoded, an Answer that is sent as it is, or None (no content)."""


class Description(msgspec.Struct, frozen=True):
    """What OpenAPI says of an endpoint; `body` and `answer` are the types on the wire.

    `errors` are statuses that not every endpoint of its kind has; `content_type` is the answer's.
    """

    summary: str
    tag: str
    body: Any = None
    answer: Any = None
    errors: tuple[int, ...] = ()
    content_type: str = "application/json"


class Guard:
    """What all endpoints share.

    `identify` turns a request into the user who sends it (raises Unauthorized and its like);
    `credentials` tells browsers that cookies may come along. `rate_limits` is None where limits are
    off; `tenants` says for whom a key speaks, and without it there are none.
    """

    def __init__(
        self,
        *,
        api_keys: ApiKeys,
        identify: Callable[[Request], Eventually[Identity]],
        origins: Origins,
        credentials: bool,
        idempotency: IdempotencyKeys,
        metrics: Metrics,
        production: bool,
        rate_limits: RateLimits | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        self.tenants = tenants or only_default()
        self.api_keys = api_keys
        self.identify = identify
        self.origins = origins
        self.credentials = credentials
        self.idempotency = idempotency
        self.metrics = metrics
        self.production = production
        self.rate_limits = rate_limits
        self._log = structlog.get_logger("notifyd.api")

    # --- who calls ---

    def reader(self, request: Request) -> Principal | None:
        """To whom an open endpoint may tell more: a key that reads, or in development anybody."""
        key = presented_key(request.headers)
        principal = None if self.production else _NO_PRINCIPAL
        if key is not None:
            try:
                known = self.api_keys.authenticate(key)
            except Unauthorized:
                return principal
            if known.may("read"):
                return known
        return principal

    # --- how often ---

    def take(self, request: Request, access: Access, limits: RateLimits) -> Eventually[Verdict]:
        """A token for a request: of its API key, or of its address where there is none that is
        known. Nothing else is looked at yet.
        """
        key = None if access == "user" else presented_key(request.headers)
        if key is not None:
            try:
                name = self.api_keys.authenticate(key).name
            except Unauthorized:
                # Who guesses keys is limited by address; the endpoint refuses him.
                return limits.request_by_address(request.address)
            return limits.request_by_key(name)
        return limits.request_by_address(request.address)

    # --- idempotency ---

    def once(
        self,
        request: Request,
        kind: str,
        key: str,
        body: bytes,
        produce: Callable[[], Eventually[Answer]],
    ) -> Eventually[Answer]:
        """`produce`'s answer, or the first one where this key was seen before.

        A key is good for its kind, tenant, API key and route. `produce` must answer and not raise;
        429 and 5xx are not kept. Raises ValidationError where the key came with another body.
        """
        scope = key_scope(request.tenant, request.principal.name, f"{request.route} {kind}", key)
        first: Answer | None = None

        def keep(answer: Answer) -> KeptAnswer:
            nonlocal first
            first = answer
            return KeptAnswer(answer.status, answer.body)

        def answer(answered: Answered) -> Answer:
            if answered.replayed or first is None:
                return Answer(answered.answer.status, answered.answer.body, _REPLAYED)
            return first

        answered = answer_once(
            self.idempotency, scope, fingerprint(body), lambda: then(produce(), keep)
        )
        return then(answered, answer)

    def attempt(self, request: Request, handler: Handler, status: int = 200) -> Eventually[Answer]:
        """What `handler` answers, errors too, without what belongs to this request alone."""
        try:
            result = handler(request)
            if is_awaitable(result):
                return self._attempt_later(request, result, status)
        except Exception as error:  # noqa: BLE001  # becomes an answer, and is logged where it is our fault
            return self.refusal(request, error)
        return _whole(result, status)

    async def _attempt_later(
        self, request: Request, pending: Awaitable[msgspec.Struct | None], status: int
    ) -> Answer:
        try:
            return _whole(await pending, status)
        except Exception as error:  # noqa: BLE001  # as above; a cancelled request is nobody's fault
            return self.refusal(request, error)

    # --- what he is answered ---

    def refusal(self, request: Request, error: Exception) -> Answer:
        """An error as the caller sees it."""
        error = self.told(request, error)
        headers: list[tuple[bytes, bytes]] = []
        if error.http_status in {429, 503}:
            headers.append((b"retry-after", b"%d" % (error.retry_after or RETRY_AFTER_SECONDS)))
            if isinstance(error, RateExceeded):
                headers += _rate_headers(error.verdict)
        elif error.http_status == 401:
            headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110, section 11.6.1
        elif error.http_status == 426:
            headers += _UPGRADE
        return Answer(error.http_status, self._error_body(error), tuple(headers))

    def _error_body(self, error: NotifydError) -> bytes:
        details = None
        if error.field is not None or error.constraint is not None:
            details = ErrorDetails(error.field, error.constraint)
        hint = None if self.production else error.hint
        return encode(ErrorAnswer(ErrorInfo(error.code, error.message, details, hint)))

    def told(self, request: Request, error: Exception) -> NotifydError:
        """The error to tell; what is our own fault is logged, and masked in production."""
        if isinstance(error, NotifydError) and not isinstance(error, Internal):
            return error
        self._log.error(
            "a request failed",
            method=request.method,
            route=request.route,
            request_id=request.request_id,
            exc_info=error,
        )
        if self.production:
            return Internal("The server failed; its log has the reason under this request id.")
        return Internal(f"{type(error).__name__}: {error}")

    def cors(self, origin: bytes) -> Headers:
        """What lets a page of this origin read the answer (Fetch standard, CORS protocol)."""
        if not self.origins.allows(origin.decode("latin-1")):
            return ((b"vary", b"Origin"),)
        headers: Headers = (
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"Origin"),
        )
        if self.credentials:
            return (*headers, (b"access-control-allow-credentials", b"true"))
        return headers

    def preflight(self, origin: bytes, asked_headers: bytes | None, methods: str) -> Answer:
        """The answer to a browser that asks before it calls, but for what `cors` adds.

        Raises Forbidden for a page of a foreign origin.
        """
        self.origins.require(origin)
        return Answer(
            204,
            b"",
            (
                (b"access-control-allow-methods", methods.encode()),
                (b"access-control-allow-headers", asked_headers or b"Authorization, Content-Type"),
                (b"access-control-max-age", b"600"),
            ),
        )


class Endpoint:
    """A route: its method and path, who may call, its limits, and the handler behind the guard.

    `operating`: it is about the server and not of one tenant, so that a key bound to none need not
    name one.
    """

    __slots__ = (
        "_answered",
        "_authenticate",
        "_counters",
        "_guard",
        "_limits",
        "_needs_key",
        "_seconds",
        "_tenant_of_key",
        "_tenants",
        "access",
        "description",
        "handler",
        "idempotent",
        "max_body",
        "method",
        "operating",
        "path",
        "status",
    )

    def __init__(
        self,
        guard: Guard,
        method: str,
        path: str,
        handler: Handler,
        description: Description,
        *,
        access: Access,
        max_body: int = MAX_BODY_BYTES,
        status: int = 200,
        idempotent: bool = False,
        limited: bool = True,
        operating: bool = False,
    ) -> None:
        """`limited`: it counts against the caller's rate, where limits are on."""
        self.method = method
        self.path = path
        self.handler = handler
        self.description = description
        self.access: Access = access
        self.max_body = max_body
        self.status = status
        self.idempotent = idempotent
        self._needs_key = access not in {"user", "open"}
        self.operating = operating
        self._guard = guard
        self._limits = guard.rate_limits if limited else None
        self._authenticate = guard.api_keys.authenticate
        self._tenants = tenants = guard.tenants
        self._tenant_of_key = tenants.of_operator if operating else tenants.of_key
        self._seconds = guard.metrics.http_request_seconds
        self._counters: dict[tuple[str, int], Counter] = {}
        self._answered = self._counter(method, status)

    @property
    def limited(self) -> bool:
        """Whether callers may come too often."""
        return self._limits is not None

    def __call__(  # noqa: PLR0912  # the hot path: one pass over the headers, no calls
        self, request: Request, since: float | None = None
    ) -> Eventually[Answer]:
        """Answer a request: at once, or when what is returned was awaited.

        `since`: the `perf_counter` of its arrival, if that was not just now.
        """
        started = perf_counter() if since is None else since
        key = authorization = offered_id = tenant = idempotency_key = origin = None
        for name, value in request.headers:
            if name in _LOOKED_AT:
                # Several of one name are one list (RFC 9110, section 5.3), which is neither a key
                # nor a tenant. `presented_key` has the same rule; otherwise one key would be let in
                # while the rate of another is used up.
                if name == b"x-api-key":
                    key = value if key is None else key + b"," + value
                elif name == b"authorization":
                    authorization = value if authorization is None else authorization + b"," + value
                elif name == b"x-request-id":
                    offered_id = value
                elif name == b"x-tenant-id":
                    tenant = value if tenant is None else tenant + b"," + value
                elif name == b"origin":
                    origin = value
                else:
                    idempotency_key = value
        request.request_id = request_id(offered_id)
        access = self.access
        result: Eventually[msgspec.Struct | None]
        try:
            if self._limits is not None:
                later = self._limit(request, started, self._limits)
                if later is not None:
                    return later
            if self._needs_key:
                request.principal = principal = self._authenticate(
                    key or _bearer_key(authorization)
                )
                scopes = principal.scopes
                if access not in scopes and "admin" not in scopes:
                    raise _out_of_scope(principal, access)
                if tenant is not None or self._tenants.enabled:
                    request.tenant = self._tenant_of_key(principal, tenant)
            if len(request.body) > self.max_body:
                raise too_large(self.max_body)
            if idempotency_key is not None and self.idempotent:
                request.idempotency_key = text = idempotency_key_text(
                    idempotency_key, "Idempotency-Key"
                )
                result = self._guard.once(
                    request,
                    "key",
                    text,
                    request.body,
                    lambda: self._guard.attempt(request, self.handler, self.status),
                )
            elif access == "user":
                result = self._as_user(request, tenant)
            else:
                result = self.handler(request)
            if is_awaitable(result):
                return self._later(request, started, origin, result)
        except NotifydError as error:
            result = self._guard.refusal(request, error)
        except Exception as error:  # noqa: BLE001  # the one place that turns a fault into a 500, and logs it
            result = self._guard.refusal(request, error)
        return self._conclude(request, started, origin, result)

    def _limit(
        self, request: Request, started: float, limits: RateLimits
    ) -> Awaitable[Answer] | None:
        """Count a request against its caller's rate; where that must be awaited, the whole answer.

        Raises RateExceeded.
        """
        verdict = request.verdict
        if verdict is None:
            taken = self._guard.take(request, self.access, limits)
            if is_awaitable(taken):
                return self._when_taken(request, started, taken)
            verdict = request.verdict = taken
        if not verdict.allowed:
            raise _too_often(verdict)
        return None

    async def _when_taken(
        self, request: Request, started: float, taken: Awaitable[Verdict]
    ) -> Answer:
        request.verdict = await taken
        return await settled(self(request, started))

    def check_caller(self, request: Request) -> Eventually[None]:
        """Look at who sends a request whose body has not come yet, so that strangers fill no
        memory.

        Raises what refuses the caller; nothing where anybody may call.
        """
        if self.access == "user":
            return then(self._guard.identify(request), _nothing)
        if self.access != "open":
            self.check_key(request)
        return None

    def check_key(self, request: Request) -> None:
        """The same for an endpoint that asks for an API key. Raises Unauthorized and Forbidden."""
        access = self.access
        principal = self._authenticate(presented_key(request.headers) or _bearer_key(None))
        if access not in principal.scopes and "admin" not in principal.scopes:
            raise _out_of_scope(principal, access)

    def in_process(self, request: Request) -> Eventually[bytes]:
        """The body of the answer to the embedding application, which needs no key.

        `request` has its principal, tenant and idempotency key already. Raises NotifydError.
        """
        result: Eventually[msgspec.Struct | None]
        if request.idempotency_key is not None and self.idempotent:
            result = self._guard.once(
                request,
                "key",
                request.idempotency_key,
                request.body,
                lambda: self._guard.attempt(request, self.handler, self.status),
            )
        else:
            result = self.handler(request)
        return then(result, self._body_or_error)

    def _body_or_error(self, result: msgspec.Struct | None) -> bytes:
        answer = _whole(result, self.status)
        if answer.status >= 400:
            raise _error_in(answer)
        return answer.body

    def finish(self, request: Request, answer: Answer) -> Answer:
        """An answer that did not come from the handler, with what every answer carries; counted."""
        request.request_id = request_id(request.header(b"x-request-id"))
        return self._conclude(request, perf_counter(), request.header(b"origin"), answer)

    def refuse(
        self, request: Request, error: NotifydError, headers: Headers = ()
    ) -> Eventually[Answer]:
        """The answer to a request that does not get as far as the handler; counted, against the
        caller's rate too.
        """
        if self._limits is None:
            return self._refused(request, error, headers)

        def limited(verdict: Verdict) -> Answer:
            request.verdict = verdict
            told = error if verdict.allowed else _too_often(verdict)
            return self._refused(request, told, headers)

        return then(self._guard.take(request, self.access, self._limits), limited)

    def _refused(self, request: Request, error: NotifydError, headers: Headers) -> Answer:
        refusal = self._guard.refusal(request, error)
        return self.finish(
            request, msgspec.structs.replace(refusal, headers=refusal.headers + headers)
        )

    def _as_user(self, request: Request, tenant: bytes | None) -> Eventually[msgspec.Struct | None]:
        identity = self._guard.identify(request)
        if is_awaitable(identity):
            return self._as_user_later(request, tenant, identity)
        return self._identified(request, tenant, identity)

    async def _as_user_later(
        self, request: Request, tenant: bytes | None, pending: Awaitable[Identity]
    ) -> msgspec.Struct | None:
        result = self._identified(request, tenant, await pending)
        return await result if is_awaitable(result) else result

    def _identified(
        self, request: Request, tenant: bytes | None, identity: Identity
    ) -> Eventually[msgspec.Struct | None]:
        self._tenants.of_user(identity, tenant)
        request.identity = identity
        request.tenant = identity.tenant
        return self.handler(request)

    async def _later(
        self,
        request: Request,
        started: float,
        origin: bytes | None,
        pending: Awaitable[msgspec.Struct | None],
    ) -> Answer:
        try:
            result = await pending
        except Exception as error:  # noqa: BLE001  # as above; a cancelled request is nobody's fault
            result = self._guard.refusal(request, error)
        return self._conclude(request, started, origin, result)

    def _conclude(
        self, request: Request, started: float, origin: bytes | None, result: msgspec.Struct | None
    ) -> Answer:
        headers: Headers = ((b"x-request-id", request.request_id.encode()),)
        if origin is not None:
            headers += self._guard.cors(origin)
        verdict = request.verdict
        if verdict is not None and verdict.allowed:
            headers += _rate_headers(verdict)
        if type(result) is Answer:
            answer = Answer(
                result.status, result.body, result.headers + headers, result.content_type
            )
        else:
            answer = Answer(self.status, b"" if result is None else encode(result), headers)
        if answer.status == self.status and request.method == self.method:
            self._answered.inc()
        else:
            self._counter(request.method, answer.status).inc()
        self._seconds.observe(perf_counter() - started)
        return answer

    def _counter(self, method: str, status: int) -> Counter:
        counter = self._counters.get((method, status))
        if counter is None:
            requests = self._guard.metrics.http_requests_total
            counter = requests.labels(method, self.path, str(status))
            self._counters[method, status] = counter
        return counter


def _nothing(_identity: Identity) -> None:
    """Who it is will be asked again, with the body."""


def _header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    values = [value for known, value in headers if known == name]
    return b",".join(values) if values else None


def presented_key(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The API key that a request was sent with, known or not; None where there is none."""
    return _header(headers, b"x-api-key") or bearer(_header(headers, b"authorization"))


def bearer(authorization: bytes | None) -> bytes | None:
    """The token of `Authorization: Bearer …` (RFC 6750, section 2.1), None where there is none."""
    if authorization is None or authorization[:7].lower() != b"bearer ":
        return None
    return authorization[7:].strip() or None


_decode_error = msgspec.json.Decoder(ErrorAnswer).decode
_ERRORS: dict[str, type[NotifydError]] = {
    error.code: error
    for error in (BadRequest, Conflict, NotFound, PayloadTooLarge, ValidationError, Unavailable)
}


def _error_in(answer: Answer) -> NotifydError:
    """The error that an answer tells of."""
    told = _decode_error(answer.body).error
    details = told.details or ErrorDetails()
    return _ERRORS.get(told.code, Internal)(
        told.message, field=details.field, constraint=details.constraint, hint=told.hint
    )


def _rate_headers(verdict: Verdict) -> Headers:
    return (
        (b"x-ratelimit-limit", b"%d" % verdict.limit),
        (b"x-ratelimit-remaining", b"%d" % verdict.remaining),
        (b"x-ratelimit-reset", b"%d" % verdict.reset_at),
    )


def _too_often(verdict: Verdict) -> RateExceeded:
    return RateExceeded("Too many requests.", verdict)


def too_large(limit: int) -> PayloadTooLarge:
    """The refusal of a body over its limit, in bytes."""
    return PayloadTooLarge(
        f"The body is over {limit} bytes.", field="body", constraint=f"at most {limit} bytes"
    )


def _bearer_key(authorization: bytes | None) -> bytes:
    key = bearer(authorization)
    if key is None:
        raise Unauthorized(
            "This call needs an API key.",
            hint="send it as X-API-Key, or as Authorization: Bearer …",
        )
    return key


def _out_of_scope(principal: Principal, access: str) -> Forbidden:
    return Forbidden(
        f'The API key "{principal.name}" does not cover this call, which needs the scope {access}.',
        hint=f'add "{access}" to its scopes in auth.api_keys',
    )


def idempotency_key_text(key: bytes, field: str) -> str:
    """A key as text, the same from a header and from a field.

    Raises ValidationError where it has not 1 to 256 bytes.
    """
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        constraint = f"1 to {MAX_KEY_BYTES} bytes"
        raise ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)
    return key.decode("latin-1")


def field_key(request: Request, key: str | None) -> str | None:
    """The idempotency key of the body, if it is to be looked at beside the header's."""
    if key is None:
        return None
    text = idempotency_key_text(key.encode(), "idempotency_key")
    if request.idempotency_key is None:
        return text
    if text != request.idempotency_key:
        raise ValidationError(
            "The header Idempotency-Key and the field idempotency_key differ.",
            field="idempotency_key",
            constraint="the same as the header, or one of the two",
        )
    return None


def _whole(result: msgspec.Struct | None, status: int) -> Answer:
    if type(result) is Answer:
        return result
    return Answer(status, b"" if result is None else encode(result))
