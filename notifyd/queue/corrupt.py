"""What a store gave and nobody can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from notifyd.log import RateLimitedLog


class CorruptLog:
    """Counts what cannot be read, and logs it, once a minute for each reason."""

    def __init__(self, on_corrupt: Callable[[str], None]) -> None:
        self._on_corrupt = on_corrupt
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))

    def tell(self, what: str, reason: str, error: object, **fields: Any) -> None:
        """`reason` is one of the metric's; `error` says more, and nothing of what was stored."""
        self._on_corrupt(reason)
        self._log.warning(what, reason=reason, error=str(error), **fields)
