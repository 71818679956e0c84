"""The command line as its users run it: processes, their output, their exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
from websockets.asyncio.client import connect

from tests.front_door import ADMIN_KEY, ORIGIN, SECRET, Message

WAIT = 20.0
"""Seconds for a process to start and answer on a busy machine."""

Process = asyncio.subprocess.Process


async def start_process(directory: Path, *arguments: str, **environ: str) -> Process:
    """`notifyd` with these arguments, and with no variables of ours but these."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("NOTIFYD_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "notifyd",
        *arguments,
        cwd=directory,
        env={**clean, **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def running_process(
    directory: Path, *arguments: str, **environ: str
) -> AsyncIterator[Process]:
    """A process that is ended with the block, if it has not ended by itself."""
    process = await start_process(directory, *arguments, **environ)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(directory: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that ends."""
    async with running_process(directory, *arguments, **environ) as process, asyncio.timeout(WAIT):
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


async def line_with(
    stream: asyncio.StreamReader | None, found: Callable[[str], object], seen: list[str]
) -> str:
    """The next line for which `found` says yes; those before it are gathered in `seen`."""
    assert stream is not None
    async with asyncio.timeout(WAIT):
        while line := (await stream.readline()).decode():
            seen.append(line)
            if found(line):
                return line
    raise AssertionError("".join(seen))


async def test_a_newcomers_first_minutes(tmp_path: Path) -> None:
    """serve, listen, send and token, in development, without a single setting."""
    async with AsyncExitStack() as stack:
        seen: list[str] = []
        server = await stack.enter_async_context(running_process(tmp_path, "serve", "--port", "0"))
        line = await line_with(server.stdout, lambda line: "/demo" in line, seen)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None
        url = found[0]
        assert (tmp_path / ".notifyd" / "api_key").stat().st_mode & 0o077 == 0

        listening = await stack.enter_async_context(
            running_process(
                tmp_path, "listen", "--user", "ada", "--channel", "orders", "--url", url
            )
        )
        told: list[str] = []
        await line_with(listening.stderr, lambda line: "subscribed to orders" in line, told)

        to_user = await run(
            tmp_path, "send", "--user", "ada", "--url", url, "order.created", '{"order_id": 42}'
        )
        assert (to_user[0], json.loads(to_user[1])["outcome"]) == (0, "delivered"), to_user
        arrived = await line_with(listening.stdout, bool, [])
        message: Message = json.loads(arrived)
        assert (message["event_type"], message["payload"]) == ("order.created", {"order_id": 42})
        to_channel = await run(tmp_path, "send", "--channel", "orders", "--url", url, "x", "[1]")
        assert json.loads(to_channel[1])["delivered_to"] == 1
        assert json.loads(await line_with(listening.stdout, bool, []))["payload"] == [1]

        code, token, _ = await run(tmp_path, "token", "--user", "bob", "--role", "admin")
        assert code == 0
        async with connect(f"ws{url.removeprefix('http')}/ws?token={token.strip()}") as websocket:
            assert json.loads(await websocket.recv())["user_id"] == "bob"

            server.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WAIT):
                while json.loads(await websocket.recv())["type"] != "shutdown":
                    pass
                await websocket.wait_closed()
            assert websocket.close_code == 1001
        async with asyncio.timeout(WAIT):
            out, err = await server.communicate()
        assert server.returncode == 0
        # Standing in a URL, the token still reaches no log.
        assert token.strip() not in "".join(seen) + out.decode() + err.decode()


async def test_the_commands_that_development_prints_are_there_to_be_run(tmp_path: Path) -> None:
    """By a shell that finds nothing in its PATH, as where no environment is activated."""
    import_it = str(Path(__file__).parents[2])
    environ = {"PATH": str(tmp_path), "PYTHONPATH": import_it}
    async with running_process(tmp_path, "serve", "--port", "0", **environ) as server:
        printed = await line_with(server.stdout, lambda line: "Listen " in line, [])
        command = printed.removeprefix("  Listen   ").strip()
        assert "__main__.py" not in command
        listening = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            f"exec {command}",
            cwd=tmp_path,
            env={**os.environ, **environ},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await line_with(listening.stderr, lambda line: "connected as alice" in line, [])
        finally:
            listening.kill()
            await listening.communicate()


async def test_listening_with_a_token_that_does_not_hold_says_so_once(tmp_path: Path) -> None:
    other = {"NOTIFYD_AUTH__JWT_SECRET": "another secret of more than thirty-two bytes"}
    async with running_process(tmp_path, "serve", "--port", "0") as server:
        line = await line_with(server.stdout, lambda line: "/demo" in line, [])
        url = line.split()[-1].removesuffix("/demo")
        code, _, err = await run(tmp_path, "listen", "--user", "ada", "--url", url, **other)
    assert code == 1
    assert "disconnected (401 UNAUTHORIZED: " in err


async def test_serving_in_production(tmp_path: Path) -> None:
    """Settings by file and environment; the log is JSON; SIGINT stops as SIGTERM does."""
    (tmp_path / "notifyd.toml").write_text(
        '[server]\nmode = "production"\nport = 0\n[cors]\norigins = ["'
        + ORIGIN
        + '"]\n[channels.rules."*"]\nsubscribe = "any"\n[log]\nformat = "json"\n'
    )
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    environ = {
        "NOTIFYD_CONFIG": "notifyd.toml",
        "NOTIFYD_AUTH__JWT_SECRET_FILE": "secret",
        "NOTIFYD_AUTH__API_KEY": ADMIN_KEY,
        "NOTIFYD_PORT": "tcp://192.0.2.1:80",
    }
    code, out, err = await run(tmp_path, "check-config", **environ)
    assert (code, err) == (0, "")
    assert "production" in out
    without_key = {name: text for name, text in environ.items() if "API_KEY" not in name}
    code, out, err = await run(tmp_path, "serve", **without_key)
    assert (code, out) == (2, "")
    assert "auth.api_key" in err
    async with running_process(tmp_path, "serve", **environ) as server:
        line = await line_with(server.stderr, lambda line: "http://" in line, [])
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None
        json.loads(line)
        async with httpx.AsyncClient(base_url=found[0], trust_env=False) as http:
            assert (await http.get("/health/ready")).status_code == 200
            assert set((await http.get("/health")).json()) == {
                "status",
                "version",
                "uptime_seconds",
            }
        server.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT):
            await server.communicate()
        assert server.returncode == 0


async def test_a_port_that_is_taken_fails(tmp_path: Path) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    async with taken:
        code, _, err = await run(tmp_path, "serve", "--port", str(port))
    assert code == 1
    assert "cannot listen" in err
