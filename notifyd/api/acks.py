"""Acknowledgements over HTTP: by users whose stream is one-way, and the ledger for backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from notifyd.api.channels import Time
from notifyd.api.guard import Description, Endpoint, Guard, Request
from notifyd.connections.admission import Admission, Handshake
from notifyd.decoding import Decoder
from notifyd.dispatch.confirmation import AckAnswer, Confirmations
from notifyd.errors import NotFound, Unauthorized, ValidationError
from notifyd.eventually import Eventually, then
from notifyd.identifiers import canonical_uuid, timestamp_text
from notifyd.identity import Identity
from notifyd.queue.base import AckLedger, AckReport

MAX_ACKS = 100
Uuid = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]


class AckBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One id, or up to 100."""

    notification_id: Uuid | None = None
    notification_ids: Annotated[list[Uuid], Meta(min_length=1, max_length=MAX_ACKS)] | None = None


class Acked(msgspec.Struct, gc=False):
    """What is settled now, and what this user may not acknowledge, or nobody knows any more."""

    acked: list[str]
    refused: list[str]


class AckRecipient(msgspec.Struct, gc=False, omit_defaults=True):
    """One expected recipient: `by` an ack of his own, or by his transport's sign of life."""

    user_id: str
    state: Literal["queued", "pending", "confirmed", "expired"]
    confirmed_at: Time | None = None
    by: Literal["ack", "transport"] | None = None


class NotificationAcks(msgspec.Struct, gc=False):
    """Who was expected to confirm a notification, and who has.

    `acks` counts those of a notification that nobody in particular must acknowledge.
    """

    notification_id: str
    sent_at: Time
    expected: int
    confirmed: int
    recipients: list[AckRecipient]
    acks: int


class Acks:
    """The handlers of acknowledgements; `ledger` is None where it is switched off."""

    def __init__(
        self, guard: Guard, confirmations: Confirmations, ledger: AckLedger | None
    ) -> None:
        self._guard = guard
        self._confirmations = confirmations
        self._ledger = ledger
        self._body = Decoder(AckBody)

    def endpoints(self) -> list[Endpoint]:
        """For users, and for backends."""
        return [
            Endpoint(
                self._guard,
                "POST",
                "/api/v1/acks",
                self.acknowledge,
                Description("Acknowledge as a user", "Acknowledgements", AckBody, Acked),
                access="user",
            ),
            Endpoint(
                self._guard,
                "GET",
                "/api/v1/notifications/{id}/acks",
                self.report,
                Description(
                    "Who has confirmed a notification",
                    "Acknowledgements",
                    answer=NotificationAcks,
                    errors=(404,),
                ),
                access="read",
            ),
        ]

    def acknowledge(self, request: Request) -> Eventually[Acked]:
        """POST /api/v1/acks."""
        body = self._body(request.body)
        if (body.notification_id is None) == (body.notification_ids is None):
            raise ValidationError(
                "Either notification_id or notification_ids is needed.",
                field="notification_id",
                constraint="either notification_id or notification_ids",
            )
        if body.notification_ids is None:
            asked = [canonical_uuid(body.notification_id or "", "notification_id")]
        else:
            asked = [
                canonical_uuid(id, f"notification_ids[{index}]")
                for index, id in enumerate(body.notification_ids)
            ]
        identity = request.identity

        def answer(answer: AckAnswer) -> Acked:
            return Acked(answer.acked, answer.refused)

        return then(
            self._confirmations.acknowledge(identity.tenant, identity.user_id, asked), answer
        )

    def report(self, request: Request) -> Eventually[NotificationAcks]:
        """GET /api/v1/notifications/{id}/acks."""
        id = canonical_uuid(request.path_params["id"])
        if self._ledger is None:
            raise NotFound("Acknowledgements are not recorded: ack.enabled is false.")
        return then(self._ledger.report(request.tenant, id), _told)


def identify_with(admission: Admission) -> Callable[[Request], Eventually[Identity]]:
    """The user of a request as of a stream: by Authorization, or by cookie from an allowed page.

    The function raises what `Admission.identify` raises. A token in the query is not looked at.
    """

    def identified(identity: Identity | None) -> Identity:
        if identity is None:
            raise Unauthorized("A token is missing.")
        return identity

    def identify(request: Request) -> Eventually[Identity]:
        handshake = Handshake("sse", b"", request.headers, request.address)
        return then(admission.identify(handshake), identified)

    return identify


def _told(report: AckReport | None) -> NotificationAcks:
    if report is None:
        raise NotFound("The ledger does not know this notification, or has forgotten it.")
    recipients = [
        AckRecipient(
            each.user_id,
            each.state,
            None if each.confirmed_at is None else timestamp_text(each.confirmed_at),
            each.by,
        )
        for each in report.recipients
    ]
    confirmed = sum(each.state == "confirmed" for each in recipients)
    return NotificationAcks(
        report.notification_id,
        timestamp_text(report.sent_at),
        len(recipients),
        confirmed,
        recipients,
        report.acks,
    )
