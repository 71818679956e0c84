from __future__ import annotations

import pytest

from notifyd.eventually import settled
from notifyd.metrics import Metrics
from notifyd.options import ApiKeySettings, AuthSettings, RateLimitSettings
from notifyd.ratelimit.base import Limit
from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.limits import RateLimits, Rates, network
from notifyd.ratelimit.local import LocalLimit
from tests.unit.connected import Clock


class Made:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.limits: list[tuple[str, Rate]] = []
        settings = RateLimitSettings(
            enabled=True,
            http_requests_per_second=10,
            http_burst=3,
            ws_connections_per_minute=2,
            ws_messages_per_second=5,
            ws_messages_burst=7,
        )
        keys = (
            ApiKeySettings(name="shop", key="k" * 16),
            ApiKeySettings(name="slow", key="l" * 16, rate="1/hour"),
        )
        self.rate_limits = RateLimits(
            Rates(settings, AuthSettings(api_keys=keys)), self.make, self.metrics
        )

    def make(self, name: str, rate: Rate) -> Limit:
        self.limits.append((name, rate))
        return LocalLimit(rate, clock=Clock(), max_buckets=100)

    def counted(self, kind: str) -> tuple[float, float]:
        metrics = self.metrics
        return (
            metrics.ratelimit_allowed_total.labels(kind).value,
            metrics.ratelimit_denied_total.labels(kind).value,
        )


def test_the_rates_are_those_of_the_settings() -> None:
    made = Made()
    assert set(made.limits) == {
        ("key", Rate(1, 100, 3)),
        ("key", Rate(1, 3_600_000, 1)),
        ("address", Rate(1, 100, 3)),
        ("connect", Rate(1, 30_000, 2)),
    }
    assert made.rate_limits.rates.messages == Rate(1, 200, 7)


async def test_keys_addresses_and_connections_are_apart() -> None:
    made = Made()
    limits = made.rate_limits
    assert [(await settled(limits.request_by_key("slow"))).allowed for _ in "12"] == [True, False]
    assert [(await settled(limits.request_by_key("shop"))).allowed for _ in "1234"][-2:] == [
        True,
        False,
    ]
    assert (await settled(limits.request_by_address("shop"))).allowed
    assert [(await settled(limits.connection("shop"))).allowed for _ in "123"][-2:] == [True, False]
    assert made.counted("http") == (5, 2)
    assert made.counted("connection") == (2, 1)
    assert made.counted("message") == (0, 0)


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("2001:db8:1:3::1", "2001:db8:1:3::"),
        ("::1", "::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("not:an:address", "not:an:address"),
        ("64:ff9b::c633:6401", "198.51.100.1"),
        ("64:ff9b:1::1", "64:ff9b:1::"),
    ],
)
def test_an_address_stands_for_its_network(address: str, who: str) -> None:
    assert network(address) == who
