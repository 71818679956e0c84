"""What the server counts, and its text for Prometheus.

Counting is plain arithmetic on slots, without the locks of prometheus_client's own values; that
package only writes the text. Everything belongs to the event loop's thread. Count per dispatch, not
per delivery: `metrics.deliveries_total.labels("websocket").inc(n)`; keep the child that `labels`
returned where the label values are known in advance.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

PREFIX = "notifyd_"

TRANSPORTS = ("websocket", "sse")
TARGETS = ("user", "users", "broadcast", "channel", "channels")
SOURCES = ("http", "python", "redis", "redis_stream")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
STATUSES = tuple(str(status.value) for status in HTTPStatus)
CLOSE_REASONS = (
    "client",  # 1000 or 1001 by the client, or a stream that its reader ended
    "lost",  # the socket ended without a close
    "shutdown",  # 1001
    "protocol_error",  # 1002
    "invalid_utf8",  # 1007
    "too_big",  # 1009
    "internal",  # 1011
    "unauthorized",  # 4001
    "forbidden",  # 4003
    "slow",  # 4008
    "evicted",  # 4009, for a newer connection of the same user
    "token_expired",  # 4010
    "idle",  # 4012
    "rate_limited",  # 4029
)
DIRECTIONS = ("sent", "received")
BAD_MESSAGE_REASONS = ("not_msgpack", "shape", "unknown", "payload", "failed")
LIMITED = ("http", "connection", "message")
CORRUPT_REASONS = ("not_json", "version", "shape", "template")
FAILURE_REASONS = ("queue_full", "slow", "unavailable", "too_large")

OTHER = "other"
"""The label value that stands for every one that is not known in advance."""

MAX_CHILDREN = 1000
"""Label combinations of one metric; what comes beyond is counted as `other`."""

MICROSECONDS_TO_SECONDS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
MILLISECONDS_TO_MINUTES = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
SECONDS_TO_DAYS = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0, 604800.0)


OF_STORES = ("queue_messages", "ack_pending")
"""What a store that several processes share says, and not each of them."""

Samples = dict[str, list[tuple[str, dict[str, str], float]]]
"""By the names of their metrics: each sample's name, labels and value."""


class Worker(msgspec.Struct, frozen=True):
    """One of several processes on one port; `group` is the same for these, and for no others."""

    group: str
    number: int


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Count `amount` more (never negative)."""
        self.value += amount

    def export(self, metric: Metric, labels: dict[str, str]) -> None:
        """Add this counter's sample to `metric`."""
        metric.add_sample(metric.name + "_total", labels, self.value)


class Gauge:
    """A number that goes up and down: set by its owner, or read from it at each scrape."""

    __slots__ = ("_read", "_value")

    def __init__(self) -> None:
        self._value: float = 0
        self._read: Callable[[], float] | None = None

    @property
    def value(self) -> float:
        """The number now; raises what the callback raises."""
        return self._value if self._read is None else self._read()

    def inc(self, amount: float = 1) -> None:
        """Up by `amount`."""
        self._value += amount

    def set(self, value: float) -> None:
        """Stand at `value`."""
        self._value = value

    @property
    def is_read(self) -> bool:
        """Whether it is read from its owner."""
        return self._read is not None

    def read_from(self, callback: Callable[[], float]) -> None:
        """Ask `callback` at each scrape, on the event loop's thread; no number is kept then."""
        self._read = callback

    def export(self, metric: Metric, labels: dict[str, str]) -> None:
        """Add this gauge's sample to `metric`."""
        metric.add_sample(metric.name, labels, self.value)


class Histogram:
    """How often observed values fell into buckets; a value on a bound belongs below it (`le`)."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum: float = 0

    def observe(self, value: float) -> None:
        """Count `value`, in the metric's unit."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_average(self, total: float, count: int) -> None:
        """Count `count` values that were measured together, each as their average."""
        self._counts[bisect_left(self._bounds, total / count)] += count
        self._sum += total

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """The sum of the values observed."""
        return self._sum

    def export(self, metric: Metric, labels: dict[str, str]) -> None:
        """Add this histogram's samples to `metric`; each bucket holds those below it too."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            metric.add_sample(metric.name + "_bucket", {**labels, "le": str(bound)}, total)
        metric.add_sample(metric.name + "_count", labels, total)
        metric.add_sample(metric.name + "_sum", labels, self._sum)


MetricType = Literal["counter", "gauge", "histogram"]


class Description(msgspec.Struct, frozen=True):
    """What a metric is called, what it is, and what it says."""

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str


class Child(Protocol):
    """What a family is made of."""

    def export(self, metric: Metric, labels: dict[str, str]) -> None:
        """Add the child's samples to `metric`."""


ChildT = TypeVar("ChildT", bound=Child)


class Family(Generic[ChildT]):
    """One metric with labels: a child for each combination of their values.

    `known` holds for each label the values known in advance, or None where the caller promises a
    bounded set of its own (the names of routes).
    """

    __slots__ = ("_children", "_known", "_make", "description")

    def __init__(
        self,
        description: Description,
        make: Callable[[], ChildT],
        known: tuple[Collection[str] | None, ...],
    ) -> None:
        self.description = description
        self._make = make
        self._known = tuple(None if values is None else frozenset(values) for values in known)
        self._children: dict[tuple[str, ...], ChildT] = {}
        if len(known) == 1:
            # A series that is there at zero from the start is one whose first increase can be seen.
            for value in known[0] or ():
                self.labels(value)

    def labels(self, *values: str) -> ChildT:
        """The child for these label values, in the order of the labels; worth keeping.

        A value that is not known counts as `other`, so that no caller can make series without end.
        Raises TypeError for a wrong number of values.
        """
        try:
            return self._children[values]
        except KeyError:
            return self._child(values)

    def _child(self, values: tuple[str, ...]) -> ChildT:
        if len(values) != len(self._known):
            raise TypeError(f"{len(self._known)} label values are needed, {len(values)} were given")
        bounded = tuple(
            value if known is None or value in known else OTHER
            for value, known in zip(values, self._known, strict=True)
        )
        if bounded not in self._children and len(self._children) >= MAX_CHILDREN:
            bounded = (OTHER,) * len(values)
        return self._children.setdefault(bounded, self._make())

    def export(self) -> Metric:
        """The metric with all of its samples, in the order of their label values."""
        description = self.description
        metric = Metric(
            # The sample's `_total` is not part of a counter's name (OpenMetrics).
            description.name.removesuffix("_total"),
            description.help,
            description.type,
        )
        for values, child in sorted(self._children.items(), key=lambda item: item[0]):
            child.export(metric, dict(zip(description.labels, values, strict=True)))
        return metric


class _Exporter:
    """The collector that the registry asks.

    Not Metrics itself: prometheus_client takes a method called `describe` for its own.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return (metric for _, metric in self._metrics.exported())


class _OfWorkers:
    """The collector for all processes on one port, which tells their samples apart."""

    def __init__(self, metrics: Metrics, own: int, others: Mapping[int, Samples]) -> None:
        self._metrics = metrics
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        own = self._metrics.samples()
        everybody = sorted({**self._others, self._own: own}.items())
        for name, metric in self._metrics.exported():
            if name in own:
                metric.samples.clear()
                for number, samples in everybody:
                    for sample, labels, value in samples.get(name, ()):
                        metric.add_sample(sample, {**labels, "worker": str(number)}, value)
            yield metric


class Metrics:
    """Every metric of one server, under the names of the protocol without their prefix."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._families: list[Family[Any]] = []
        self._left_out: set[str] = set()

        self.connections = self._gauges(
            "connections", "Connections open now.", transport=TRANSPORTS
        )
        self.users_connected = self._gauge(
            "users_connected", "Users with at least one connection open now."
        )
        self.channels_active = self._gauge(
            "channels_active", "Channels with at least one subscriber now."
        )
        self.channel_subscriptions = self._gauge(
            "channel_subscriptions", "Subscriptions of connections to channels now."
        )
        self.connections_opened_total = self._counters(
            "connections_opened_total", "Connections accepted.", transport=TRANSPORTS
        )
        self.connections_closed_total = self._counters(
            "connections_closed_total",
            "Connections ended, by why they did.",
            transport=TRANSPORTS,
            reason=CLOSE_REASONS,
        )
        self.connection_duration_seconds = self._histogram(
            "connection_duration_seconds", "How long connections lived.", SECONDS_TO_DAYS
        )
        self.notifications_total = self._counters(
            "notifications_total",
            "Notifications dispatched, by whom they were for and where they came in.",
            target=TARGETS,
            source=SOURCES,
        )
        self.deliveries_total = self._counters(
            "deliveries_total", "Notifications taken by a connection.", transport=TRANSPORTS
        )
        self.delivery_failures_total = self._counters(
            "delivery_failures_total",
            "Recipients for whom a notification failed, by why it did.",
            reason=FAILURE_REASONS,
        )
        self.dispatch_seconds = self._histogram(
            "dispatch_seconds",
            "From a notification's acceptance to its receipt.",
            MICROSECONDS_TO_SECONDS,
        )
        self.fanout_seconds = self._histogram(
            "fanout_seconds",
            "Handing one notification to all local connections that get it.",
            MICROSECONDS_TO_SECONDS,
        )
        self.outbox_bytes = self._gauge(
            "outbox_bytes", "Bytes that wait in outboxes for slow connections."
        )
        self.queue_messages = self._gauge(
            "queue_messages", "Notifications kept for users who have not confirmed them."
        )
        self.queue_enqueued_total = self._counter(
            "queue_enqueued_total", "Notifications put into a user's queue."
        )
        self.queue_replayed_total = self._counter(
            "queue_replayed_total", "Queued notifications sent to a user who connected."
        )
        self.queue_expired_total = self._counter(
            "queue_expired_total", "Queued and held notifications that outlived their time."
        )
        self.queue_dropped_total = self._counter(
            "queue_dropped_total", "Notifications that a full queue gave up, or did not take."
        )
        self.queue_corrupt_total = self._counters(
            "queue_corrupt_total",
            "Entries and templates of a store that could not be read, by why not.",
            reason=CORRUPT_REASONS,
        )
        self.ack_pending = self._gauge(
            "ack_pending", "Acknowledgements expected and not yet received."
        )
        self.ack_received_total = self._counter("ack_received_total", "Acknowledgements received.")
        self.ack_expired_total = self._counter(
            "ack_expired_total", "Acknowledgements that did not come in time."
        )
        self.ack_seconds = self._histogram(
            "ack_seconds", "From delivery to acknowledgement.", MILLISECONDS_TO_MINUTES
        )
        self.ack_notes_lost_total = self._counter(
            "ack_notes_lost_total",
            "Notes of what was sent and confirmed that the ledger's store did not take.",
        )
        self.ratelimit_allowed_total = self._counters(
            "ratelimit_allowed_total",
            "Requests, handshakes and messages let through, where limits are on.",
            kind=LIMITED,
        )
        self.ratelimit_denied_total = self._counters(
            "ratelimit_denied_total",
            "Requests, handshakes and messages that were over a rate.",
            kind=LIMITED,
        )
        self.redis_up = self._gauge("redis_up", "Whether there is a connection to Redis (1 or 0).")
        self.redis_breaker_state = self._gauge(
            "redis_breaker_state", "The breaker of Redis: 0 closed, 1 open, 2 half open."
        )
        self.redis_reconnects_total = self._counter(
            "redis_reconnects_total", "Connections to Redis after the first one."
        )
        self.redis_bad_messages_total = self._counter(
            "redis_bad_messages_total", "Messages in Redis that could not be used."
        )
        self.redis_dead_letters_total = self._counter(
            "redis_dead_letters_total", "Stream entries moved to the dead-letter stream."
        )
        self.redis_trigger_active = self._gauge(
            "redis_trigger_active",
            "Whether this node has subscribed to the trigger's patterns (1 or 0).",
        )
        self.postgres_up = self._gauge(
            "postgres_up", "Whether PostgreSQL answered last time (1 or 0)."
        )
        self.postgres_breaker_state = self._gauge(
            "postgres_breaker_state", "The breaker of PostgreSQL: 0 closed, 1 open, 2 half open."
        )
        self.cluster_nodes = self._gauge(
            "cluster_nodes", "Nodes whose leases hold, this one included."
        )
        self.cluster_bus_up = self._gauge(
            "cluster_bus_up", "Whether this node hears the others (1 or 0)."
        )
        self.cluster_messages_total = self._counters(
            "cluster_messages_total",
            "Items in messages between nodes, without this node's own echo.",
            direction=DIRECTIONS,
        )
        self.cluster_bad_messages_total = self._counters(
            "cluster_bad_messages_total",
            "Messages between nodes that could not be used, by why not.",
            reason=BAD_MESSAGE_REASONS,
        )
        self.cluster_unanswered_total = self._counter(
            "cluster_unanswered_total", "Times that a node was waited for and did not answer."
        )
        self.http_requests_total = self._counters(
            "http_requests_total",
            "HTTP requests answered, by the name of their route.",
            method=METHODS,
            route=None,
            status=STATUSES,
        )
        self.http_request_seconds = self._histogram(
            "http_request_seconds",
            "From a request's last byte to its answer; streams are not counted.",
            MICROSECONDS_TO_SECONDS,
        )
        self.loop_lag_seconds = self._histogram(
            "loop_lag_seconds",
            "How much later than asked the event loop woke, by regular probes.",
            MICROSECONDS_TO_SECONDS,
        )

        # A registry of its own: two servers in one process, or an embedder's metrics, do not mix.
        self._registry = CollectorRegistry()
        self._registry.register(_Exporter(self))

    def render(self) -> bytes:
        """All metrics in Prometheus's text format, version 0.0.4 (`content_type`)."""
        return generate_latest(self._registry)

    def render_workers(self, own: int, others: Mapping[int, Samples]) -> bytes:
        """`render` for several processes, by their numbers: what each counts gets a label `worker`,
        what a store says of all of them has none."""
        registry = CollectorRegistry()
        registry.register(_OfWorkers(self, own, others))
        return generate_latest(registry)

    def samples(self) -> Samples:
        """What this process counts, without what a store says."""
        shared = {f"{PREFIX}{name}" for name in OF_STORES if not getattr(self, name).is_read}
        return {
            name: [(each.name, each.labels, float(each.value)) for each in metric.samples]
            for name, metric in self.exported()
            if name not in shared
        }

    def exported(self) -> Iterator[tuple[str, Metric]]:
        """Every metric that is rendered, with its samples, by its name with prefix."""
        for family in self._families:
            name = family.description.name
            if name not in self._left_out:
                yield name, family.export()

    def leave_out(self, prefix: str) -> None:
        """Do not render the metrics of this prefix: they are of a store that is not used, and zero
        would say that it is down."""
        for family in self._families:
            if family.description.name.startswith(f"{PREFIX}{prefix}_"):
                self._left_out.add(family.description.name)

    def describe(self) -> list[Description]:
        """Every metric's name (with prefix), type, labels and help, in the protocol's order."""
        return [family.description for family in self._families]

    def _counter(self, name: str, help: str) -> Counter:
        return self._family("counter", Counter, name, help, {}).labels()

    def _counters(self, name: str, help: str, **labels: Collection[str] | None) -> Family[Counter]:
        return self._family("counter", Counter, name, help, labels)

    def _gauge(self, name: str, help: str) -> Gauge:
        return self._family("gauge", Gauge, name, help, {}).labels()

    def _gauges(self, name: str, help: str, **labels: Collection[str] | None) -> Family[Gauge]:
        return self._family("gauge", Gauge, name, help, labels)

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
        return self._family("histogram", lambda: Histogram(bounds), name, help, {}).labels()

    def _family(
        self,
        type: MetricType,
        make: Callable[[], ChildT],
        name: str,
        help: str,
        labels: Mapping[str, Collection[str] | None],
    ) -> Family[ChildT]:
        description = Description(PREFIX + name, type, tuple(labels), help)
        family = Family(description, make, tuple(labels.values()))
        self._families.append(family)
        return family
