from __future__ import annotations

import pytest

from notifyd.notification import Audience, Outcome, Priority, Receipt
from tests.unit.connected import NOW, a_notification


class TestPriority:
    def test_ranks_from_first_given_up_to_last(self) -> None:
        order = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL]
        assert sorted(Priority, key=lambda each: each.rank) == order


class TestAudience:
    @pytest.mark.parametrize(
        ("audience", "admitted"),
        [
            (Audience(), True),
            (Audience("Users", frozenset({"u1", "u2"})), True),
            (Audience("Users", frozenset({"u2"})), False),
            (Audience("Roles", frozenset({"admin"})), True),
            (Audience("Roles", frozenset({"root"})), False),
            (Audience("Channels", frozenset({"orders", "x"})), True),
            (Audience("Channels", frozenset({"admin"})), False),
            (Audience("Roles"), False),
        ],
    )
    def test_admits(self, audience: Audience, admitted: bool) -> None:
        assert audience.admits("u1", ("user", "admin"), ("orders",)) is admitted


class TestNotification:
    def test_ends_with_its_ttl(self) -> None:
        assert a_notification().expires_at is None
        assert a_notification(ttl=60).expires_at == NOW + 60
        assert a_notification(ttl=0).expires_at == NOW

    def test_ttl_0_is_never_stored(self) -> None:
        assert [a_notification(ttl=ttl).storable for ttl in (None, 0, 1)] == [True, False, True]


class TestReceipt:
    @pytest.mark.parametrize(
        ("receipt", "success"),
        [
            (Receipt("n", Outcome.DELIVERED, delivered_to=1), True),
            (Receipt("n", Outcome.ROUTED, routed=1), True),
            (Receipt("n", Outcome.QUEUED, queued=1), True),
            (Receipt("n", Outcome.NOBODY), False),
            (Receipt("n", Outcome.FAILED, failed=1), False),
        ],
    )
    def test_success_is_that_anybody_has_it_or_will(self, receipt: Receipt, success: bool) -> None:
        assert receipt.success is success

    def test_outcomes_are_best_first(self) -> None:
        assert [outcome.value for outcome in Outcome] == [
            "delivered",
            "routed",
            "queued",
            "nobody",
            "filtered",
            "expired",
            "failed",
        ]
