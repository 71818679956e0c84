from __future__ import annotations

from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.messages import MessageBudget

NOW = 1_800_000_000_000
RATE = Rate.of(10, 1000, 20)


def spoken(budget: MessageBudget, count: int, now: int) -> int:
    return sum(budget.say(RATE, now).allowed for _ in range(count))


def test_a_burst_and_then_the_rate() -> None:
    budget = MessageBudget(RATE, NOW)
    assert spoken(budget, 30, NOW) == 20
    assert spoken(budget, 30, NOW + 500) == 5


def test_once_over_the_rate_is_a_warning() -> None:
    budget = MessageBudget(RATE, NOW)
    spoken(budget, 40, NOW)
    assert not budget.is_spent(RATE)


def test_what_was_on_its_way_already_counts_as_one() -> None:
    budget = MessageBudget(RATE, NOW)
    for milliseconds in range(0, 1000, 100):
        spoken(budget, 3 if milliseconds else 20, NOW + milliseconds)
    assert not budget.is_spent(RATE)


def test_over_it_in_three_seconds_is_too_often() -> None:
    budget = MessageBudget(RATE, NOW)
    spoken(budget, 21, NOW)
    spoken(budget, 11, NOW + 1000)
    assert not budget.is_spent(RATE)
    spoken(budget, 11, NOW + 2000)
    assert budget.is_spent(RATE)


def test_who_heeds_the_warning_begins_anew() -> None:
    budget = MessageBudget(RATE, NOW)
    for each in range(10):
        spoken(budget, 21, NOW + each * 2000)
        assert not budget.is_spent(RATE)


def test_a_whole_burst_over_it_is_a_flood() -> None:
    budget = MessageBudget(RATE, NOW)
    spoken(budget, 40, NOW)
    assert not budget.is_spent(RATE)
    spoken(budget, 1, NOW)
    assert budget.is_spent(RATE)


def test_acks_have_a_bucket_of_their_own_and_are_no_strikes() -> None:
    budget = MessageBudget(RATE, NOW)
    assert sum(budget.ack(RATE, NOW + each * 10).allowed for each in range(1000)) == 119
    assert not budget.is_spent(RATE)
    assert spoken(budget, 1, NOW + 10_000) == 1
