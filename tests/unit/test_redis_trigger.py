"""notifyd.dispatch.redis_trigger with a dispatcher that a test holds; all forms of messages stand
in tests/server/test_redis_sources.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import pytest
from structlog.testing import capture_logs

from notifyd.compose import Composer
from notifyd.dispatch.redis_trigger import BadMessages, Intake, RedisTrigger, Said, said_by
from notifyd.errors import Unavailable, ValidationError
from notifyd.eventually import Eventually
from notifyd.idempotency import MemoryIdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.metrics import Metrics
from notifyd.notification import Notification, Outcome, Receipt, Target
from notifyd.options import BreakerSettings, IdempotencySettings
from notifyd.redis_client import Redis
from notifyd.resilience import CircuitBreaker
from notifyd.templates import MemoryTemplates, Template

ID = "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"


class HeldDispatcher:
    """Keeps what it is to dispatch; with `stores`, receipts come when the test says so."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.targets: list[Target] = []
        self.stores: list[asyncio.Future[Receipt]] | None = None
        self.fails: Exception | None = None
        self.failed = 0

    def dispatch(
        self,
        tenant: str,
        target: Target,
        notification: Notification,
        *,
        exclude_connection: str | None = None,
        source: str,
    ) -> Eventually[Receipt]:
        if self.fails is not None:
            self.failed += 1
            raise self.fails
        self.sent.append(json.loads(bytes(notification.payload)))
        self.targets.append(target)
        if self.stores is None:
            return Receipt(notification.id, Outcome.DELIVERED, 1)
        self.stores.append(asyncio.get_running_loop().create_future())
        return self.stores[-1]


class SlowTemplates(MemoryTemplates):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()

    async def get(self, tenant: str, id: str) -> Template:  # type: ignore[override]  # stores may take their time
        await self.answer.wait()
        return super().get(tenant, id)


class Parts:
    """A trigger on a Redis that is never asked."""

    def __init__(
        self, lease: Any = None, keeps_up: Any = None, again: bool = False, **given: Any
    ) -> None:
        self.dispatcher = HeldDispatcher()
        self.templates = SlowTemplates()
        self.metrics = Metrics()
        self.intake = Intake(
            self.dispatcher,  # type: ignore[arg-type]  # all of it that is needed
            Composer(self.templates, clock=lambda: 1.0, new_id=new_uuid),
            MemoryIdempotencyKeys(IdempotencySettings()),
            source="redis",
            alone=True,
            again=again,
            tenant_of=lambda named: named or "default",
        )
        self.trigger = RedisTrigger(
            Redis("redis://localhost:1", CircuitBreaker(BreakerSettings())),
            self.intake,
            self.metrics,
            BadMessages(self.metrics),
            patterns=("n:user:*",),
            probe_prefix="probe",
            lease=lease,
            keeps_up=keeps_up,
            **given,
        )
        self.resumed = 0
        self.trigger.subscriber.resume = self._resume  # type: ignore[method-assign]  # to be counted

    def _resume(self) -> None:
        self.resumed += 1

    def take(self, payload: Any, **more: Any) -> bool:
        message = {"event_type": "e", "payload": payload, **more}
        return self.trigger.receive(b"n:user:*", b"n:user:u1", json.dumps(message).encode())

    @property
    def lost(self) -> float:
        return self.metrics.delivery_failures_total.labels("unavailable").value


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("notification:user:*", Said("user", 18)),
        ("user:*", Said("user", 5)),
        ("a:b:channel:*", Said("channel", 12)),
        ("notification:broadcast", Said("broadcast")),
        ("broadcast", Said("broadcast")),
        ("notification:users", Said("users")),
        ("notification:channels", Said("channels")),
        ("notification:*", Said()),
        ("notification:user:?", Said()),
        ("notification:*:user:*", Said()),
        ("notification:[ab]:user:*", Said()),
        ("*", Said()),
        ("notification:user", Said()),
    ],
)
def test_what_a_channel_says(pattern: str, said: Said) -> None:
    assert said_by(pattern) == said


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_without_a_store_nothing_waits() -> None:
    parts = Parts()
    assert all(parts.take(n) for n in range(3))
    assert parts.dispatcher.sent == [0, 1, 2]
    assert parts.trigger.under_way == 0


async def test_no_more_is_taken_than_may_be_under_way() -> None:
    parts = Parts(max_under_way=4)
    stores = parts.dispatcher.stores = []
    assert [parts.take(n) for n in range(4)] == [True, True, True, False]
    stores[0].set_result(Receipt(ID, Outcome.QUEUED))
    await settle()
    assert parts.resumed == 0
    for store in stores[1:]:
        store.set_result(Receipt(ID, Outcome.QUEUED))
    await settle()
    assert parts.resumed > 0
    assert parts.trigger.under_way == 0


async def test_the_ledger_is_waited_for_too() -> None:
    answers: list[asyncio.Future[None]] = []

    def keeps_up() -> Awaitable[None]:
        answers.append(asyncio.get_running_loop().create_future())
        return answers[-1]

    parts = Parts(keeps_up=keeps_up)
    taken = [parts.take(n) for n in range(1000)]
    assert (taken[:-1], taken[-1]) == ([True] * 999, False)
    for answer in answers:
        answer.set_exception(Unavailable("away"))
    await settle()
    assert parts.trigger.under_way == 0
    assert parts.resumed > 0


async def test_nothing_overtakes_what_has_to_wait() -> None:
    parts = Parts()
    assert parts.trigger.receive(
        b"n:user:*", b"n:user:u1", b'{"template_id":"none","variables":{}}'
    )
    parts.take(1)
    parts.take(2, idempotency_key="k")
    parts.take(3)
    await settle()
    assert parts.dispatcher.sent == []
    assert parts.trigger.under_way == 4
    parts.templates.answer.set()
    await settle()
    assert parts.dispatcher.sent == [1, 2, 3]
    assert parts.metrics.redis_bad_messages_total.value == 1


@pytest.mark.parametrize(
    "key", [{"id": ID}, {"idempotency_key": "k"}, {"id": ID, "idempotency_key": "k"}]
)
async def test_what_is_at_work_with_its_key_is_waited_for(key: dict[str, str]) -> None:
    parts = Parts()
    stores = parts.dispatcher.stores = []
    for _ in range(3):
        parts.take(1, **key)
    await settle()
    assert len(stores) == 1
    # Nobody has it: the second of them is sent instead.
    stores[0].set_exception(Unavailable("away"))
    await settle()
    assert len(stores) == 2
    stores[1].set_result(Receipt(ID, Outcome.QUEUED))
    await settle()
    assert len(stores) == 2
    assert parts.trigger.under_way == 0
    assert parts.lost == 1


async def test_a_key_with_another_message_is_a_mistake() -> None:
    parts = Parts()
    parts.take(1, idempotency_key="k")
    parts.take(2, idempotency_key="k")
    await settle()
    assert parts.dispatcher.sent == [1]
    assert parts.metrics.redis_bad_messages_total.value == 1


@pytest.mark.parametrize("key", [{}, {"id": ID}])
async def test_what_a_store_does_not_take_is_lost_and_told_once(key: dict[str, str]) -> None:
    parts = Parts()
    with capture_logs() as logs:
        parts.dispatcher.fails = Unavailable("Redis does not answer.")
        parts.take(1, **key)
        parts.take(1, **key)
        await settle()
        parts.dispatcher.fails = None
        parts.take(1, **key)
        await settle()
    assert parts.lost == 2
    assert parts.dispatcher.sent == [1]
    assert [entry["log_level"] for entry in logs] == ["warning"]


async def test_what_the_dispatcher_refuses_is_bad() -> None:
    parts = Parts()
    parts.dispatcher.fails = ValidationError("too large")
    parts.take(1)
    assert parts.metrics.redis_bad_messages_total.value == 1


async def test_a_fault_of_ours_ends_nothing() -> None:
    parts = Parts()
    parts.dispatcher.fails = RuntimeError("a fault")
    with capture_logs() as logs:
        assert parts.take(1)
        parts.take(1, id=ID)
        await settle()
    parts.dispatcher.fails = None
    parts.take(2)
    parts.take(2, id=ID)
    await settle()
    assert parts.dispatcher.sent == [2, 2]
    assert [entry["log_level"] for entry in logs] == ["error", "error"]


class Switch:
    """A lease by hand."""

    held = True


async def test_without_the_lease_nothing_is_dispatched() -> None:
    lease = Switch()
    parts = Parts(lease=lease)
    parts.take(1)
    lease.held = False
    assert parts.take(2)
    assert parts.dispatcher.sent == [1]


async def test_at_its_end_it_waits_for_what_is_under_way() -> None:
    parts = Parts()
    stores = parts.dispatcher.stores = []
    parts.take(1)
    parts.take(2, id=ID)
    await settle()
    closing = asyncio.ensure_future(parts.trigger.aclose())
    await settle()
    assert not closing.done()
    for store in stores:
        store.set_result(Receipt(ID, Outcome.QUEUED))
    await closing


async def test_at_its_end_it_gives_up_what_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notifyd.dispatch.redis_trigger.CLOSE_SECONDS", 0.01)
    parts = Parts()
    parts.trigger.receive(b"n:user:*", b"n:user:u1", b'{"template_id":"t","variables":{}}')
    parts.take(1)
    await settle()
    await parts.trigger.aclose()
    assert parts.dispatcher.sent == []
    assert parts.trigger.under_way == 0
