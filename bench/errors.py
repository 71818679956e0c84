"""What stops a scenario."""

from __future__ import annotations


class BenchError(Exception):
    """A scenario cannot be measured; the message says why."""
