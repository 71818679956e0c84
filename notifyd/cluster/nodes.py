"""The nodes of a cluster: who there is, by leases in Redis that each node renews.

A node is known by its name and a part that is new with each start, so that what an earlier process
of the same name left behind is nobody's: its lease lapses.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeVar

import msgspec
import structlog

from notifyd.queue.redis_keys import ClusterKeys
from notifyd.redis_client import Redis, Script
from notifyd.version import __version__

T = TypeVar("T")

BEATS_PER_LEASE = 3
"""Renewals in the time of a lease: one may be lost, and one be late."""


def script(name: str) -> Script:
    """One of our Lua scripts."""
    return Script.read(files("notifyd.cluster") / "lua" / f"{name}.lua")


def default_name() -> str:
    """A name for a node that was given none: the machine's, and the process's number."""
    return f"{machine_name()}-{os.getpid()}"


def machine_name() -> str:
    """The machine's name, as far as it can be part of a node's."""
    host = socket.gethostname() or "node"
    return re.sub(r"[^A-Za-z0-9_.-]", "-", host)[:48]


class Said(msgspec.Struct, frozen=True):
    """What a node says of itself; `messages` is the version of its messages, `started_at` in Unix
    seconds."""

    name: str
    version: str
    messages: int
    started_at: float


class Node(msgspec.Struct, frozen=True):
    """Another node, or this one; `until` is when its lease ends, by this machine's monotonic
    clock."""

    id: str
    said: Said
    until: float


_encode_said = msgspec.json.Encoder().encode
_decode_said = msgspec.json.Decoder(Said).decode


class Nodes:
    """This node's lease, and the nodes as of the last renewal.

    `clock` is monotonic, in seconds. `messages` is the version of the messages that are spoken.
    """

    def __init__(
        self,
        redis: Redis,
        keys: ClusterKeys,
        *,
        name: str | None,
        lease_seconds: float,
        messages: int,
        started_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name or default_name()
        self.id = f"{self.name}~{secrets.token_hex(4)}"
        self.lease_seconds = lease_seconds
        self._redis = redis
        self._keys = keys
        self._said = Said(self.name, __version__, messages, started_at)
        self._clock = clock
        self._beat = script("beat")
        self._log = structlog.get_logger("notifyd.cluster")
        self._known: dict[str, Node] = {}

    @property
    def beat_seconds(self) -> float:
        """How often the lease is renewed."""
        return self.lease_seconds / BEATS_PER_LEASE

    def alive(self) -> list[Node]:
        """The nodes whose leases hold, this one first, the others by name."""
        now = self._clock()
        others = [each for each in self._known.values() if each.until > now and each.id != self.id]
        others.sort(key=lambda node: (node.said.name, node.id))
        return [Node(self.id, self._said, math.inf), *others]

    def has_others(self) -> bool:
        """Whether another node's lease holds."""
        now = self._clock()
        return any(each.until > now and each.id != self.id for each in self._known.values())

    def is_alive(self, id: str) -> bool:
        """Whether another node's lease holds."""
        node = self._known.get(id)
        return node is not None and node.until > self._clock()

    def beat(self) -> asyncio.Future[bool]:
        """Renew the lease and look who else there is. Raises Unavailable, at once or later.

        False where Redis has no revocations, or may have lost some.
        """
        lease = int(self.lease_seconds * 1000)
        return self._call(lease, self._learn)

    def forget(self, id: str) -> None:
        """A node says that it ends."""
        if self._known.pop(id, None) is not None:
            self._log.info("a node has ended", node=id)

    def leave(self) -> asyncio.Future[None]:
        """Give the lease up. Raises Unavailable, at once or later."""
        return self._call(0, lambda answer: None)

    def _call(self, lease: int, convert: Callable[[list[Any]], T]) -> asyncio.Future[T]:
        keys = (self._keys.nodes, self._keys.said, self._keys.revoked)
        return self._redis.run(
            self._beat, keys, (self.id, lease, _encode_said(self._said)), convert
        )

    def _learn(self, answer: list[Any]) -> bool:
        now = self._clock()
        known: dict[str, Node] = {}
        for place in range(1, len(answer), 3):
            id, left, told = answer[place].decode(), int(answer[place + 1]), answer[place + 2]
            try:
                said = _decode_said(told)
            except msgspec.MsgspecError:
                # A node of a version to come, which says something else of itself.
                said = Said(id.partition("~")[0], "unknown", 0, 0.0)
            known[id] = Node(id, said, now + left / 1000)
        for id in known.keys() - self._known.keys() - {self.id}:
            self._log.info("a node is here", node=id)
        for id in self._known.keys() - known.keys():
            self._log.warning("a node is gone", node=id)
        self._known = known
        return bool(answer[0])
