"""Queries find their rows by index when there are many, and count little when they do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import asyncpg

from notifyd.identifiers import new_uuid
from notifyd.options import BreakerSettings
from notifyd.postgres import Postgres
from notifyd.queue.postgres import MIGRATIONS, QUERIES
from notifyd.resilience import CircuitBreaker
from tests.contract.backends import NOW
from tests.stores import PostgresServer, schema

ROWS = 100_000
USERS = 10_000
EACH = ROWS // USERS

FILL = f"""
INSERT INTO notifyd_logs
    (tenant, user_id, epoch, next_offset, pending, expires_first, touched_at)
SELECT 'acme', 'user-' || n, 'e', {EACH + 1}, {EACH}, {NOW}, {NOW}
FROM generate_series(1, {USERS}) AS n;
INSERT INTO notifyd_entries
    (log_id, entry_offset, notification_id, priority, page_bytes, expires_at, body)
SELECT n % {USERS} + 1, n / {USERS} + 1, gen_random_uuid(), n % 4, 300, {NOW} + n,
    '\\x7b7d'::bytea
FROM generate_series(0, {ROWS} - 1) AS n;
INSERT INTO notifyd_ack_records (tenant, notification_id, sent_at, anyone, recipients)
SELECT 'acme', gen_random_uuid(), {NOW} + n, false, 1 FROM generate_series(1, {ROWS}) AS n;
INSERT INTO notifyd_acks (record_id, user_id, state, sent_at)
SELECT n, 'user-' || n, CASE WHEN n % 100 = 0 THEN 1 ELSE 2 END, {NOW} + n
FROM generate_series(1, {ROWS}) AS n;
INSERT INTO notifyd_idempotency_keys (scope, fingerprint, owner, status, body, expires_at)
SELECT sha256(n::text::bytea), ''::bytea, ''::bytea, 200, ''::bytea, {NOW} + n
FROM generate_series(1, {ROWS}) AS n;
"""  # noqa: S608  # made of numbers

SOME_LOGS = list(range(1, 101))
SOME_USERS = [f"user-{n}" for n in SOME_LOGS]
TENANTS = ["acme"] * 100
OFFSETS = [n % EACH + 1 for n in SOME_LOGS]
IDS = [new_uuid() for _ in SOME_LOGS]
OFFSETS_AFTER = [1000] * 100
RANKS, SIZES, TIMES, BODIES = [1] * 100, [300] * 100, [NOW] * 100, [b"{}"] * 100
SCOPES = [bytes([n]) * 32 for n in SOME_LOGS]

PLANS: dict[str, tuple[list[Any], set[str]]] = {
    "lock_logs": (
        [TENANTS, SOME_USERS, [1] * 100, [NOW] * 100, "e", 1, NOW],
        {"notifyd_logs_tenant_user_id_key"},
    ),
    "insert_entries": (
        [SOME_LOGS, OFFSETS_AFTER, SOME_LOGS, IDS, RANKS, SIZES, TIMES, BODIES, 0, 1],
        {"notifyd_entries_pending"},
    ),
    "recount_logs": ([SOME_LOGS], {"notifyd_logs_pkey", "notifyd_entries_"}),
    "find_pending": ([SOME_LOGS, IDS], {"notifyd_entries_pending"}),
    "drop_dead": ([SOME_LOGS, NOW], {"notifyd_entries_"}),
    "drop_stale": (
        [SOME_LOGS, IDS, NOW + ROWS],
        {"notifyd_entries_pending", "notifyd_logs_pkey"},
    ),
    "find_least": ([SOME_LOGS, [5] * 100], {"notifyd_entries_to_give_up"}),
    "give_up": ([SOME_LOGS, OFFSETS], {"notifyd_entries_pkey"}),
    "lock_known_logs": ([TENANTS, SOME_USERS], {"notifyd_logs_tenant_user_id_key"}),
    "settle": ([SOME_LOGS, IDS, 1, SOME_LOGS], {"notifyd_entries_pending", "notifyd_logs_pkey"}),
    "erase": ([SOME_LOGS[:2], 1], {"notifyd_entries_", "notifyd_logs_pkey"}),
    "read_pages": (
        [TENANTS, SOME_USERS, [0] * 100, [65536] * 100, NOW],
        {"notifyd_logs_tenant_user_id_key", "notifyd_entries_pkey"},
    ),
    "tell_overflow": ([SOME_LOGS, [False] * 100], {"notifyd_logs_pkey"}),
    "set_aside": ([SOME_LOGS, OFFSETS, ["shape"] * 100, 1], {"notifyd_entries_pkey"}),
    "find_expired": ([NOW + 10, 1000], {"notifyd_entries_to_expire"}),
    "lock_free_logs": ([SOME_LOGS], {"notifyd_logs_pkey"}),
    "delete_expired": ([SOME_LOGS, OFFSETS, NOW, 1], {"notifyd_entries_pkey"}),
    "forget_logs": ([0, 5000, NOW - 1], {"notifyd_logs_pkey"}),
    "lock_records": (
        [TENANTS, IDS, [NOW] * 100, [False] * 100, [1] * 100],
        {"notifyd_ack_records_tenant_notification_id_key"},
    ),
    "find_acks": ([SOME_LOGS, SOME_USERS], {"notifyd_acks_pkey"}),
    "put_acks": ([SOME_LOGS, SOME_USERS, [1] * 100, [NOW] * 100], {"notifyd_acks_pkey"}),
    "correct_recipients": ([SOME_LOGS, [1] * 100], {"notifyd_ack_records_pkey"}),
    "lock_known_records": ([TENANTS, IDS], {"notifyd_ack_records_tenant_notification_id_key"}),
    "confirm_acks": (
        [SOME_LOGS, SOME_USERS, [NOW] * 100, [True] * 100],
        {"notifyd_acks_pkey"},
    ),
    "count_anyones_acks": ([SOME_LOGS, [1] * 100], {"notifyd_ack_records_pkey"}),
    "lock_oldest_records": ([200, NOW], {"notifyd_ack_records_pkey"}),
    "let_go": ([SOME_LOGS], {"notifyd_ack_records_pkey", "notifyd_acks_pkey"}),
    "find_late": ([NOW + 10_000, 1000], {"notifyd_acks_pending"}),
    "lock_free_records": ([SOME_LOGS], {"notifyd_ack_records_pkey"}),
    "expire_acks": ([SOME_LOGS, SOME_USERS, NOW], {"notifyd_acks_pkey"}),
    "report": (
        ["acme", IDS[0]],
        {"notifyd_ack_records_tenant_notification_id_key", "notifyd_acks_pkey"},
    ),
    "claim_keys": (
        [SCOPES, [b"f"] * 100, b"o", NOW, NOW, SCOPES],
        {"notifyd_idempotency_keys_pkey"},
    ),
    "find_keys": ([SCOPES], {"notifyd_idempotency_keys_pkey"}),
    "forget_keys": ([NOW + 10, 200], {"notifyd_idempotency_keys_to_expire"}),
    "lock_keys": ([SCOPES], {"notifyd_idempotency_keys_pkey"}),
    "keep_answers": (
        [SCOPES, [200] * 100, [b""] * 100, NOW, b"o"],
        {"notifyd_idempotency_keys_pkey"},
    ),
    "release_keys": ([SCOPES, b"o"], {"notifyd_idempotency_keys_pkey"}),
}

SMALL_TABLES = {"notifyd_log_totals", "notifyd_ack_totals"}


# These walk along an index from its end, and stop early.
IN_ORDER = {"lock_oldest_records"}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)


def used(plan: dict[str, Any]) -> set[str]:
    """Indexes that a plan reads by, or finds conflicts with."""
    found = set()
    for node in nodes(plan):
        found |= {node["Index Name"]} if "Index Name" in node else set()
        found |= set(node.get("Conflict Arbiter Indexes", ()))
    return found


def literal(value: Any) -> str:
    """A value as EXECUTE takes it, whatever the type of the parameter."""

    def text(each: Any) -> str:
        return rf"\x{each.hex()}" if isinstance(each, bytes) else str(each)

    if isinstance(value, list):
        members = ",".join(text(each).replace("\\", r"\\") for each in value)
        return f"'{{{members}}}'"
    return f"'{text(value)}'"


Mode = Literal["generic", "custom"]
Plans = dict[tuple[str, Mode], dict[str, Any]]


async def explained(url: str) -> Plans:
    """Every query's plan, with what it did, prepared and in a transaction like ours: for the
    values given, and the generic one that a server may change to after five executions.

    By EXECUTE, because a parameter of an EXPLAIN is planned as the constant it is.
    """
    ours = Postgres(url, CircuitBreaker(BreakerSettings()), migrations=MIGRATIONS)
    async with schema(url) as its_own:
        connection = await asyncpg.connect(its_own)
        for migration in MIGRATIONS:
            await connection.execute(migration.sql)
        await connection.execute(FILL)
        await connection.execute("ANALYZE")
        plans: Plans = {}
        modes: tuple[Mode, ...] = ("generic", "custom")
        for (name, (arguments, _)), mode in product(PLANS.items(), modes):
            await connection.execute(ours._begin)
            await connection.execute(f"SET LOCAL plan_cache_mode = force_{mode}_plan")
            await connection.execute(f"PREPARE asked AS {QUERIES[name]}")
            text = await connection.fetchval(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"
                f" EXECUTE asked ({', '.join(map(literal, arguments))})"
            )
            plans[name, mode] = json.loads(text)[0]["Plan"]
            await connection.execute("ROLLBACK; DEALLOCATE asked")
        await connection.close()
        return plans


def faults(name: str, plan: dict[str, Any]) -> Iterator[str]:
    """What is wrong with how a query finds its rows."""
    indexes = used(plan)
    for wanted in PLANS[name][1]:
        if not any(each.startswith(wanted) for each in indexes):
            yield f"does not use {wanted}, but {sorted(indexes)}"
    for node in nodes(plan):
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] not in SMALL_TABLES:
            yield f"reads all of {node['Relation Name']}"
        # An index may be read from end to end too, where reading the table is forbidden.
        if "Index Name" in node and "Index Cond" not in node and name not in IN_ORDER:
            yield f"reads all of {node['Index Name']}"
    # A batch of a hundred touches some thousand pages at most, of tens of thousands that there are.
    if (pages := plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]) >= 6000:
        yield f"touches {pages} pages"


async def test_rows_are_found_by_index(running_postgres: PostgresServer) -> None:
    """All queries in one test: filling the tables is what takes its time."""
    plans = await explained(running_postgres.url)
    assert len(plans) == 2 * len(PLANS)
    found = {key: list(faults(key[0], plan)) for key, plan in plans.items()}
    assert {key: wrong for key, wrong in found.items() if wrong} == {}


def test_every_query_on_large_tables_is_here() -> None:
    without = {
        "depth",
        "ledger_figures",
        "add_to_ledger",
        "update_full_logs",
        "get_template",
        "list_templates",
        "lock_templates",
        "create_template",
        "replace_template",
        "delete_template",
        # Tables of tenants have as many rows as there are tenants, or ten thousand a day.
        "limits_version",
        "read_limits",
        "change_limits",
        "put_limits",
        "add_counts",
        "forget_counts",
        "tenant_figures",
    }
    assert set(QUERIES) - set(PLANS) == without
