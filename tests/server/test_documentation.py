"""What the pages tell a newcomer to do, done: README's first screen, and the Python snippets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp
from websockets.asyncio.client import connect

from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, SECRET, channel, token, until
from tests.stores import RedisServer

ROOT = Path(__file__).parents[2]
WAIT = 20.0


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in the order of the page."""
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- README ---------------------------------------------------------------------------------------


class Terminal:
    """A directory and an environment to type commands in."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("NOTIFYD_")},
            "NO_PROXY": "127.0.0.1",
        }
        self._port = "0"

    async def serve(self) -> Process:
        """`make run`, on a free port; returns once it says where the page is."""
        server = await self.start(".venv/bin/notifyd serve --port 0")
        page = await line_with(server, "/demo")
        found = re.search(r":(\d+)/demo", page)
        assert found is not None
        self._port = self._environment["NOTIFYD_SERVER__PORT"] = found[1]
        return server

    async def start(self, command: str) -> Process:
        """Type a command as README has it."""
        command = command.replace(".venv/bin/notifyd", f"{sys.executable} -m notifyd")
        return await asyncio.create_subprocess_exec(
            *("bash", "-c", f"exec {command.replace(':8081', f':{self._port}')}"),
            cwd=self._directory,
            env=self._environment,
            stdout=PIPE,
            stderr=PIPE,
        )

    async def answer(self, command: str) -> Any:
        """Type a command, and wait for the JSON that it prints."""
        async with asyncio.timeout(WAIT):
            process = await self.start(command)
            told, complaint = await process.communicate()
        assert process.returncode == 0, complaint
        return json.loads(told)


async def line_with(process: Process, text: str) -> str:
    """The next line of a process's output that has this text."""
    assert process.stdout is not None
    async with asyncio.timeout(WAIT):
        while line := await process.stdout.readline():
            if text in line.decode():
                return line.decode()
    assert process.stderr is not None
    pytest.fail(f"{text} did not come: {await process.stderr.read()!r}")


@asynccontextmanager
async def ended(*processes: Process) -> AsyncIterator[None]:
    """End these processes with the block."""
    try:
        yield
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


async def test_readme_by_copy_and_paste(tmp_path: Path) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("README's commands need bash and curl")
    run, publish, listen, send = blocks("README.md", "sh")
    assert run == "make run\n"
    assert "\nrun: " in (ROOT / "Makefile").read_text("utf-8")
    terminal = Terminal(tmp_path)
    async with ended(await terminal.serve()):
        assert (await terminal.answer(publish))["outcome"] == "queued"

        carol = await terminal.start(listen)
        async with ended(carol):
            await line_with(carol, "event: subscribed")
            assert (await terminal.answer(send))["outcome"] == "delivered"
            await line_with(carol, "event: notification")
            assert '"payload":{"order_id":43}' in await line_with(carol, "data: ")


# --- Python ---------------------------------------------------------------------------------------


def run_snippet(source: str, **names: Any) -> dict[str, Any]:
    """Run a snippet as a module of its own; its names."""
    namespace: dict[str, Any] = {"__name__": "snippet", **names}
    exec(compile(source, "snippet", "exec"), namespace)  # noqa: S102  # our own page
    return namespace


@pytest.fixture
def lines() -> list[str]:
    """What the snippets print."""
    return []


async def test_snippets_of_the_python_client(start_on: StartServer, lines: list[str]) -> None:
    host = await start_on()

    def told(*words: object) -> None:
        lines.append(" ".join(map(str, words)))

    async def run(snippet: str) -> dict[str, Any]:
        source = snippet.replace("http://127.0.0.1:8081", host.url)
        source = source.replace("dev_0123456789abcdef", ADMIN_KEY)
        return await asyncio.to_thread(run_snippet, source, print=told)

    publishing, listening, others = blocks("docs/python-client.md", "python")
    await run(publishing)
    assert lines == ["queued 0", "2", "422 VALIDATION_ERROR priority"]

    lines.clear()
    follow = (await run(listening))["follow"]
    following = asyncio.create_task(follow(host.url, token("carol")))
    await until(lambda: host.notifyd.lifecycle.registry.channels == 1, "the subscription")
    await host.publish(channel("orders"), "order.created")
    await until(lambda: bool(lines), "the notification")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert lines[0] == "order.created None"

    lines.clear()
    await run(others)
    assert lines[:2] == ["{}", "[]"]
    assert len(lines) == 3


async def test_commands_and_snippets_of_redis(
    start_on: StartServer, redis_server: RedisServer
) -> None:
    host = await start_on(
        redis={"url": redis_server.url, "trigger_enabled": True, "stream_key": "notifications"}
    )
    await until(lambda: host.notifyd.metrics.redis_trigger_active.value == 1, "the subscription")
    alice = await host.websocket("42")
    await alice.subscribe("orders")
    publishing, adding, looking = blocks("docs/redis.md", "sh")

    def command(line: str) -> Any:
        program, *words = shlex.split(line)
        assert program == "redis-cli"
        return redis_server.command(*words)

    for line in (publishing + adding).splitlines():
        command(line)
    told = await alice.notifications(4)
    assert [each["event_type"] for each in told[1:3]] == ["order.shipped", "maintenance"]
    (message,) = blocks("docs/redis.md", "json")
    redis_server.command("PUBLISH", "notification:broadcast", message)
    assert (await alice.expect("notification"))["metadata"]["correlation_id"] == "c-17"
    for snippet in blocks("docs/redis.md", "python"):
        source = snippet.replace("redis.Redis()", f"redis.Redis(port={redis_server.port})")
        await asyncio.to_thread(run_snippet, source)
        assert (await alice.expect("notification"))["payload"] == {"order": "A-1"}
    dead, pending = map(command, looking.splitlines())
    assert (dead, pending["pending"]) == ([], 0)


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """An application on stock uvicorn, as its reader would serve it; where it answers."""
    config = uvicorn.Config(app, log_config=None, lifespan="on")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup([listener])
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await server.shutdown([listener])


async def test_snippet_of_embedding() -> None:
    source = blocks("docs/embedding.md", "python")[0]
    assert SECRET in source
    async with (
        served(run_snippet(source)["app"]) as address,
        connect(f"ws://{address}/realtime/ws?token={token('alice')}", proxy=None) as websocket,
        httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as http,
    ):
        assert json.loads(await websocket.recv())["type"] == "connected"
        assert (await http.post("/orders/42")).json() == {"outcome": "delivered"}
        assert json.loads(await websocket.recv())["payload"] == {"order_id": 42}


async def test_snippet_of_own_sessions() -> None:
    source = blocks("docs/embedding.md", "python")[1]
    cookie = {"Cookie": "session=abc"}
    async with (
        served(run_snippet(source)["notifications"].app) as address,
        connect(f"ws://{address}/ws", additional_headers=cookie, proxy=None) as websocket,
        httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as http,
    ):
        assert json.loads(await websocket.recv())["user_id"] == "alice"
        assert (await http.get("/sse")).status_code == 401
