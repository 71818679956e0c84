from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.backends import BACKENDS, Backend, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=sorted(BACKENDS))
async def backend(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Backend]:
    """Every suite here runs against every backend."""
    async with BACKENDS[request.param](clock, request.getfixturevalue) as backend:
        yield backend
