"""`notifyd serve` without holding: what is delivered to a user is forgotten at once.

Only to measure what holding costs. `python -m bench.unheld serve --config …`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from notifyd.cli import main
from notifyd.connections.connection import Connection
from notifyd.dispatch.confirmation import Confirmations
from notifyd.notification import Notification


def forget(
    confirmations: Confirmations, notification: Notification, connections: Sequence[Connection]
) -> None:
    """In the place of `Confirmations.hold` and `hold_each`."""


if __name__ == "__main__":
    Confirmations.hold = forget  # type: ignore[method-assign, assignment]  # the point of it
    Confirmations.hold_each = forget  # type: ignore[method-assign, assignment]  # and this too
    sys.exit(main())
