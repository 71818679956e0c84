"""What notifyd.server touches of uvicorn's inside is there; a version nobody tried is told of."""

from __future__ import annotations

import asyncio
import inspect

import httptools
import pytest
import uvicorn
from starlette.applications import Starlette
from structlog.testing import capture_logs
from uvicorn.config import Config
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import Server, ServerState

from notifyd.app import Notifyd, sockets_of
from notifyd.server.http import (
    OF_ONE_SOCKET,
    TESTED_UVICORN,
    UVICORN_ATTRIBUTES,
    Beginning,
    FastCycle,
)
from notifyd.server.serve import listen, make_server
from tests.adversity.raw import connected, frame, handshake, request
from tests.front_door import ADMIN_KEY, settings_of, token


class _Transport(asyncio.Transport):
    """As much of a transport as an HTTP protocol asks for when it gets one."""

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default


def _objects() -> dict[str, object]:
    config = Config(Starlette(), http="httptools", ws="none", log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.new_event_loop()
    try:
        protocol = httptools_impl.HttpToolsProtocol(config, state, {}, loop)
    finally:
        loop.close()
    protocol.connection_made(_Transport())
    cycle = httptools_impl.RequestResponseCycle(
        scope={},  # type: ignore[typeddict-item]  # made to be looked at only
        transport=_Transport(),
        flow=protocol.flow,
        logger=protocol.logger,
        access_logger=protocol.access_logger,
        access_log=False,
        default_headers=[],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=True,
        on_response=lambda: None,
    )
    protocol.url, protocol.headers = b"", []
    return {
        "HttpToolsProtocol": protocol,
        "RequestResponseCycle": cycle,
        "Config": config,
        "FlowControl": FlowControl(_Transport()),
        "ServerState": state,
        "Server": Server(config),
    }


@pytest.fixture(scope="module")
def objects() -> dict[str, object]:
    """One of each of uvicorn's classes that are touched."""
    return _objects()


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [(owner, name) for owner, names in UVICORN_ATTRIBUTES.items() for name in names],
)
def test_what_is_touched_is_there(objects: dict[str, object], owner: str, attribute: str) -> None:
    assert hasattr(objects[owner], attribute), f"uvicorn {uvicorn.__version__} has it no more"


@pytest.mark.parametrize(
    "name",
    ["on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body",
     "on_message_complete", "on_response_complete", "data_received", "connection_made",
     "connection_lost", "shutdown"],
)  # fmt: skip
def test_what_is_overridden_is_there(name: str) -> None:
    ours = inspect.signature(getattr(httptools_impl.HttpToolsProtocol, name))
    from notifyd.server.http import HttpProtocol

    assert len(inspect.signature(getattr(HttpProtocol, name)).parameters) == len(ours.parameters)


def test_the_stand_in_for_a_cycle_has_what_uvicorn_reads_of_one() -> None:
    cycle = FastCycle(response_complete=True)
    for name in UVICORN_ATTRIBUTES["RequestResponseCycle"]:
        assert hasattr(cycle, name)
    # … which `HttpToolsProtocol` does in these places, and no others:
    source = inspect.getsource(httptools_impl.HttpToolsProtocol)
    read = {part.split("(")[0].split(".")[0].split()[0].strip("):,")
            for part in source.split("self.cycle.")[1:]}  # fmt: skip
    written_for_asgi_only = {"body"}
    assert read - written_for_asgi_only <= set(UVICORN_ATTRIBUTES["RequestResponseCycle"])


def test_sockets_share_all_that_uvicorn_has_before_one_comes() -> None:
    config = Config(Starlette(), http="httptools", ws="none", log_config=None)
    config.load()
    state, app_state = ServerState(), dict[str, object]()
    loop = asyncio.new_event_loop()
    try:
        one, other = (
            vars(httptools_impl.HttpToolsProtocol(config, state, app_state, loop)) for _ in range(2)
        )
        shared = Beginning(config, state, app_state, loop).shared
    finally:
        loop.close()
    own = {name for name in one if one[name] is not other[name]}
    assert own == set(OF_ONE_SOCKET)
    assert shared == {name: value for name, value in one.items() if name not in own}


def test_the_installed_uvicorn_is_the_tested_one() -> None:
    assert uvicorn.__version__.startswith(f"{TESTED_UVICORN}.")
    assert hasattr(httptools.HttpRequestParser, "set_dangerous_leniencies")


async def test_an_untested_version_serves_through_asgi_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uvicorn, "__version__", "0.99.0")
    settings = settings_of()
    notifyd = Notifyd(settings)
    started = asyncio.Event()
    with capture_logs() as logs:
        server = make_server(sockets_of(notifyd), settings.server, announce=started.set)
    (said,) = [entry for entry in logs if entry.get("uvicorn") == "0.99.0"]
    assert said["log_level"] == "warning"
    assert server.config.http == "httptools"

    listener = listen("127.0.0.1", 0, 60)
    port = listener.getsockname()[1]
    task = asyncio.create_task(server._serve(sockets=[listener]))
    await asyncio.wait_for(started.wait(), 10)
    try:
        async with connected(port) as client:
            body = b'{"target_user_id":"u1","event_type":"e","payload":{}}'
            path = "/api/v1/notifications/send"
            await client.send(request("POST", path, f"X-API-Key: {ADMIN_KEY}", body=body))
            assert (await client.response()).status == 200
        async with connected(port) as client:
            await client.send(handshake(f"/ws?token={token()}"))
            assert (await client.response()).status == 101
            await client.message("connected")
            await client.send(frame(8, b"\x03\xe8"))
            assert await client.close_code() == 1000
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 20)
