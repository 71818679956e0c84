"""Nodes in processes of their own: `notifyd serve`, killed and started again as a test likes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Any

import httpx
import psutil
from websockets.asyncio.client import connect

from tests.front_door import (
    ADMIN_KEY,
    SECRET,
    WAIT,
    WITHOUT_TLS,
    Message,
    SseListener,
    WebSocketListener,
    token,
)
from tests.stores import environment_of_a_server, free_port

START_SECONDS = 30.0


class NodeProcess:
    """A node, or a row of workers, as `notifyd serve` runs it."""

    def __init__(self, name: str, redis_url: str, prefix: str, log: Path, **variables: str) -> None:
        self.name = name
        self.port = free_port()
        self.log = log
        self._process: Process | None = None
        self._environment = environment_of_a_server() | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "NOTIFYD_SERVER__PORT": str(self.port),
            "NOTIFYD_SERVER__SHUTDOWN_GRACE_SECONDS": "5",
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_AUTH__API_KEY": ADMIN_KEY,
            "NOTIFYD_REDIS__URL": redis_url,
            "NOTIFYD_REDIS__KEY_PREFIX": prefix,
            "NOTIFYD_REDIS__COMMAND_TIMEOUT_SECONDS": "1",
            "NOTIFYD_QUEUE__BACKEND": "redis",
            "NOTIFYD_ACK__BACKEND": "redis",
            "NOTIFYD_CLUSTER__ENABLED": "true",
            "NOTIFYD_CLUSTER__NODE_ID": name,
            "NOTIFYD_CLUSTER__PRESENCE_TTL_SECONDS": "3",
            "NOTIFYD_WEBSOCKET__HEARTBEAT_INTERVAL": "1",
            **variables,
        }
        self._http = httpx.AsyncClient(timeout=WAIT, trust_env=False, verify=WITHOUT_TLS)

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        assert self._process is not None
        return self._process.pid

    async def start(self, *arguments: str) -> None:
        """Run it until it is ready."""
        await self.spawn(*arguments)
        async with asyncio.timeout(START_SECONDS):
            while not await self._is_ready():
                assert self._process is not None
                assert self._process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)

    async def spawn(self, *arguments: str) -> None:
        """Run it."""
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "notifyd", "serve", *arguments),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=output,
                cwd=self.log.parent,
                env=self._environment,
            )

    async def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await self._http.get(f"{self.url}/health/ready")).status_code == 200
        return False

    def workers(self) -> list[psutil.Process]:
        """The processes that serve for it."""
        workers = []
        for child in psutil.Process(self.pid).children():
            # One that was killed may not have been waited for yet.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(child.cmdline()):
                    workers.append(child)
        return workers

    def twin(self, **variables: str) -> NodeProcess:
        """Another with the same settings but for these, on the same port."""
        twin = NodeProcess.__new__(NodeProcess)
        twin.__dict__.update(self.__dict__)
        twin._environment = self._environment | variables
        twin.log = self.log.with_suffix(".twin.log")
        twin._process = None
        twin._http = httpx.AsyncClient(timeout=WAIT, trust_env=False, verify=WITHOUT_TLS)
        return twin

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait until it has ended; its exit code."""
        assert self._process is not None
        async with asyncio.timeout(START_SECONDS):
            return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def stop(self) -> int:
        """End it in good order; its exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def close(self) -> None:
        """End it, if it runs."""
        if self._process is not None and self._process.returncode is None:
            await self.kill()
        await self._http.aclose()

    @property
    def url(self) -> str:
        """Where HTTP is answered."""
        return f"http://127.0.0.1:{self.port}"

    async def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """A request of its own connection, so that workers take turns."""
        headers = {"X-API-Key": ADMIN_KEY, "Connection": "close"}
        return await self._http.request(method, f"{self.url}{path}", json=body, headers=headers)

    async def publish(self, target: dict[str, Any], payload: Any = None, **more: Any) -> Message:
        """Send one notification; the answer, which must be 200."""
        body = {"target": target, "event_type": "test.event", "payload": payload, **more}
        answer = await self.call("POST", "/api/v1/notifications", body)
        assert answer.status_code == 200, answer.text
        message: Message = answer.json()
        return message

    async def websocket(self, user_id: str, query: str = "", **claims: Any) -> WebSocketListener:
        """Connect a user, with these claims in his token."""
        connection = await connect(
            f"ws://127.0.0.1:{self.port}/ws{query}",
            additional_headers={"Authorization": f"Bearer {token(user_id, **claims)}"},
            ping_interval=None,
            compression=None,
            proxy=None,
            open_timeout=WAIT,
            close_timeout=WAIT,
        )
        listener = WebSocketListener(connection)
        listener.connected = await listener.expect("connected")
        return listener

    async def sse(self, user_id: str, query: str = "") -> SseListener:
        """Open a stream of a user."""
        stack = contextlib.AsyncExitStack()
        headers = {"Authorization": f"Bearer {token(user_id)}"}
        response = await stack.enter_async_context(
            self._http.stream("GET", f"{self.url}/sse{query}", headers=headers)
        )
        assert response.status_code == 200, await response.aread()
        listener = SseListener(response, stack)
        listener.connected = await listener.expect("connected")
        return listener
