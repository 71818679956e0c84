from __future__ import annotations

import msgspec
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from notifyd.metrics import MAX_CHILDREN, Histogram, Metrics, Samples

# protocol.md, "Metrics": everything without a mark, what [stores] brings, corrupt entries, what the
# ledger was not told, and of [cluster] what rate limits count.
PROTOCOL = """
connections{transport}, users_connected, channels_active, channel_subscriptions,
connections_opened_total{transport}, connections_closed_total{transport,reason},
connection_duration_seconds; notifications_total{target,source}, deliveries_total{transport},
delivery_failures_total{reason}, dispatch_seconds, fanout_seconds, outbox_bytes; queue_messages,
queue_enqueued_total, queue_replayed_total, queue_expired_total, queue_dropped_total,
queue_corrupt_total{reason}; ack_pending, ack_received_total, ack_expired_total, ack_seconds,
ack_notes_lost_total;
ratelimit_allowed_total{kind}, ratelimit_denied_total{kind};
redis_up, redis_breaker_state, redis_reconnects_total, redis_bad_messages_total,
redis_dead_letters_total, redis_trigger_active, postgres_up, postgres_breaker_state;
cluster_nodes, cluster_bus_up, cluster_messages_total{direction},
cluster_bad_messages_total{reason}, cluster_unanswered_total;
http_requests_total{method,route,status}, http_request_seconds; loop_lag_seconds
"""


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_every_unmarked_metric_of_the_protocol_is_there_and_no_other() -> None:
    wanted = {}
    for entry in PROTOCOL.replace("\n", " ").replace(";", ",").replace(", ", "|").split("|"):
        name, _, labels = entry.strip().rstrip("}").partition("{")
        wanted[f"notifyd_{name}"] = tuple(labels.split(",")) if labels else ()
    metrics = Metrics()
    assert {item.name: item.labels for item in metrics.describe()} == wanted
    assert all(hasattr(metrics, name.removeprefix("notifyd_")) for name in wanted)
    assert all(item.help.endswith(".") for item in metrics.describe())


def test_the_text_says_name_type_and_help_of_each() -> None:
    metrics = Metrics()
    text = metrics.render().decode()
    for item in metrics.describe():
        assert f"# HELP {item.name} {item.help}\n" in text
        assert f"# TYPE {item.name} {item.type}\n" in text


def test_a_store_that_is_not_used_is_not_said_to_be_down() -> None:
    metrics = Metrics()
    assert {"notifyd_redis_up", "notifyd_postgres_up"} <= {name for name, _ in samples(metrics)}
    metrics.leave_out("redis")
    found = {name for name, _ in samples(metrics)}
    assert "notifyd_postgres_up" in found
    assert not any(name.startswith("notifyd_redis_") for name in found)
    assert "notifyd_redis_up" in {item.name for item in metrics.describe()}


def test_counters_add_up_by_label() -> None:
    metrics = Metrics()
    websocket = metrics.deliveries_total.labels("websocket")
    websocket.inc(1000)
    websocket.inc()
    metrics.http_requests_total.labels("POST", "send", "200").inc()
    metrics.queue_enqueued_total.inc(3)
    found = samples(metrics)
    assert found["notifyd_deliveries_total", (("transport", "websocket"),)] == 1001
    assert found["notifyd_deliveries_total", (("transport", "sse"),)] == 0
    assert found["notifyd_queue_enqueued_total", ()] == 3
    labels = (("method", "POST"), ("route", "send"), ("status", "200"))
    assert found["notifyd_http_requests_total", labels] == 1


def test_a_labelled_child_is_the_same_each_time() -> None:
    metrics = Metrics()
    child = metrics.deliveries_total.labels("websocket")
    assert metrics.deliveries_total.labels("websocket") is child


def test_gauges_are_set_or_read_at_the_scrape() -> None:
    metrics = Metrics()
    waiting = [1, 2, 3]
    metrics.outbox_bytes.read_from(lambda: sum(waiting))
    metrics.connections.labels("sse").inc(2)
    metrics.users_connected.set(7)
    waiting.append(4)
    found = samples(metrics)
    assert found["notifyd_outbox_bytes", ()] == 10
    assert found["notifyd_connections", (("transport", "sse"),)] == 2
    assert found["notifyd_users_connected", ()] == 7


def test_a_callback_that_fails_fails_the_scrape() -> None:
    metrics = Metrics()
    metrics.outbox_bytes.read_from(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metrics.render()


def test_histograms_count_from_zero_and_a_bound_belongs_below_it() -> None:
    metrics = Metrics()
    for value in (0.000001, 0.00001, 0.3, 0.5, 11.0):
        metrics.dispatch_seconds.observe(value)
    found = samples(metrics)
    assert found["notifyd_dispatch_seconds_bucket", (("le", "1e-05"),)] == 2
    assert found["notifyd_dispatch_seconds_bucket", (("le", "0.25"),)] == 2
    assert found["notifyd_dispatch_seconds_bucket", (("le", "0.5"),)] == 4
    assert found["notifyd_dispatch_seconds_bucket", (("le", "10.0"),)] == 4
    assert found["notifyd_dispatch_seconds_bucket", (("le", "+Inf"),)] == 5
    assert found["notifyd_dispatch_seconds_count", ()] == 5
    assert found["notifyd_dispatch_seconds_sum", ()] == pytest.approx(11.800011)


def test_a_histogram_tells_what_it_holds() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.5)
    histogram.observe(3)
    assert (histogram.count, histogram.sum) == (2, 4.5)


def test_label_values_are_bounded() -> None:
    metrics = Metrics()
    metrics.delivery_failures_total.labels("whatever a stranger wrote").inc()
    metrics.delivery_failures_total.labels("something else").inc()
    for number in range(2 * MAX_CHILDREN):
        metrics.http_requests_total.labels("GET", f"route-{number}", "200").inc()
    found = samples(metrics)
    assert found["notifyd_delivery_failures_total", (("reason", "other"),)] == 2
    routes = {key: value for key, value in found.items() if key[0] == "notifyd_http_requests_total"}
    assert len(routes) == MAX_CHILDREN + 1
    assert sum(routes.values()) == 2 * MAX_CHILDREN


def test_a_wrong_number_of_label_values_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="2 label values"):
        Metrics().connections_closed_total.labels("websocket")


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    metrics.http_requests_total.labels("GET", 'a"b\\c\nd', "200").inc()
    labels = (("method", "GET"), ("route", 'a"b\\c\nd'), ("status", "200"))
    assert samples(metrics)["notifyd_http_requests_total", labels] == 1


def test_two_servers_in_a_process_do_not_mix() -> None:
    first, second = Metrics(), Metrics()
    first.queue_dropped_total.inc()
    assert samples(second)["notifyd_queue_dropped_total", ()] == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("notifyd")]


def test_several_processes_are_told_apart() -> None:
    metrics = [Metrics(), Metrics()]
    for number, each in enumerate(metrics, 1):
        each.deliveries_total.labels("sse").inc(number)
        each.queue_messages.set(7)
        each.ack_pending.read_from(lambda number=number: number)  # type: ignore[misc]  # bound now
        each.ack_seconds.observe(1.0)
        # As some owners say it.
        each.cluster_bus_up.read_from(lambda: True)
        each.leave_out("postgres")
    sent = msgspec.msgpack.encode(metrics[1].samples())
    text = metrics[0].render_workers(0, {1: msgspec.msgpack.decode(sent, type=Samples)}).decode()
    found = [
        (each.name, each.labels, each.value)
        for family in text_string_to_metric_families(text)
        for each in family.samples
    ]
    for number in (0, 1):
        worker = {"worker": str(number)}
        sse = {"transport": "sse", **worker}
        assert ("notifyd_deliveries_total", sse, number + 1) in found
        assert ("notifyd_ack_pending", worker, number + 1) in found
        assert ("notifyd_ack_seconds_count", worker, 1) in found
        assert ("notifyd_cluster_bus_up", worker, 1) in found
    # A store says it for all of them.
    queued = [each for each in found if each[0] == "notifyd_queue_messages"]
    assert queued == [("notifyd_queue_messages", {}, 7)]
    assert not any(name.startswith("notifyd_postgres_") for name, _, _ in found)
    assert text.count("# TYPE notifyd_deliveries_total") == 1


def test_what_another_version_counts_besides_is_passed_over() -> None:
    metrics = Metrics()
    strange: Samples = {"notifyd_strange_total": [("notifyd_strange_total", {}, 1.0)]}
    assert b"strange" not in metrics.render_workers(0, {1: strange})
