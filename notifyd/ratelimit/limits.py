"""Who is limited by what: requests by API key or address, connections by address."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping

from notifyd.eventually import Eventually, then
from notifyd.metrics import Counter, Metrics
from notifyd.options import AuthSettings, RateLimitSettings
from notifyd.ratelimit.base import Limit, Verdict
from notifyd.ratelimit.bucket import PERIODS, Rate

KEY = "key"
ADDRESS = "address"
CONNECT = "connect"

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""All of IPv4, as a server without it may see it (RFC 6052, RFC 7755): no one customer's."""


class Rates:
    """The rates of the settings. Raises ValueError where an API key's is none."""

    def __init__(self, settings: RateLimitSettings, auth: AuthSettings) -> None:
        self.requests = Rate.of(
            settings.http_requests_per_second, PERIODS["second"], settings.http_burst
        )
        self.connections = Rate.of(
            settings.ws_connections_per_minute,
            PERIODS["minute"],
            settings.ws_connections_per_minute,
        )
        self.messages = Rate.of(
            settings.ws_messages_per_second, PERIODS["second"], settings.ws_messages_burst
        )
        self.of_keys = {
            key.name: Rate.parse(key.rate) for key in auth.api_keys if key.rate is not None
        }


class RateLimits:
    """Tokens for requests and connections, counted.

    `make` gives the limit of a name and rate. IPv6 addresses are taken by their /64, which is what
    one customer has (RFC 6177): else each of its 2**64 addresses had a bucket of its own.
    """

    def __init__(self, rates: Rates, make: Callable[[str, Rate], Limit], metrics: Metrics) -> None:
        self.rates = rates
        self._by_key = make(KEY, rates.requests)
        self._of_keys: Mapping[str, Limit] = {
            name: make(KEY, rate) for name, rate in rates.of_keys.items()
        }
        self._by_address = make(ADDRESS, rates.requests)
        self._connections = make(CONNECT, rates.connections)
        self._http = Counted(metrics, "http")
        self._connection = Counted(metrics, "connection")
        self.messages = Counted(metrics, "message")

    def request_by_key(self, name: str) -> Eventually[Verdict]:
        """A request with the API key of this name, which may have a rate of its own."""
        limit = self._of_keys.get(name, self._by_key)
        return then(limit.take(name), self._http.count)

    def request_by_address(self, address: str) -> Eventually[Verdict]:
        """A request without an API key that is known."""
        return then(self._by_address.take(network(address)), self._http.count)

    def connection(self, address: str) -> Eventually[Verdict]:
        """A WebSocket or SSE handshake, whatever becomes of it."""
        return then(self._connections.take(network(address)), self._connection.count)


class Counted:
    """The two counters of one kind."""

    __slots__ = ("allowed", "denied")

    def __init__(self, metrics: Metrics, kind: str) -> None:
        self.allowed: Counter = metrics.ratelimit_allowed_total.labels(kind)
        self.denied: Counter = metrics.ratelimit_denied_total.labels(kind)

    def count(self, verdict: Verdict) -> Verdict:
        """Count a verdict, and pass it on."""
        (self.allowed if verdict.allowed else self.denied).inc()
        return verdict


def network(address: str) -> str:
    """Whom an address stands for: itself, or its /64."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    if parsed in _TRANSLATED:
        return str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))
