"""`notifyd serve` without holding: what is delivered to a user is forgotten at once.

Only to measure what holding costs. `python -m bench.unheld serve --config …`.

Each connection is asked once, as it takes its first notification, and never again. From its first
Pong on, a client's kernel acknowledges every second segment instead of each one (on Linux: the
delayed acknowledgements of a socket that answers), after which a send() costs the server 1.5 µs
more on loopback. Every server that sends heartbeats has clients like that; a reference without a
single Pong in the time it is measured would be measured on another kernel path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import notifyd.app
from notifyd.cli import main
from notifyd.connections.connection import Connection
from notifyd.dispatch.confirmation import Confirmations
from notifyd.notification import Notification
from notifyd.wire import ping_frame

ONCE = ping_frame(b"once")


class Forgetful(Confirmations):
    """Holds nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._were_asked: set[str] = set()

    def hold(
        self,
        notification: Notification,
        connections: tuple[Connection, ...],
        *,
        shared: bool = False,
    ) -> None:
        """Forget it."""
        self.hold_each(notification, connections)

    def hold_alone(
        self,
        notification: Notification,
        connections: tuple[Connection, ...],
        now: float,
        *,
        shared: bool = False,
    ) -> None:
        """Forget it."""
        self.hold_each(notification, connections)

    def hold_each(self, notification: Notification, connections: Sequence[Connection]) -> None:
        """Forget it."""
        if len(self._were_asked) < len(self._registry):
            for connection in connections:
                if connection.id not in self._were_asked:
                    self._were_asked.add(connection.id)
                    connection.outbox.put(ONCE)


if __name__ == "__main__":
    notifyd.app.Confirmations = Forgetful  # type: ignore[attr-defined]  # the point of it
    sys.exit(main())
