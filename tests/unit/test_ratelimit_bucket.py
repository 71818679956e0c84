"""The bucket against the formula, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as some

from notifyd.ratelimit.bucket import MOST, PERIODS, Bucket, Rate

NOW = 1_800_000_000_000

rates = some.builds(
    Rate.of,
    some.integers(1, 2000) | some.integers(1, MOST),
    some.sampled_from(sorted(PERIODS.values())),
    some.integers(1, 300) | some.integers(1, MOST),
)


class Formula:
    """Tokens as fractions, with a clock that a test moves."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.tokens = Fraction(rate.burst)

    def pass_time(self, milliseconds: int) -> None:
        gained = Fraction(milliseconds * self.rate.count, self.rate.period)
        self.tokens = min(Fraction(self.rate.burst), self.tokens + gained)

    def take(self) -> bool:
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@given(rates, some.lists(some.tuples(some.integers(0, 100_000), some.integers(1, 20)), max_size=40))
def test_it_lets_through_what_the_formula_says_to_the_token(
    rate: Rate, calls: list[tuple[int, int]]
) -> None:
    now, formula, bucket = NOW, Formula(rate), Bucket(rate, NOW)
    for passed, count in calls:
        now += passed
        formula.pass_time(passed)
        for _ in range(count):
            allowed = bucket.take(rate, now)
            assert allowed == formula.take()
            assert Fraction(bucket.units, rate.period) == formula.tokens
            verdict = rate.verdict(bucket.units, now, allowed=allowed)
            assert verdict.remaining == math.floor(formula.tokens)
            missing = (rate.burst - formula.tokens) * rate.period / rate.count
            assert verdict.reset_at == math.ceil(Fraction(math.ceil(now + missing), 1000))


@given(rates, some.integers(1, 500))
def test_under_a_frozen_clock_it_is_the_burst(rate: Rate, surplus: int) -> None:
    rate = Rate(rate.count, rate.period, min(rate.burst, 500))
    bucket = Bucket(rate, NOW)
    assert sum(bucket.take(rate, NOW) for _ in range(rate.burst + surplus)) == rate.burst


@given(rates)
def test_who_waits_as_he_is_told_gets_a_token(rate: Rate) -> None:
    bucket = Bucket(rate, NOW)
    bucket.units = 0
    assert not bucket.take(rate, NOW)
    verdict = rate.verdict(bucket.units, NOW, allowed=False)
    assert verdict.retry_after >= 1
    early = Bucket(rate, NOW)
    early.units = 0
    assert early.take(rate, NOW + (verdict.retry_after - 1) * 1000) is (
        (verdict.retry_after - 1) * 1000 * rate.count >= rate.period
    )
    assert bucket.take(rate, NOW + verdict.retry_after * 1000)


@given(rates)
def test_after_its_time_it_is_full(rate: Rate) -> None:
    bucket = Bucket(rate, NOW)
    bucket.units = 0
    bucket.take(rate, NOW + rate.full_after)
    assert bucket.units == rate.capacity - rate.period
    assert (rate.full_after - 1) * rate.count < rate.capacity


@given(rates)
def test_all_numbers_are_exact_in_redis_too(rate: Rate) -> None:
    assert rate.capacity + rate.count <= 2**53


def test_a_clock_that_is_set_back_brings_nothing_and_takes_nothing_away() -> None:
    rate = Rate.parse("2/second")
    bucket = Bucket(rate, NOW)
    assert bucket.take(rate, NOW)
    assert bucket.take(rate, NOW - 3_600_000)
    assert not bucket.take(rate, NOW - 3_600_000)
    assert bucket.take(rate, NOW - 3_600_000 + 500)
    assert not bucket.take(rate, NOW - 3_600_000 + 500)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1000/hour", Rate(1, 3600, 1000)),
        ("7/second", Rate(7, 1000, 7)),
        ("60/minute", Rate(1, 1000, 60)),
        ("1/day", Rate(1, 86_400_000, 1)),
        ("999999/day", Rate(37037, 3_200_000, 999_999)),
    ],
)
def test_a_rate_as_text(text: str, rate: Rate) -> None:
    assert Rate.parse(text) == rate


@pytest.mark.parametrize(
    "text", ["", "1000", "1000/h", "0/hour", "-1/hour", "1.5/hour", "1000001/hour", "1 /hour"]
)
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        Rate.parse(text)
