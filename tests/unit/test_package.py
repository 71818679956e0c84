from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import notifyd
from notifyd import client

ROOT = Path(__file__).parents[2]


def test_the_client_loads_nothing_of_the_server() -> None:
    script = (
        "import sys; from notifyd import AsyncClient, Client; "
        "print(*sorted(name for name in sys.modules if name.startswith(('notifyd', 'starlette', "
        "'uvicorn', 'jwt', 'structlog', 'prometheus_client'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = done.stdout.split()
    assert "notifyd.client" in loaded
    others = [name for name in loaded if not name.startswith("notifyd.client")]
    assert others == ["notifyd", "notifyd.version"]


def test_what_the_package_offers() -> None:
    assert notifyd.Client is client.Client
    assert notifyd.AsyncClient is client.AsyncClient
    assert {"Client", "AsyncClient", "Notifyd", "__version__"} <= set(dir(notifyd))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        notifyd.Nonsense  # noqa: B018 -- the access is what is tested
