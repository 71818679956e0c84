"""What `AckLedger` promises, whatever keeps it."""

from __future__ import annotations

from typing import Any

import pytest

from notifyd.eventually import settled
from notifyd.queue.base import AckLedger, AckReport, AckStats, Confirmation
from tests.contract.backends import NOW, Backend, Clock, postgres

FIRST, SECOND = "6f1de0fd-0000-4000-8000-000000000001", "6f1de0fd-0000-4000-8000-000000000002"


async def expect(
    ledger: AckLedger, id: str, *users: str, tenant: str = "acme", queued: bool = False
) -> None:
    await settled(ledger.expect(tenant, id, users, queued=queued))


async def acknowledge(
    ledger: AckLedger, user: str, *ids: str, tenant: str = "acme"
) -> frozenset[str]:
    return await settled(ledger.acknowledge(tenant, user, ids))


async def confirm(ledger: AckLedger, user: str, *ids: str) -> None:
    await settled(ledger.confirm("acme", user, ids))


async def report(ledger: AckLedger, id: str) -> AckReport | None:
    return await settled(ledger.report("acme", id))


async def states(ledger: AckLedger, id: str) -> dict[str, str]:
    found = await report(ledger, id)
    assert found is not None
    return {each.user_id: each.state for each in found.recipients}


async def stats(ledger: AckLedger) -> AckStats:
    return await settled(ledger.stats())


class TestExpecting:
    async def test_each_recipient_is_pending_until_he_confirms(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", "bob", "cleo")
        assert (await stats(ledger)).pending == 3
        clock.now += 2
        assert await acknowledge(ledger, "bob", FIRST) == {FIRST}
        await confirm(ledger, "cleo", FIRST)
        found = await report(ledger, FIRST)
        assert found is not None
        assert (found.notification_id, found.sent_at, found.acks) == (FIRST, NOW, 0)
        assert {each.user_id: each for each in found.recipients} == {
            "ann": Confirmation("ann", "pending"),
            "bob": Confirmation("bob", "confirmed", NOW + 2, "ack"),
            "cleo": Confirmation("cleo", "confirmed", NOW + 2, "transport"),
        }
        assert (await stats(ledger)).pending == 1

    async def test_many_notifications_to_one_user_each_are_expected_at_once(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, SECOND, "ann", queued=True)
        clock.now += 2
        await settled(ledger.expect_each("acme", []))
        await settled(ledger.expect_each("acme", [(FIRST, "ann"), (SECOND, "ann"), (FIRST, "bob")]))
        assert await states(ledger, FIRST) == {"ann": "pending", "bob": "pending"}
        assert await states(ledger, SECOND) == {"ann": "pending"}
        assert (await stats(ledger)).pending == 3
        clock.now += 30
        assert await settled(ledger.expire()) == 3

    async def test_queued_is_not_pending_until_it_is_sent(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        assert await states(ledger, FIRST) == {"ann": "queued"}
        assert (await stats(ledger)).pending == 0
        clock.now += 1000
        assert await settled(ledger.expire()) == 0
        await expect(ledger, FIRST, "ann")
        assert await states(ledger, FIRST) == {"ann": "pending"}
        assert (await stats(ledger)).pending == 1

    async def test_what_returns_to_the_queue_is_queued_again(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await expect(ledger, FIRST, "ann", queued=True)
        assert await states(ledger, FIRST) == {"ann": "queued"}
        assert (await stats(ledger)).pending == 0

    @pytest.mark.parametrize("queued", [True, False])
    async def test_what_was_confirmed_stays_so(self, backend: Backend, queued: bool) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await acknowledge(ledger, "ann", FIRST)
        await expect(ledger, FIRST, "ann", queued=queued)
        assert await states(ledger, FIRST) == {"ann": "confirmed"}
        assert (await stats(ledger)).pending == 0

    async def test_again_is_pending_once(self, backend: Backend, clock: Clock) -> None:
        ledger = await backend.ledger()
        for _ in range(3):
            await expect(ledger, FIRST, "ann")
            clock.now += 1
        assert (await stats(ledger)).pending == 1
        clock.now += 100
        assert await settled(ledger.expire()) == 1
        assert (await stats(ledger)).pending == 0

    async def test_more_recipients_may_follow(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await expect(ledger, FIRST, "bob", queued=True)
        assert await states(ledger, FIRST) == {"ann": "pending", "bob": "queued"}


class TestAcknowledging:
    async def test_a_second_ack_is_taken_and_counts_once(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        for _ in range(3):
            assert await acknowledge(ledger, "ann", FIRST) == {FIRST}
            clock.now += 1
        found = await report(ledger, FIRST)
        assert found is not None
        assert list(found.recipients) == [Confirmation("ann", "confirmed", NOW, "ack")]
        assert (await stats(ledger)).acknowledged == 1
        assert backend.told.acknowledged == [0.0]

    async def test_a_stranger_is_refused(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await expect(ledger, SECOND, "ann", "bob")
        assert await acknowledge(ledger, "bob", FIRST, SECOND, "unknown") == {SECOND}
        assert await acknowledge(ledger, "ann", FIRST, tenant="globex") == frozenset()
        assert await states(ledger, FIRST) == {"ann": "pending"}
        await confirm(ledger, "bob", FIRST, "unknown")
        assert await states(ledger, FIRST) == {"ann": "pending"}

    async def test_what_is_queued_may_be_acked(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        assert await acknowledge(ledger, "ann", FIRST) == {FIRST}
        assert await states(ledger, FIRST) == {"ann": "confirmed"}
        assert (await stats(ledger)).pending == 0

    async def test_an_ack_says_more_than_the_transport(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await confirm(ledger, "ann", FIRST)
        assert (await stats(ledger)).acknowledged == 0
        await acknowledge(ledger, "ann", FIRST)
        await confirm(ledger, "ann", FIRST)
        found = await report(ledger, FIRST)
        assert found is not None
        assert [each.by for each in found.recipients] == ["ack"]
        assert (await stats(ledger)).acknowledged == 1

    async def test_one_that_expects_nobody_takes_anybodys_of_its_tenant(
        self, backend: Backend
    ) -> None:
        ledger = await backend.ledger()
        await settled(ledger.expect_anyone("acme", FIRST))
        assert (await stats(ledger)).pending == 0
        assert await acknowledge(ledger, "ann", FIRST) == {FIRST}
        assert await acknowledge(ledger, "bob", FIRST) == {FIRST}
        assert await acknowledge(ledger, "ann", FIRST, tenant="globex") == frozenset()
        found = await report(ledger, FIRST)
        assert found is not None
        assert (list(found.recipients), found.acks) == ([], 2)

    @pytest.mark.parametrize("first", ["anyone", "ann"])
    async def test_whom_it_expects_is_settled_by_the_first(
        self, backend: Backend, first: str
    ) -> None:
        ledger = await backend.ledger()
        for name in [first, *({"anyone", "ann"} - {first})]:
            if name == "anyone":
                await settled(ledger.expect_anyone("acme", FIRST))
            else:
                await expect(ledger, FIRST, name)
        assert await states(ledger, FIRST) == ({} if first == "anyone" else {"ann": "pending"})
        assert (await stats(ledger)).pending == (first == "ann")
        assert bool(await acknowledge(ledger, "bob", FIRST)) == (first == "anyone")

    async def test_another_tenants_report_is_its_own(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", tenant="globex")
        assert await report(ledger, FIRST) is None


class TestExpiry:
    async def test_after_the_timeout_and_an_ack_still_counts(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(timeout_seconds=30)
        await expect(ledger, FIRST, "ann", "bob")
        await acknowledge(ledger, "bob", FIRST)
        clock.now += 29
        assert await settled(ledger.expire()) == 0
        clock.now += 1
        assert await settled(ledger.expire()) == 1
        assert await settled(ledger.expire()) == 0
        assert await states(ledger, FIRST) == {"ann": "expired", "bob": "confirmed"}
        figures = await stats(ledger)
        assert (figures.pending, figures.expired, backend.told.expired) == (0, 1, 1)
        assert await acknowledge(ledger, "ann", FIRST) == {FIRST}
        assert await states(ledger, FIRST) == {"ann": "confirmed", "bob": "confirmed"}
        assert (await stats(ledger)).pending == 0

    async def test_counts_from_the_last_time_it_was_sent(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(timeout_seconds=30)
        await expect(ledger, FIRST, "ann")
        clock.now += 20
        await expect(ledger, FIRST, "ann")
        clock.now += 20
        assert await settled(ledger.expire()) == 0
        clock.now += 10
        assert await settled(ledger.expire()) == 1

    async def test_who_was_first_is_late_in_his_own_time(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(timeout_seconds=30)
        for user in ("ann", "ann", "bob"):
            await expect(ledger, FIRST, user)
            clock.now += 10
        late = []
        for _ in range(3):
            late.append(await settled(ledger.expire()))
            clock.now += 10
        assert late == [0, 1, 1]
        assert await states(ledger, FIRST) == {"ann": "expired", "bob": "expired"}

    async def test_one_that_expired_may_be_sent_again(self, backend: Backend, clock: Clock) -> None:
        ledger = await backend.ledger(timeout_seconds=30)
        await expect(ledger, FIRST, "ann")
        clock.now += 30
        await settled(ledger.expire())
        await expect(ledger, FIRST, "ann")
        assert await states(ledger, FIRST) == {"ann": "pending"}
        assert (await stats(ledger)).pending == 1

    async def test_nobody_is_let_go_of_before_he_is_late(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(timeout_seconds=10_000)
        await expect(ledger, FIRST, "ann")
        clock.now += 9_999
        assert await settled(ledger.expire()) == 0
        assert await states(ledger, FIRST) == {"ann": "pending"}
        clock.now += 1
        assert await settled(ledger.expire()) == 1
        assert (await stats(ledger)).expired == 1

    async def test_at_last_the_ledger_lets_go(self, backend: Backend, clock: Clock) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await settled(ledger.expect_anyone("acme", SECOND))
        await acknowledge(ledger, "ann", FIRST)
        clock.now += 100_000
        await settled(ledger.expire())
        assert await report(ledger, FIRST) is None
        assert await report(ledger, SECOND) is None
        assert await acknowledge(ledger, "ann", FIRST, SECOND) == frozenset()
        await confirm(ledger, "ann", FIRST)


class TestMany:
    async def test_each_of_many_recipients_is_accounted_for(self, backend: Backend) -> None:
        """More than a store takes in one go."""
        ledger = await backend.ledger(max_pending=10_000)
        users = [f"user-{n}" for n in range(1_300)]
        await expect(ledger, FIRST, *users)
        assert await states(ledger, FIRST) == dict.fromkeys(users, "pending")
        assert (await stats(ledger)).pending == 1_300
        await expect(ledger, FIRST, *users[600:], queued=True)
        assert (await stats(ledger)).pending == 600
        await confirm(ledger, users[0], FIRST)
        await confirm(ledger, users[1_299], FIRST)
        await expect(ledger, FIRST, *users)
        found = await states(ledger, FIRST)
        assert found.pop(users[0]) == found.pop(users[1_299]) == "confirmed"
        assert set(found.values()) == {"pending"}
        assert (await stats(ledger)).pending == 1_298

    async def test_each_of_many_notifications_is_accounted_for(self, backend: Backend) -> None:
        ledger = await backend.ledger(max_pending=10_000)
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(700)]
        for id in ids[::2]:
            await expect(ledger, id, "ann", queued=True)
        await settled(ledger.expect_each("acme", [(id, "ann") for id in ids]))
        assert (await stats(ledger)).pending == 700
        await confirm(ledger, "ann", *ids[:650])
        assert (await stats(ledger)).pending == 50
        assert await states(ledger, ids[649]) == {"ann": "confirmed"}
        assert await states(ledger, ids[650]) == {"ann": "pending"}

    @pytest.mark.parametrize("way", ["expect_each", "resent", "confirmed before it is noted"])
    async def test_a_page_that_is_sent_again_may_hold_all_kinds(
        self, backend: Backend, clock: Clock, way: str
    ) -> None:
        ledger = await backend.ledger()
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(9)]
        queued, unknown, anyones, shared, acked, sent = (
            ids[:2],
            ids[2],
            ids[3],
            ids[4],
            ids[5],
            ids[6],
        )
        for id in (*queued, acked, *ids[7:]):
            await expect(ledger, id, "ann", queued=True)
        await settled(ledger.expect_anyone("acme", anyones))
        await expect(ledger, shared, "ann", "bob", queued=True)
        await acknowledge(ledger, "ann", acked)
        await expect(ledger, sent, "ann")
        assert (await stats(ledger)).pending == 1
        clock.now += 2
        if way == "expect_each":
            noted = ledger.expect_each("acme", [(id, "ann") for id in ids])
        else:
            noted = ledger.resent("acme", "ann", ids)
        if way != "confirmed before it is noted":
            await stats(ledger)
            await settled(noted)
            assert (await stats(ledger)).pending == 7
            for id in (*queued, unknown, sent, *ids[7:]):
                assert await states(ledger, id) == {"ann": "pending"}
            assert await states(ledger, anyones) == {}
            assert await states(ledger, shared) == {"ann": "pending", "bob": "queued"}
            assert await states(ledger, acked) == {"ann": "confirmed"}
        clock.now += 3
        assert await acknowledge(ledger, "ann", *ids) == set(ids)
        assert (await stats(ledger)).pending == 0
        # From when each was sent last; that of the one without recipients from the beginning.
        assert sorted(backend.told.acknowledged) == [0, 3, 3, 3, 3, 3, 3, 3, 5]
        assert await acknowledge(ledger, "bob", *ids) == {anyones, shared}
        if way == "confirmed before it is noted":
            await settled(noted)
        assert (await stats(ledger)).pending == 0

    async def test_what_was_sent_again_is_pending_though_nobody_asks(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        await expect(ledger, SECOND, "ann", queued=True)
        noted = ledger.resent("acme", "ann", [FIRST, SECOND])
        await confirm(ledger, "ann", FIRST)
        await settled(noted)
        assert await states(ledger, FIRST) == {"ann": "confirmed"}
        assert await states(ledger, SECOND) == {"ann": "pending"}
        assert (await stats(ledger)).pending == 1

    async def test_what_was_sent_again_may_be_named_twice(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        noted = ledger.resent("acme", "ann", [FIRST])
        await confirm(ledger, "ann", FIRST, FIRST)
        await settled(noted)
        assert await states(ledger, FIRST) == {"ann": "confirmed"}
        assert (await stats(ledger)).pending == 0

    async def test_what_returned_to_the_queue_after_it_was_sent_again_is_queued(
        self, backend: Backend
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        noted = ledger.resent("acme", "ann", [FIRST])
        await expect(ledger, FIRST, "ann", queued=True)
        await settled(noted)
        assert await states(ledger, FIRST) == {"ann": "queued"}
        assert (await stats(ledger)).pending == 0

    async def test_what_is_sent_again_beyond_the_bound_lets_go_of_the_oldest(
        self, backend: Backend
    ) -> None:
        ledger = await backend.ledger(max_pending=8)
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(10)]
        noted = ledger.resent("acme", "ann", ids)
        await confirm(ledger, "ann", *ids)
        await settled(noted)
        kept = [id for id in ids if await report(ledger, id) is not None]
        assert 0 < len(kept) <= 8
        assert kept == ids[-len(kept) :]
        for id in kept:
            assert await states(ledger, id) == {"ann": "confirmed"}
        assert (await stats(ledger)).pending == 0


class TestBounds:
    async def test_the_oldest_notification_goes_first(self, backend: Backend) -> None:
        ledger = await backend.ledger(max_pending=8)
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(10)]
        for id in ids:
            await expect(ledger, id, "ann")
        kept = [id for id in ids if await report(ledger, id) is not None]
        assert kept == ids[-len(kept) :]
        assert 0 < len(kept) <= 8
        figures = await stats(ledger)
        assert figures.pending == len(kept)
        assert figures.expired == backend.told.expired == 10 - len(kept)

    async def test_those_without_recipients_are_bounded_too(self, backend: Backend) -> None:
        ledger = await backend.ledger(max_pending=8)
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(100)]
        for id in ids:
            await settled(ledger.expect_anyone("acme", id))
        kept = [id for id in ids if await report(ledger, id) is not None]
        assert kept == ids[-len(kept) :]
        assert 0 < len(kept) <= 8
        assert (await stats(ledger)).expired == 0

    async def test_one_with_more_recipients_than_the_bound(self, backend: Backend) -> None:
        ledger = await backend.ledger(max_pending=8)
        await expect(ledger, FIRST, *[f"user-{n}" for n in range(20)])
        assert (await stats(ledger)).pending <= 8
        await expect(ledger, SECOND, "ann")
        assert await states(ledger, SECOND) == {"ann": "pending"}

    async def test_one_with_many_recipients_takes_the_place_of_many(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(max_pending=1000)
        kept = await self.crowd_out(ledger, clock)
        assert 0 < kept < 50
        figures = await stats(ledger)
        assert (figures.pending, figures.expired) == (900 + kept, 500 - kept)

    async def test_in_postgresql_it_changes_one_row_of_totals(
        self, clock: Clock, request: pytest.FixtureRequest
    ) -> None:
        """With several, two transactions could wait for each other."""

        async def versions(connection: Any) -> list[str]:
            rows = await connection.fetch("SELECT xmin::text FROM notifyd_ack_totals")
            return [version for (version,) in rows]

        async with postgres(clock, request.getfixturevalue) as backend:
            ledger = await backend.ledger(max_pending=1000)
            await self.crowd_out(ledger, clock)
            found = await backend.postgres.transaction(versions)
        latest = max(found, key=int)
        assert found.count(latest) == 1

    @staticmethod
    async def crowd_out(ledger: AckLedger, clock: Clock) -> int:
        """How many of 500 are left when one with 900 recipients came."""
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(10, 510)]
        await settled(ledger.expect_each("acme", [(id, "ann") for id in ids]))
        clock.now += 1
        await expect(ledger, FIRST, *[f"user-{n}" for n in range(900)])
        kept = [id for id in ids if await report(ledger, id) is not None]
        assert kept == ids[-len(kept) :]
        return len(kept)


class TestStats:
    async def test_before_the_first_ack(self, backend: Backend) -> None:
        ledger = await backend.ledger()
        assert await stats(ledger) == AckStats(0, 0, 0, None, None)

    async def test_times_are_from_sending_to_acking_in_milliseconds(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger(timeout_seconds=1000)
        ids = [f"6f1de0fd-0000-4000-8000-{n:012d}" for n in range(100)]
        for id in ids:
            await expect(ledger, id, "ann")
        for id in ids:
            clock.now += 1
            await acknowledge(ledger, "ann", id)
        figures = await stats(ledger)
        assert (figures.pending, figures.acknowledged, figures.expired) == (0, 100, 0)
        assert figures.average_ms == pytest.approx(50_500)
        assert figures.p95_ms == pytest.approx(95_500, abs=501)
        assert backend.told.acknowledged == pytest.approx(range(1, 101))

    async def test_none_took_less_than_nothing_where_clocks_differ(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann")
        await settled(ledger.expect_anyone("acme", SECOND))
        clock.now -= 5
        await acknowledge(ledger, "ann", FIRST)
        await acknowledge(ledger, "ann", SECOND)
        assert backend.told.acknowledged == [0.0, 0.0]
        assert (await stats(ledger)).average_ms == 0.0

    async def test_what_waited_in_the_queue_counts_from_when_it_was_sent(
        self, backend: Backend, clock: Clock
    ) -> None:
        ledger = await backend.ledger()
        await expect(ledger, FIRST, "ann", queued=True)
        clock.now += 500
        await expect(ledger, FIRST, "ann")
        clock.now += 2
        await acknowledge(ledger, "ann", FIRST)
        assert backend.told.acknowledged == pytest.approx([2.0])
