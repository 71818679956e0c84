"""What is measured: notifyd, stock uvicorn with a bare app or the embedded server, and nchan.

A subject knows how to start itself and how its subscribers and publishers talk to it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jwt

from bench.load import MARK_LENGTH, Publishing, Subscribers, Transport
from bench.machine import Cores
from bench.servers import Server, free_port

ROOT = Path(__file__).parent.parent
CHANNEL = "bench"
# With this payload a notification is about 290 bytes on a WebSocket.
PAYLOAD = {"order_id": "A-10042", "status": "shipped", "mark": "{mark}"}
CONTENT = {"event_type": "order.created", "payload": PAYLOAD}
DEFAULT_COMMAND = (sys.executable, "-m", "notifyd", "serve", "--config", "{config}")


def child_environ(**more: str) -> dict[str, str]:
    """This process's environment without notifyd's variables, and with the checkout importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NOTIFYD_")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def _uvicorn(factory: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "uvicorn", "--factory", factory, "--port", str(port)),
        *("--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "info"),
    ]


class NotifydSubject:
    """The server under measurement, configured as in production, with everything on.

    Tokens are made once for each number of users, so that minting is in nobody's measurement.
    """

    def __init__(self, directory: Path, cores: Cores, command: Sequence[str]) -> None:
        self._directory = directory
        self._cores = cores
        self._command = command
        self._secret = secrets.token_urlsafe(48)
        self._key = secrets.token_urlsafe(32)
        self._tokens: dict[str, list[str]] = {}
        self._started = 0

    @property
    def key(self) -> str:
        """The API key of all publishers."""
        return self._key

    def server(self, settings: str = "", *, command: Sequence[str] | None = None) -> Server:
        """`notifyd serve`, or another `command`, fresh; `settings` are TOML tables to add."""
        port = free_port()
        config = str(self._write_config(port, settings))
        return Server(
            [part.replace("{config}", config) for part in command or self._command],
            port=port,
            core=self._cores.server,
            log=self._log(),
            environ=child_environ(),
            ready_path="/health/ready",
        )

    def embedded(self) -> Server:
        """The same settings through `Notifyd.app` on stock uvicorn."""
        port = free_port()
        return Server(
            _uvicorn("bench.embedded_app:build", port),
            port=port,
            core=self._cores.server,
            log=self._log(),
            environ=child_environ(NOTIFYD_CONFIG=str(self._write_config(port))),
            ready_path="/health/ready",
        )

    def subscribers(
        self,
        transport: Transport,
        count: int,
        *,
        stalled: int = 0,
        channel: bool = True,
        connect_rate: float = 0,
        name: str = "user",
    ) -> Subscribers:
        """As many users with a token each, called `name` and a number; with `channel`, each
        subscribed to the one channel."""
        tokens = self._mint(name, count)
        if transport == "sse":
            query = f"channels={CHANNEL}&" if channel else ""
            return Subscribers(
                "sse",
                [f"/sse?{query}token={token}" for token in tokens],
                ready="event: connected",
                stalled=stalled,
                connect_rate=connect_rate,
            )
        message = json.dumps({"type": "Subscribe", "payload": {"channels": [CHANNEL]}})
        return Subscribers(
            "ws",
            [f"/ws?token={token}" for token in tokens],
            subscribe=message if channel else None,
            ready='"subscribed"' if channel else '"connected"',
            stalled=stalled,
            connect_rate=connect_rate,
        )

    def probe_path(self) -> str:
        """The path of one more user."""
        return f"/ws?token={self.token('probe')}"

    def to_channel(
        self,
        *,
        publishers: int,
        window: int,
        rate: float = 0,
        channel: str = CHANNEL,
        padding: int = 0,
    ) -> Publishing:
        """Publishes to the channel; `padding` bytes more than usual."""
        body: dict[str, object] = {"channel": channel, **CONTENT}
        if padding:
            body["payload"] = {**PAYLOAD, "padding": "x" * padding}
        return self._publishing("channel", body, publishers, window=window, rate=rate)

    def broadcast(self, *, tenant: str | None = None) -> Publishing:
        """One broadcast after the other; where there are tenants, this one's."""
        publishing = self._publishing("broadcast", CONTENT, 1)
        if tenant is None:
            return publishing
        return replace(publishing, headers=[*publishing.headers, f"X-Tenant-ID: {tenant}"])

    def single_sends(self, *, publishers: int, rate: float = 0, name: str = "user") -> Publishing:
        """One notification a request, to each user in turn."""
        body = {"target_user_id": name + "-{to}", **CONTENT}
        return self._publishing("send", body, publishers, window=publishers, rate=rate, to_one=True)

    def batches(self, users: int, *, publishers: int) -> Publishing:
        """One notification to each of the users in a request."""
        items = [
            {"target": {"type": "user", "value": f"user-{i:05d}"}, **CONTENT} for i in range(users)
        ]
        body = {"notifications": items}
        return self._publishing("batch", body, publishers, window=publishers)

    def to_absent(self, users: int, *, publishers: int) -> Publishing:
        """One notification a request, to so many users in turn who are not connected."""
        body = {"target_user_id": "absent-{to}-00", **CONTENT}
        return self._publishing("send", body, publishers, window=publishers, spread=users)

    def batches_to_absent(self, batches: int, *, publishers: int) -> Publishing:
        """One notification to each of a hundred users in a request, another hundred in each of so
        many requests in turn; they are not connected."""
        items = [
            {"target": {"type": "user", "value": f"absent-{{to}}-{i:02d}"}, **CONTENT}
            for i in range(100)
        ]
        body = {"notifications": items}
        return self._publishing("batch", body, publishers, window=publishers, spread=batches)

    def to_users(self, users: int, *, name: str = "user") -> Publishing:
        """One notification to all of the users, one request at a time."""
        body = {"target_user_ids": [f"{name}-{i:05d}" for i in range(users)], **CONTENT}
        return self._publishing("send-to-users", body, 1)

    def _publishing(
        self,
        call: str,
        body: Mapping[str, object],
        publishers: int,
        *,
        window: int = 1,
        rate: float = 0,
        to_one: bool = False,
        spread: int = 1,
    ) -> Publishing:
        return Publishing(
            f"/api/v1/notifications/{call}",
            json.dumps(body, separators=(",", ":")),
            [f"X-API-Key: {self._key}"],
            publishers=publishers,
            window=window,
            rate=rate,
            to_one=to_one,
            spread=spread,
        )

    def token(self, user: str, **claimed: str) -> str:
        """A user's own."""
        now = int(time.time())
        claims = {"sub": user, "iat": now, "exp": now + 6 * 3600, **claimed}
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def _mint(self, name: str, count: int) -> list[str]:
        tokens = self._tokens.setdefault(name, [])
        for i in range(len(tokens), count):
            tokens.append(self.token(f"{name}-{i:05d}"))
        return tokens[:count]

    def _log(self) -> Path:
        self._started += 1
        return self._directory / f"notifyd-{self._started}.log"

    def _write_config(self, port: int, settings: str = "") -> Path:
        path = self._directory / f"notifyd-{port}.toml"
        path.write_text(
            f"""
[server]
port = {port}
mode = "production"
[auth]
jwt_secret = "{self._secret}"
[[auth.api_keys]]
name = "bench"
key = "{self._key}"
scopes = ["read", "publish"]
[channels.rules."*"]
subscribe = "any"
[cors]
origins = ["https://bench.example"]
{settings}
"""
        )
        return path


class StarletteSubject:
    """A bare Starlette app on stock uvicorn."""

    def __init__(self, directory: Path, cores: Cores) -> None:
        self._directory = directory
        self._cores = cores

    def server(self) -> Server:
        """Stock uvicorn with httptools and uvloop, fresh."""
        port = free_port()
        return Server(
            _uvicorn("bench.reference_app:build", port),
            port=port,
            core=self._cores.server,
            log=self._directory / f"starlette-{port}.log",
            environ=child_environ(),
        )

    def subscribers(self, count: int, *, connect_rate: float = 0) -> Subscribers:
        """WebSockets that are accepted, no more."""
        return Subscribers("ws", ["/ws"] * count, connect_rate=connect_rate)

    def publishing(self, *, publishers: int) -> Publishing:
        """The same body as a publish to a channel of notifyd."""
        body = json.dumps({"channel": CHANNEL, **CONTENT}, separators=(",", ":"))
        return Publishing("/publish", body, publishers=publishers, window=publishers)

    def fanout(self) -> Publishing:
        """To all that are connected, by `await websocket.send_text()` in a loop."""
        body = json.dumps({"channel": CHANNEL, **CONTENT}, separators=(",", ":"))
        return Publishing("/fanout", body)


@dataclass(frozen=True, slots=True)
class NchanSubject:
    """nginx with nchan, one worker."""

    directory: Path
    cores: Cores
    nginx: str
    module: str | None  # None where it is compiled in

    def server(self) -> Server:
        """nginx on a configuration and a directory of its own."""
        port = free_port()
        home = self.directory / f"nchan-{port}"
        home.mkdir()
        temporary = "".join(
            f"{kind}_temp_path {home}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = home / "nginx.conf"
        config.write_text(
            f"""
{f"load_module {self.module};" if self.module else ""}
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid {home}/nginx.pid;
error_log {home}/error.log warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 15000; }}
http {{
{temporary}
access_log off;
keepalive_requests 1000000000;
keepalive_timeout 1h;
nchan_message_buffer_length 64;
nchan_max_reserved_memory 256M;
server {{
listen 127.0.0.1:{port} backlog=4096;
location = /sub {{ nchan_subscriber websocket eventsource; nchan_channel_id bench; }}
location = /pub {{ nchan_publisher http; nchan_channel_id bench; }}
}}
}}
"""
        )
        return Server(
            [self.nginx, "-c", str(config), "-p", str(home), "-e", str(home / "error.log")],
            port=port,
            core=self.cores.server,
            log=home / "out.log",
            environ=child_environ(),
        )

    def subscribers(self, count: int) -> Subscribers:
        """WebSockets on the one channel."""
        return Subscribers("ws", ["/sub"] * count)

    def publishing(self, size: int, *, publishers: int, window: int) -> Publishing:
        """A message so long that the delivery is as long as a notification of notifyd's."""
        frame_head = 4
        without = len('{"mark":"","x":""}') + MARK_LENGTH + frame_head
        body = '{"mark":"{mark}","x":"' + "x" * max(0, size - without) + '"}'
        return Publishing("/pub", body, publishers=publishers, window=window, status=201)


def find_nchan(directory: Path, cores: Cores) -> NchanSubject | None:
    """nginx with nchan where it is installed: compiled in, or as a module beside it."""
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    nginx = shutil.which("nginx", path=search)
    if nginx is None:
        return None
    told = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
    if "nchan" in told:
        return NchanSubject(directory, cores, nginx, None)
    folders = [Path(nginx).resolve().parent.parent / "lib/nginx/modules"]
    for word in told.split():
        name, _, value = word.partition("=")
        if name == "--modules-path":
            folders.insert(0, Path(value))
    for folder in folders:
        module = folder / "ngx_nchan_module.so"
        if module.exists():
            return NchanSubject(directory, cores, nginx, str(module))
    return None
