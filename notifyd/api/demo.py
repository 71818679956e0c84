"""The page behind /demo: two users side by side, a channel and a form. Development only.

The page is given an API key and two users' tokens, so they go to nobody but a page of this very
server, opened on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from ipaddress import ip_address

import msgspec

from notifyd.api.guard import Answer, Description, Endpoint, Guard, Headers, Request
from notifyd.auth import TokenVerifier
from notifyd.errors import Forbidden
from notifyd.identity import DEFAULT_TENANT

USERS = ("alice", "bob")
TOKEN_SECONDS = 86_400

_TAG = "Demo"
_HEADERS: Headers = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_FILES = (
    ("/demo", "demo.html", "text/html; charset=utf-8", "The demo"),
    ("/demo/demo.css", "demo.css", "text/css; charset=utf-8", "The demo's looks"),
    ("/demo/demo.js", "demo.js", "text/javascript; charset=utf-8", "The demo's script"),
)


class DemoUser(msgspec.Struct, frozen=True):
    """A user and his token, good for a day."""

    user_id: str
    token: str


class DemoSession(msgspec.Struct, frozen=True):
    """What the page works with; `api_key` is null where no key that publishes is known in full.
    `tenant_id` is whose users they are."""

    users: list[DemoUser]
    api_key: str | None
    tenant_id: str


class Demo:
    """The demo's handlers; the composition root makes one in development only.

    `api_key` is one that may publish, `tenant` the tenant that it is bound to, if any.
    """

    def __init__(
        self,
        guard: Guard,
        verifier: TokenVerifier,
        api_key: str | None,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        self._guard = guard
        self._verifier = verifier
        self._api_key = api_key
        self._tenant = tenant

    def endpoints(self) -> list[Endpoint]:
        """The page, its files, and what it works with."""
        guard = self._guard
        pages = [
            Endpoint(
                guard,
                "GET",
                path,
                _file(name, content_type),
                Description(summary, _TAG, content_type=content_type.partition(";")[0]),
                access="open",
            )
            for path, name, content_type, summary in _FILES
        ]
        description = Description(
            "Two users' tokens and the API key, for the demo on the same machine",
            _TAG,
            answer=DemoSession,
            errors=(403, 422),
        )
        session = Endpoint(guard, "GET", "/demo/session", self.session, description, access="open")
        return [*pages, session]

    def session(self, request: Request) -> Answer:
        """GET /demo/session. Raises Forbidden unless this server's own page asks, from here.

        A page of another site cannot read it either after DNS rebinding: its Host is not loopback.
        """
        if not _is_loopback(request.address):
            raise Forbidden("The demo works on the server's own machine only.")
        host = (request.header(b"host") or b"").decode("latin-1")
        if not _is_loopback(_without_port(host)):
            raise Forbidden(
                f'The demo does not answer under the name "{host}".',
                hint="open it as http://127.0.0.1 or http://localhost, with the port",
            )
        # Fetch metadata: `none` is a person who types the address; not every client sends it.
        if request.header(b"sec-fetch-site") not in (None, b"same-origin", b"none"):
            raise Forbidden("The demo's session is for its own page.")
        tenant = self._tenant
        users = [
            DemoUser(name, self._verifier.mint(name, ttl=TOKEN_SECONDS, tenant=tenant)[0])
            for name in USERS
        ]
        session = DemoSession(users, self._api_key, tenant)
        return Answer(200, msgspec.json.encode(session), _HEADERS)


def _file(name: str, content_type: str) -> Callable[[Request], Answer]:
    body = (files("notifyd.api") / name).read_bytes()
    answer = Answer(200, body, _HEADERS, content_type.encode())
    return lambda request: answer


def _without_port(host: str) -> str:
    """The host of a Host header (RFC 9110, section 7.2), without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
