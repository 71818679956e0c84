"""What the calls to PostgreSQL share: the queries, how much goes into one transaction, and the
calls that wait for it."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, TypeAlias

import msgspec

from notifyd.postgres import load_migrations, load_queries

_SQL = files("notifyd.queue").joinpath("sql")
MIGRATIONS = load_migrations(_SQL.joinpath("migrations"))
QUERIES = load_queries(_SQL.joinpath("queries.sql"))

ROWS_PER_BATCH = 2000
BYTES_PER_BATCH = 4 * 1024 * 1024
"""A transaction stores about so much at most; a send to more users is stored in several."""

CALL_BYTES = 1024
ROW_BYTES = 128
"""What a call that waits takes of memory, and each user or id that it names, about."""

ROWS_PER_SWEEP = 1000

_SHARDS = 16

UserKey: TypeAlias = tuple[str, str]


def new_future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def resolve(future: asyncio.Future[Any], answer: object) -> None:
    if not future.done():
        future.set_result(answer)


def columns(rows: Iterable[Sequence[Any]], count: int) -> Sequence[Sequence[Any]]:
    """Rows of `count` values as the arrays that `unnest` takes."""
    return [*zip(*rows, strict=True)] or [()] * count


class Shards:
    """Rows of totals to write to, in turn, from a random one on: writers rarely meet."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = random.randrange(_SHARDS)  # noqa: S311  # spreads load, keeps no secret

    def next(self) -> int:
        self._next = (self._next + 1) % _SHARDS
        return self._next


class Call(msgspec.Struct, eq=False, kw_only=True):
    """One call, until the batch that it takes part in answers it."""

    future: asyncio.Future[Any] = msgspec.field(default_factory=new_future)
    deadline: float = 0.0

    @property
    def weight(self) -> int:
        """See `Answerable`."""
        return CALL_BYTES


def take_some(most: int) -> Callable[[deque[Any]], Sequence[Any]]:
    def take(waiting: deque[Any]) -> Sequence[Any]:
        return [waiting.popleft() for _ in range(min(most, len(waiting)))]

    return take
