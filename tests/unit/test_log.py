from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import pytest
import structlog

from notifyd.log import MASK, MAX_TEXT, RateLimitedLog, configure_logging, is_secret_name, safe_text
from notifyd.options import LogSettings

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1MSJ9.c2lnbmF0dXJl-_x"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def configured(
    format: Literal["console", "json"] = "json",
    level: Literal["debug", "info", "warning", "error"] = "info",
) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(LogSettings(level=level, format=format), stream)
    return stream


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class TestMasking:
    @pytest.mark.parametrize(
        "text",
        [
            "GET /ws?token=SECRET HTTP/1.1",
            "GET /ws?acks=1&TOKEN=SECRET&x=1",
            "/ws?access_token=SECRET",
            "redirect to %2Fws%3Ftoken%3DSECRET",
            "token='SECRET one'",
            'Auth(token="SECRET")',
            "key=SECRET",
            "api_key=SECRET apiKey=SECRET X-Api-Key=SECRET",
            "jwt_secret=SECRET",
            "password=SECRET",
            "Authorization: Bearer SECRET",
            "Authorization: Basic SECRET",
            "authorization:SECRET",
            "Cookie: session=SECRET; other=SECRET",
            "X-API-Key: SECRET",
            "[(b'authorization', b'SECRET'), (b'cookie', b'a=SECRET')]",
            "{'x-api-key': 'SECRET'}",
            "bearer SECRET",
            "Bearer   SECRET",
            "bearer.SECRET",
            "Bearer%20SECRET",
            '{"type":"Auth","payload":{"token":"SECRET"}}',
            '{\\"token\\": \\"SECRET\\"}',
            "{'api_key': b'SECRET'}",
            "redis://user:SECRET@localhost:6379/0",
            "redis://:SECRET@localhost",
            "redis://:a@SECRET@localhost",
        ],
    )
    def test_masks_in_any_text(self, text: str) -> None:
        assert "SECRET" not in safe_text(text)
        assert MASK in safe_text(text)

    @pytest.mark.parametrize("around", ["{}", "x {} y", "/a/{}/b", "({})", "%20{}", "a={}", "x.{}"])
    def test_masks_a_jwt_wherever_it_stands(self, around: str) -> None:
        masked = safe_text(around.format(JWT))
        assert not any(part in masked for part in JWT.split("."))

    def test_masks_an_unsigned_jwt(self) -> None:
        assert "eyJzdWIiOiJ1MSJ9" not in safe_text("eyJhbGciOiJub25lIn0.eyJzdWIiOiJ1MSJ9.")

    @pytest.mark.parametrize(
        "text",
        [
            "the token expired 42 s ago",
            "monkey=1 keyboard=2 turkey: 3",
            'add "http://localhost:5173" to cors.origins',
            "notifyd.connections.registry",
            "user=u1 channel=orders:1",
        ],
    )
    def test_leaves_other_text(self, text: str) -> None:
        assert safe_text(text) == text

    @pytest.mark.parametrize(
        "name",
        [
            *("token", "access_token", "jwt_secret", "api_keys", "key", "X-API-Key", "apiKey"),
            *("Authorization", "cookie_name", "Set-Cookie", "PASSWORD", "clientSecret", "JWT"),
        ],
    )
    def test_knows_secret_names(self, name: str) -> None:
        assert is_secret_name(name)

    @pytest.mark.parametrize("name", ["event", "user_id", "monkey", "keyboard", "reason", "path"])
    def test_knows_other_names(self, name: str) -> None:
        assert not is_secret_name(name)

    @pytest.mark.parametrize(
        "piece",
        ["eyJ", "eyJ.", "bearer ", "token=", "://a:", "cookie:", "key='", '"token":"', "a.", "%20"],
    )
    def test_is_linear_in_hostile_text(self, piece: str) -> None:
        text = piece * (65536 // len(piece))
        started = time.process_time()
        safe_text(text)
        safe_text("eyJ" + text)
        assert time.process_time() - started < 1


class TestForeignText:
    def test_control_characters_are_escaped(self) -> None:
        text = "a\nb\r\x1b[31m\x00\x7f\x9b\u2028\u202e\ud800 ä→😀\t"
        assert safe_text(text) == ("a\\nb\\r\\x1b[31m\\x00\\x7f\\x9b\\u2028\\u202e\\ud800 ä→😀\\t")

    def test_long_text_is_cut(self) -> None:
        assert safe_text("x" * (MAX_TEXT + 5)) == "x" * MAX_TEXT + "… (5 more)"


class TestConfigureLogging:
    def test_json_is_one_object_a_line(self) -> None:
        stream = configured()
        structlog.get_logger().info("started\nnow", port=8081, ratio=0.5, nothing=None, big=2**70)
        (entry,) = entries(stream)
        assert entry.pop("timestamp").endswith("Z")
        assert entry == {
            "event": "started\\nnow",
            "level": "info",
            "port": 8081,
            "ratio": 0.5,
            "nothing": None,
            "big": 2**70,
        }

    def test_what_is_below_the_level_is_left_out(self) -> None:
        stream = configured(level="warning")
        structlog.get_logger().info("no")
        logging.getLogger("uvicorn.error").info("no")
        structlog.get_logger().warning("yes")
        logging.getLogger("uvicorn.error").warning("yes")
        assert [entry["event"] for entry in entries(stream)] == ["yes", "yes"]

    def test_the_standard_librarys_loggers_come_out_alike(self) -> None:
        stream = configured()
        logging.getLogger("uvicorn.error").handlers.append(logging.NullHandler())
        configure_logging(LogSettings(format="json"), stream)
        logging.getLogger("uvicorn.error").warning('%s - "GET /ws?token=%s"', "peer\n", "SECRET")
        (entry,) = entries(stream)
        assert entry["event"] == f'peer\\n - "GET /ws?token={MASK}"'
        assert (entry["level"], entry["logger"]) == ("warning", "uvicorn.error")
        assert "timestamp" in entry

    def test_secrets_are_masked_at_any_depth(self) -> None:
        stream = configured()

        class Auth(msgspec.Struct):
            token: str

        structlog.get_logger().info(
            "x",
            token="SECRET",
            api_key=b"SECRET",
            max_keys=5,
            headers=[(b"host", b"here"), (b"authorization", b"SECRET"), ["cookie", "SECRET"]],
            nested={"a": [{"password": "SECRET"}]},
            object=Auth("SECRET"),
            raw=b"token=SECRET",
            unordered={"token=SECRET"},
        )
        assert "SECRET" not in stream.getvalue()
        (entry,) = entries(stream)
        assert entry["max_keys"] == 5
        assert entry["headers"][0] == ["host", "here"]

    def test_what_json_cannot_say_is_text(self) -> None:
        stream = configured()
        cycle: list[Any] = []
        cycle.append(cycle)
        structlog.get_logger().info("x", number=float("nan"), cycle=cycle, raw=b"\xff\n")
        (entry,) = entries(stream)
        assert entry["number"] == "nan"
        assert entry["raw"] == "\\xff\\n"

    @pytest.mark.parametrize("format", ["json", "console"])
    def test_tracebacks_are_masked_and_cannot_forge_an_entry(
        self, format: Literal["json", "console"]
    ) -> None:
        stream = configured(format)
        forged = "2026-01-01T00:00:00Z [info] forged"
        for logger in (structlog.get_logger(), logging.getLogger("asyncio")):
            try:
                raise ValueError(f"token=SECRET\n{forged}\x1b[2J")
            except ValueError:
                logger.exception("failed")
        text = stream.getvalue()
        assert "SECRET" not in text
        assert "\x1b" not in text
        assert "ValueError" in text
        assert not any(line.startswith(forged) for line in text.splitlines())
        if format == "json":
            assert len(entries(stream)) == 2
            assert "\n" in entries(stream)[0]["exception"]

    def test_console_is_a_line_for_people(self) -> None:
        stream = configured("console")
        structlog.get_logger().warning("slow\nclient", user="u1\x1b[31m", token="SECRET")
        logging.getLogger("uvicorn.error").info("Started")
        first, second = stream.getvalue().splitlines()
        assert "slow\\nclient" in first
        assert "user=u1\\x1b[31m" in first
        assert f"token={MASK}" in first
        assert "Started" in second
        assert "uvicorn.error" in second

    def test_bound_context_comes_along(self) -> None:
        stream = configured()
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            structlog.get_logger().info("x")
            logging.getLogger("a").info("y")
        assert [entry["request_id"] for entry in entries(stream)] == ["r1", "r1"]

    def test_the_last_configuration_counts(self) -> None:
        log = structlog.get_logger()
        first = configured()
        log.info("one")
        second = configured(level="error")
        log.info("two")
        log.error("three")
        assert [entry["event"] for entry in entries(first)] == ["one"]
        assert [entry["event"] for entry in entries(second)] == ["three"]


class TestRateLimitedLog:
    def test_logs_each_reason_once_in_the_interval_and_counts_the_rest(self) -> None:
        now = [0.0]
        with structlog.testing.capture_logs() as logs:
            log = RateLimitedLog(structlog.get_logger(), clock=lambda: now[0])
            assert log.warning("bad message", reason="not_json", size=3)
            assert not log.warning("bad message", reason="not_json", size=4)
            assert not log.warning("bad message", reason="not_json", size=5)
            assert log.warning("bad message", reason="too_long")
            now[0] = 60.0
            assert log.warning("bad message", reason="not_json", size=6)
            now[0] = 120.0
            assert log.warning("bad message", reason="not_json")
        level = {"log_level": "warning", "event": "bad message"}
        assert logs == [
            {**level, "reason": "not_json", "size": 3},
            {**level, "reason": "too_long"},
            {**level, "reason": "not_json", "size": 6, "suppressed": 2},
            {**level, "reason": "not_json"},
        ]

    def test_the_reasons_are_bounded(self) -> None:
        with structlog.testing.capture_logs() as logs:
            log = RateLimitedLog(structlog.get_logger(), max_reasons=2, clock=lambda: 0.0)
            for reason in ("a", "b", "c", "c", "b", "a"):
                log.warning("x", reason=reason)
        assert [entry["reason"] for entry in logs] == ["a", "b", "c", "a"]
