from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import jwt
import pytest
from websockets.sync.server import Server, ServerConnection, serve

from notifyd import __version__, cli
from notifyd.settings import Settings, default_config

SECRET = "a-secret-of-at-least-thirty-two-bytes"
KEY = "an-api-key-of-the-tests"
NOBODY_THERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def usage(*argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv, {})
    assert caught.value.code == 2


class TestUsage:
    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["migrate", "--nonsense"],
            ["serve", "--nonsense"],
            ["token"],
            ["token", "--user", "u", "--ttl", "soon"],
            ["send", "order.created", "{}"],
            ["send", "--user", "u", "--broadcast", "order.created", "{}"],
            ["send", "--user", "u", "order.created", "{"],
            ["send", "--user", "u", "order.created"],
            ["send", "--user", "\udcff", "order.created", "{}"],
            ["send", "--channel", "\udcff", "order.created", "{}"],
            ["send", "--broadcast", "\udcff", "{}"],
            ["send", "--broadcast", "order.created", '"\udcff"'],
            ["send", "--broadcast", "order.created", "[" * 100_000],
            ["send", "--tenant", "\udcff", "--broadcast", "order.created", "{}"],
            ["listen", "--channel", "\udcff"],
            ["listen", "--url", "localhost:8081"],
            ["listen", "--url", "https://"],
            ["listen", "--url", "http://localhost:0"],
            ["listen", "--url", "http://localhost:99999"],
            ["listen", "--url", "http://localhost:web"],
            ["listen", "--url", "http://[::1"],
        ],
    )
    def test_wrong_usage_is_2(self, argv: list[str]) -> None:
        usage(*argv)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["--version"], {})
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"notifyd {__version__}\n"

    @pytest.mark.parametrize(
        "argv",
        [
            ["serve"],
            ["check-config"],
            ["token", "--user", "u"],
            ["send", "--broadcast", "e", "{}"],
            ["listen"],
        ],
    )
    def test_wrong_settings_are_2_and_named(
        self, argv: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(argv, {"NOTIFYD_SERVER__PROT": "1", "NOTIFYD_LOG__LEVEL": "loud"}) == 2
        told = capsys.readouterr().err
        assert told.startswith("notifyd: the settings cannot be used:\n  ")
        assert "NOTIFYD_SERVER__PROT" in told
        assert "log.level" in told

    def test_as_a_module(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "notifyd", "--version"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.stdout == f"notifyd {__version__}\n"

    def test_a_reader_that_went_away_is_no_failure(self) -> None:
        command = f"{sys.executable} -m notifyd default-config | head -n 0; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert (done.returncode, done.stderr) == (0, "")


class TestCheckConfig:
    def test_says_that_all_is_well(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check-config"], {}) == 0
        assert "development, http://127.0.0.1:8081" in capsys.readouterr().out

    def test_makes_nothing(self, tmp_path: Path) -> None:
        cli.main(["check-config"], {})
        assert list(tmp_path.iterdir()) == []

    def test_warns(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check-config"], {"NOTIFYD_SERVER_PORT": "1"}) == 0
        assert "notifyd: warning: NOTIFYD_SERVER_PORT is ignored" in capsys.readouterr().err

    def test_looks_into_the_keys(self, capsys: pytest.CaptureFixture[str]) -> None:
        environ = {
            "NOTIFYD_AUTH__JWT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----\nnone",
            "NOTIFYD_AUTH__JWT_ALGORITHMS": '["ES256"]',
        }
        assert cli.main(["check-config"], environ) == 2
        assert "auth.jwt_public_key" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("host", "url"),
        [("0.0.0.0", "http://127.0.0.1:8081"), ("::", "http://[::1]:8081")],
    )
    def test_of_all_addresses_it_names_one(
        self, host: str, url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        environ = {
            "NOTIFYD_SERVER__MODE": "production",
            "NOTIFYD_SERVER__HOST": host,
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_AUTH__API_KEY": KEY,
            "NOTIFYD_CORS__ORIGINS": '["https://app.example.com"]',
            "NOTIFYD_CHANNELS__RULES": '{"news": {"subscribe": "any"}}',
        }
        assert cli.main(["check-config"], environ) == 0
        assert url in capsys.readouterr().out

    def test_looks_into_the_stores_that_are_used(self, capsys: pytest.CaptureFixture[str]) -> None:
        environ = {
            "NOTIFYD_QUEUE__BACKEND": "redis",
            "REDIS_URL": "redis://:s3cret@localhost?nonsense=1",
        }
        assert cli.main(["check-config"], environ) == 2
        err = capsys.readouterr().err
        assert "redis.url: unknown option 'nonsense'" in err
        assert "s3cret" not in err
        assert cli.main(["check-config"], environ | {"REDIS_URL": "redis://localhost"}) == 0


class TestMigrate:
    async def migrate(self, url: str, *flags: str) -> int:
        # In a thread, because the command has an event loop of its own.
        return await asyncio.to_thread(cli.main, ["migrate", *flags], {"DATABASE_URL": url})

    async def test_says_what_is_missing_and_applies_it(
        self, postgres_url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert await self.migrate(postgres_url, "--check") == 1
        missing = capsys.readouterr().out.splitlines()
        assert missing
        assert all(line.startswith("missing: ") for line in missing)
        assert await self.migrate(postgres_url) == 0
        assert capsys.readouterr().out.splitlines() == [
            *(line.replace("missing", "applied") for line in missing),
            "The schema is up to date.",
        ]
        for flags in ((), ("--check",)):
            assert await self.migrate(postgres_url, *flags) == 0
            assert capsys.readouterr().out == "The schema is up to date.\n"

    async def test_a_database_that_cannot_be_used_is_2(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for flags in ((), ("--check",)):
            assert await self.migrate("postgresql://u:s3cret@127.0.0.1:1/db", *flags) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert "postgres.url: the database cannot be used" in err
            assert "s3cret" not in err

    def test_without_a_database_it_is_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["migrate"], {}) == 2
        assert "postgres.url: is not set, nor is DATABASE_URL" in capsys.readouterr().err


def test_default_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["default-config"], {}) == 0
    assert capsys.readouterr().out == default_config()


class TestToken:
    def test_has_what_was_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["token", "--user", "u1", "--role", "admin", "--role", "ops"]
        argv += ["--channel", "order:*", "--ttl", "60"]
        assert cli.main(argv, {"NOTIFYD_AUTH__JWT_SECRET": SECRET}) == 0
        claims = jwt.decode(capsys.readouterr().out.strip(), SECRET, algorithms=["HS256"])
        assert claims["sub"] == "u1"
        assert claims["roles"] == ["admin", "ops"]
        assert claims["channels"] == ["order:*"]
        assert 60 <= claims["exp"] - claims["iat"] < 62

    def test_of_a_tenant(self, capsys: pytest.CaptureFixture[str]) -> None:
        # Which of them were created by a call is for the server to know.
        environ = {
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_TENANT__ENABLED": "true",
            "NOTIFYD_TENANT__AUTO_CREATE": "false",
        }
        assert cli.main(["token", "--user", "u1", "--tenant", "acme"], environ) == 0
        claims = jwt.decode(capsys.readouterr().out.strip(), SECRET, algorithms=["HS256"])
        assert claims["tenant_id"] == "acme"
        assert cli.main(["token", "--user", "u1", "--tenant", "a:b"], environ) == 2

    def test_development_keeps_its_secret(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["token", "--user", "u1"], {}) == 0
        secret = (tmp_path / ".notifyd" / "jwt_secret").read_text("utf-8").strip()
        claims = jwt.decode(capsys.readouterr().out.strip(), secret, algorithms=["HS256"])
        assert "channels" not in claims

    @pytest.mark.parametrize(
        "more", [["--tenant", "acme"], ["--ttl", "0"], ["--user", ""], ["--channel", "a b"]]
    )
    def test_what_no_token_may_have_is_2(
        self, more: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["token", "--user", "u1", *more], {}) == 2
        assert capsys.readouterr().out == ""

    def test_without_a_secret_it_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        environ = {"NOTIFYD_AUTH__JWKS_URL": "https://issuer.example.com/keys"}
        assert cli.main(["token", "--user", "u1"], environ) == 1
        assert "auth.jwt_secret" in capsys.readouterr().err


class FakeApp(ModuleType):
    """Stands where the composition root is, and tells what it was given."""

    def __init__(self) -> None:
        super().__init__("notifyd.app")
        self.settings: Settings | None = None

    def serve(self, settings: Settings, *, announce: Callable[[str], None]) -> int:
        self.settings = settings
        announce("http://127.0.0.1:9000")
        return 0


class TestServe:
    @pytest.fixture
    def app(self, monkeypatch: pytest.MonkeyPatch) -> FakeApp:
        fake = FakeApp()
        monkeypatch.setitem(sys.modules, "notifyd.app", fake)
        return fake

    def test_flags_win(self, app: FakeApp) -> None:
        argv = ["serve", "--port", "9000", "--host", "::1"]
        assert cli.main(argv, {"NOTIFYD_SERVER__PORT": "9001"}) == 0
        assert app.settings is not None
        assert app.settings.server.port == 9000
        assert app.settings.server.host == "::1"

    def test_a_wrong_flag_is_2(self, app: FakeApp, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["serve", "--port", "http"], {}) == 2
        assert app.settings is None
        assert "server.port: expected a whole number from 0 to 65535" in capsys.readouterr().err

    def test_development_says_what_to_try(
        self, app: FakeApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve"], {}) == 0
        told = capsys.readouterr().out
        key = (tmp_path / ".notifyd" / "api_key").read_text("utf-8").strip()
        assert "http://127.0.0.1:9000/demo" in told
        assert f"X-API-Key: {key}" in told
        assert "curl http://127.0.0.1:9000/api/v1/notifications" in told
        token = next(word for word in told.split() if word.startswith("eyJ"))
        assert app.settings is not None
        claims = jwt.decode(token, app.settings.auth.jwt_secrets[0], algorithms=["HS256"])
        assert claims["sub"] == "alice"

    @pytest.mark.usefixtures("app")
    @pytest.mark.parametrize("bound", [None, "acme"])
    def test_with_tenants_it_says_for_which(
        self, bound: str | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keys = [{"name": "backend", "key": KEY, "tenant_id": bound}]
        environ = {
            "NOTIFYD_AUTH__API_KEYS": json.dumps(keys),
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_TENANT__ENABLED": "true",
        }
        assert cli.main(["serve"], environ) == 0
        told = capsys.readouterr().out
        token = next(word for word in told.split() if word.startswith("eyJ"))
        claims = jwt.decode(token, SECRET, algorithms=["HS256"])
        assert claims.get("tenant_id") == bound
        assert ("X-Tenant-ID: default" in told) == (bound is None)
        assert ("listen --user alice --tenant acme" in told) == (bound == "acme")

    @pytest.mark.usefixtures("app")
    def test_it_shows_no_key_that_it_does_not_have(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keys = [{"name": "reader", "key": "r", "scopes": ["read"]}]
        environ = {
            "NOTIFYD_AUTH__API_KEYS": json.dumps(keys),
            "NOTIFYD_AUTH__JWKS_URL": "https://issuer.example.com/keys",
        }
        assert cli.main(["serve"], environ) == 0
        told = capsys.readouterr().out
        assert "X-API-Key" not in told
        assert "Token" not in told

    @pytest.mark.usefixtures("app")
    def test_a_command_that_can_be_typed_here(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        command = tmp_path / ".venv" / "bin" / "notifyd"
        command.parent.mkdir(parents=True)
        command.touch()
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [str(command), "serve"])
        cli.main(["serve"], {})
        assert "  .venv/bin/notifyd listen --user alice" in capsys.readouterr().out

    @pytest.mark.usefixtures("app")
    def test_a_command_that_is_in_no_file(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["-c"])
        cli.main(["serve"], {})
        assert "  notifyd listen --user alice" in capsys.readouterr().out

    def test_production_prints_nothing(
        self, app: FakeApp, capsys: pytest.CaptureFixture[str]
    ) -> None:
        environ = {
            "NOTIFYD_SERVER__MODE": "production",
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_AUTH__API_KEY": KEY,
            "NOTIFYD_CORS__ORIGINS": '["https://app.example.com"]',
            "NOTIFYD_CHANNELS__RULES": '{"news": {"subscribe": "any"}}',
        }
        assert cli.main(["serve"], environ) == 0
        assert app.settings is not None
        assert capsys.readouterr().out == ""


class Publishing(BaseHTTPRequestHandler):
    """Answers a publishing call as the server would, and keeps what it was asked."""

    requests: ClassVar[list[tuple[str, str | None, object]]] = []
    tenants: ClassVar[list[str | None]] = []
    answers: ClassVar[list[tuple[int, object]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["X-API-Key"], body))
        self.tenants.append(self.headers["X-Tenant-ID"])
        status, answer = self.answers.pop(0)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class TestSend:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        Publishing.requests.clear()
        Publishing.answers.clear()
        Publishing.tenants.clear()
        with ThreadingHTTPServer(("127.0.0.1", 0), Publishing) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def receipt(self, outcome: str) -> dict[str, object]:
        return {
            "success": outcome == "delivered",
            "notification_id": "018f2d7e-0000-7000-8000-000000000000",
            "timestamp": "2026-01-01T12:00:00Z",
            "outcome": outcome,
            "delivered_to": int(outcome == "delivered"),
            "failed": 0,
        }

    @pytest.mark.parametrize(
        ("target", "asked"),
        [
            (["--user", "u1"], {"target_user_id": "u1"}),
            (["--channel", "orders"], {"channel": "orders"}),
            (["--broadcast"], {}),
        ],
    )
    def test_to_its_target(
        self,
        url: str,
        target: list[str],
        asked: dict[str, str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        Publishing.answers.append((200, self.receipt("delivered")))
        argv = ["send", *target, "order.created", '{"order_id": 42}', "--url", url]
        assert cli.main(argv, {"NOTIFYD_AUTH__API_KEY": KEY}) == 0
        _path, key, body = Publishing.requests[0]
        assert key == KEY
        assert body == {"event_type": "order.created", "payload": {"order_id": 42}} | asked
        told = json.loads(capsys.readouterr().out)
        assert told["outcome"] == "delivered"
        assert told["delivered_to"] == 1

    def test_for_a_tenant(self, url: str) -> None:
        Publishing.answers += [(200, self.receipt("delivered"))] * 2
        argv = ["send", "--user", "u1", "order.created", "{}", "--url", url]
        assert cli.main(argv, {"NOTIFYD_AUTH__API_KEY": KEY}) == 0
        assert cli.main([*argv, "--tenant", "acme"], {"NOTIFYD_AUTH__API_KEY": KEY}) == 0
        assert Publishing.tenants == [None, "acme"]

    @pytest.mark.parametrize(
        ("outcome", "code"), [("queued", 0), ("nobody", 0), ("filtered", 0), ("failed", 1)]
    )
    def test_only_failed_is_a_failure(self, url: str, outcome: str, code: int) -> None:
        Publishing.answers.append((200, self.receipt(outcome)))
        argv = ["send", "--user", "u1", "e", "null", "--url", url]
        assert cli.main(argv, {"NOTIFYD_AUTH__API_KEY": KEY}) == code

    def test_an_answer_that_is_an_error_is_1(
        self, url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = {"error": {"code": "UNAUTHORIZED", "message": "No such API key."}}
        Publishing.answers.append((401, error))
        argv = ["send", "--user", "u1", "e", "{}", "--url", url]
        assert cli.main(argv, {"NOTIFYD_AUTH__API_KEY": KEY}) == 1
        assert "401 UNAUTHORIZED: No such API key." in capsys.readouterr().err

    def test_it_takes_the_key_of_development(self, url: str, tmp_path: Path) -> None:
        cli.main(["token", "--user", "u1"], {})
        Publishing.answers.append((200, self.receipt("queued")))
        assert cli.main(["send", "--user", "u1", "e", "{}", "--url", url], {}) == 0
        kept = (tmp_path / ".notifyd" / "api_key").read_text("utf-8").strip()
        assert Publishing.requests[0][1] == kept

    def test_without_a_key_it_says_where_to_get_one(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["send", "--user", "u1", "e", "{}"], {}) == 2
        assert "NOTIFYD_AUTH__API_KEY" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestListen:
    ID = "018f2d7e-0000-7000-8000-000000000000"

    @contextmanager
    def server(self, handler: Callable[[ServerConnection], None]) -> Iterator[str]:
        server: Server = serve(handler, "127.0.0.1", 0)
        with server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
            server.shutdown()
            thread.join()

    def test_prints_and_confirms_what_arrives(self, capsys: pytest.CaptureFixture[str]) -> None:
        heard: list[dict[str, object]] = []
        tokens: list[str] = []

        def handler(connection: ServerConnection) -> None:
            assert connection.request is not None
            tokens.append(connection.request.headers["Authorization"].removeprefix("Bearer "))
            for message in (
                {"type": "connected", "connection_id": self.ID, "user_id": "u1"},
                {"type": "subscribed", "payload": ["orders"]},
                {"type": "gap", "stream": "user:u1", "reason": "queue_overflow"},
                {"type": "error", "code": "SUBSCRIPTION_ERROR", "message": "not alerts"},
                {"type": "caught_up", "replayed": 1},
                {
                    "type": "notification",
                    "id": self.ID,
                    "occurred_at": "2026-01-01T12:00:00.000Z",
                    "event_type": "order.created",
                    "payload": {"order_id": 42},
                    "metadata": {"source": "http-api", "priority": "High"},
                },
            ):
                connection.send(json.dumps(message))
            for text in connection:
                heard.append(json.loads(text))
                if heard[-1]["type"] == "Ack":
                    connection.close(4003, "told to stay away")
                    break

        with self.server(handler) as url:
            argv = ["listen", "--user", "u1", "--channel", "orders", "--url", url]
            assert cli.main(argv, {"NOTIFYD_AUTH__JWT_SECRET": SECRET}) == 1

        claims = jwt.decode(tokens[0], SECRET, algorithms=["HS256"])
        assert (claims["sub"], claims["channels"]) == ("u1", ["orders"])
        assert heard[-1] == {"type": "Ack", "payload": {"notification_ids": [self.ID]}}
        out, err = capsys.readouterr()
        assert json.loads(out) == {
            "id": self.ID,
            "occurred_at": "2026-01-01T12:00:00Z",
            "event_type": "order.created",
            "payload": {"order_id": 42},
            "metadata": {"source": "http-api", "priority": "High"},
        }
        for told in (
            "connected as u1",
            "subscribed to orders",
            "some notifications of user:u1 were missed: queue_overflow",
            "SUBSCRIPTION_ERROR: not alerts",
            "disconnected (4003",
            "told to stay away",
        ):
            assert told in err

    def test_given_up_for_a_newer_connection_is_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        def handler(connection: ServerConnection) -> None:
            connection.close(4009, "a newer connection")

        with self.server(handler) as url:
            argv = ["listen", "--url", url]
            assert cli.main(argv, {"NOTIFYD_AUTH__JWT_SECRET": SECRET}) == 1
        assert "its user opened newer ones" in capsys.readouterr().err

    def test_an_interrupt_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_tell", interrupt)
        argv = ["listen", "--url", NOBODY_THERE]
        assert cli.main(argv, {"NOTIFYD_AUTH__JWT_SECRET": SECRET}) == 0

    def test_it_says_that_it_tries_again(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tell = cli._tell

        def told_once(event: object) -> None:
            tell(event)  # type: ignore[arg-type] # the client tells nothing but events
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_tell", told_once)
        argv = ["listen", "--url", NOBODY_THERE]
        assert cli.main(argv, {"NOTIFYD_AUTH__JWT_SECRET": SECRET}) == 0
        assert "trying again in" in capsys.readouterr().err

    def test_without_a_secret_it_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["listen", "--url", NOBODY_THERE], {}) == 1
        assert "auth.jwt_secret" in capsys.readouterr().err
