"""The machine under the bench: its cores, and the versions that the figures belong to."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "notifyd-server",
    "uvicorn",
    "starlette",
    "uvloop",
    "httptools",
    "websockets",
    "msgspec",
)


@dataclass(frozen=True, slots=True)
class Cores:
    """The core that the server runs on and the one that the load runs on; one core serves both."""

    server: int
    load: int


def choose_cores() -> Cores:
    """The first two cores that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(server=allowed[0], load=allowed[1] if len(allowed) > 1 else allowed[0])


def on_core(core: int) -> Callable[[], None]:
    """What a child does before it executes: takes its core, and all the open files it may have."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    return prepare


def other_work() -> str | None:
    """A warning where the machine is busy with something else: then even ratios are noise."""
    load = os.getloadavg()[0]
    if load < 0.3:
        return None
    return f"the machine was busy with other work when this began (load average {load:.1f})"


def versions() -> dict[str, str]:
    """Name to version, for the report. Packages that are not installed are left out."""
    found = {"Python": platform.python_version(), "Linux": platform.release().split("-")[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
