from __future__ import annotations

import pytest

from notifyd.connections.admission import Handshake
from notifyd.connections.refusal import as_stream, by_close_code
from notifyd.errors import (
    BadRequest,
    ConnectionLimit,
    Forbidden,
    NotifydError,
    RateLimited,
    ShuttingDown,
    TokenExpired,
    Unauthorized,
    Unavailable,
    UserConnectionLimit,
)
from tests.unit.test_admission import Gate


def coming(origin: bytes | None) -> Handshake:
    headers = [] if origin is None else [(b"origin", origin)]
    return Handshake("websocket", b"", headers, "192.0.2.1")


class TestByCloseCode:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (Unauthorized("x"), 4001),
            (TokenExpired("x"), 4001),
            (UserConnectionLimit("x"), 4009),
            (ConnectionLimit("x"), 4029),
            (RateLimited("x"), 4029),
            (Unavailable("x"), 1011),
            (ShuttingDown("x"), 1001),
            (Forbidden("x"), None),
            (BadRequest("x"), 1002),
        ],
    )
    def test_tells_a_browser_of_an_allowed_page(
        self, error: NotifydError, code: int | None
    ) -> None:
        admission = Gate().admission
        assert by_close_code(error, coming(b"https://app.example"), admission) == code

    @pytest.mark.parametrize("origin", [None, b"null", b"https://evil.example"])
    def test_everybody_else_gets_the_status(self, origin: bytes | None) -> None:
        assert by_close_code(Unauthorized("x"), coming(origin), Gate().admission) is None


class TestAsStream:
    def test_what_passes_is_told_with_when_to_come_back(self) -> None:
        events = as_stream(RateLimited("Later.", retry_after=10), lambda low, high: high)
        assert events == (
            b"retry: 15000\n\nevent: error\n"
            b'data: {"code":"RATE_LIMITED","message":"Later.","retry_after_seconds":10}\n\n'
        )

    def test_without_a_time_in_some_seconds(self) -> None:
        events = as_stream(Unavailable("Away."), lambda low, high: low)
        assert events is not None
        assert events.startswith(b"retry: 5000\n\nevent: error\n")

    @pytest.mark.parametrize("error", [Unauthorized("x"), Forbidden("x"), BadRequest("x")])
    def test_what_does_not_is_left_to_the_status(self, error: NotifydError) -> None:
        assert as_stream(error, lambda low, high: low) is None
