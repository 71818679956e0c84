"""Receipts: from what became of each recipient, here and on other nodes."""

from __future__ import annotations

from notifyd.cluster.router import Elsewhere, Spreading
from notifyd.notification import Outcome, Receipt, RecipientResult
from notifyd.queue.base import Rejection

BEST_FIRST = tuple(Outcome)


def joined(here: RecipientResult, there: Elsewhere) -> RecipientResult:
    """What became of a recipient, here and on other nodes."""
    delivered = here.connections + there.delivered
    if delivered:
        return RecipientResult(Outcome.DELIVERED, delivered)
    if there.routed:
        return RecipientResult(Outcome.ROUTED, there.routed)
    if there.filtered and here.outcome is Outcome.NOBODY:
        return RecipientResult(Outcome.FILTERED)
    return here


def with_others(here: Receipt, there: Spreading) -> Receipt:
    """What became of a notification to who is connected, here and on other nodes."""
    delivered = here.delivered_to + there.delivered
    if delivered:
        outcome = Outcome.DELIVERED
    elif there.silent:
        outcome = Outcome.ROUTED
    elif there.filtered:
        outcome = Outcome.FILTERED
    else:
        outcome = here.outcome
    channels = here.channels
    if channels is not None and there.channels:
        joined = zip(channels.items(), there.channels, strict=True)
        channels = {name: count + more for (name, count), more in joined}
    return Receipt(here.notification_id, outcome, delivered, there.silent, channels=channels)


def receipt_of_one(notification_id: str, results: dict[str, RecipientResult]) -> Receipt:
    """The receipt of a single recipient."""
    (result,) = results.values()
    return Receipt(
        notification_id,
        result.outcome,
        delivered_to=0 if result.outcome is Outcome.ROUTED else result.connections,
        routed=result.connections if result.outcome is Outcome.ROUTED else 0,
        queued=int(result.outcome is Outcome.QUEUED),
        failed=int(result.outcome is Outcome.FAILED),
        reason=result.reason,
    )


def receipt_of_queued(notification_id: str, rejection: Rejection | None) -> Receipt:
    if rejection is None:
        return Receipt(notification_id, Outcome.QUEUED, queued=1)
    return Receipt(notification_id, Outcome.FAILED, failed=1, reason=rejection)


def receipt_of_many(notification_id: str, results: dict[str, RecipientResult]) -> Receipt:
    """The receipt of several recipients; the best of their outcomes is the call's."""
    outcomes = [result.outcome for result in results.values()]
    present = set(outcomes)
    return Receipt(
        notification_id,
        next(outcome for outcome in BEST_FIRST if outcome in present),
        delivered_to=sum(
            result.connections
            for result in results.values()
            if result.outcome is not Outcome.ROUTED
        ),
        routed=sum(
            result.connections for result in results.values() if result.outcome is Outcome.ROUTED
        ),
        queued=outcomes.count(Outcome.QUEUED),
        failed=outcomes.count(Outcome.FAILED),
        results=results,
    )
