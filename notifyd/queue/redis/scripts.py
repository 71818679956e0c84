"""Loading the scripts, and the times that they are given."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from notifyd.redis_client import Script, Word

Clock = Callable[[], float]


def load_script(name: str, *before: str) -> Script:
    folder = files("notifyd.queue") / "lua"
    sources = [(folder / f"{each}.lua").read_bytes() for each in (*before, name)]
    return Script(name, b"\n".join(sources))


def milliseconds(clock: Clock | None) -> Word:
    """The time to give to a script: none, it asks Redis."""
    return "" if clock is None else int(clock() * 1000)


def microseconds(clock: Clock | None) -> Word:
    return "" if clock is None else int(clock() * 1_000_000)
