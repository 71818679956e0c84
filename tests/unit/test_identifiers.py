from __future__ import annotations

import os
import re
import uuid
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.errors import ValidationError
from notifyd.identifiers import (
    UuidSource,
    canonical_uuid,
    new_uuid,
    request_id,
    timestamp_text,
)


class TestNewUuid:
    def test_is_a_random_uuid_in_canonical_text(self) -> None:
        for _ in range(1000):
            text = new_uuid()
            parsed = uuid.UUID(text)
            assert str(parsed) == text
            assert parsed.version == 4
            assert parsed.variant == uuid.RFC_4122

    def test_never_repeats(self) -> None:
        assert len({new_uuid() for _ in range(10_000)}) == 10_000

    def test_keeps_all_random_bits(self) -> None:
        source = UuidSource(lambda count: bytes(range(256)) * (count // 256))
        made = {source().replace("-", "") for _ in range(128)}
        expected = {
            uuid.UUID(bytes=bytes((16 * i + j) % 256 for j in range(16)), version=4).hex
            for i in range(16)
        }
        assert made == expected

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_a_forked_child_makes_its_own(self) -> None:
        source = UuidSource()
        source()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, source().encode())
            os._exit(0)
        os.waitpid(child, 0)
        with os.fdopen(reading) as answer:
            os.close(writing)
            assert source() != answer.read()


class TestCanonicalUuid:
    @given(st.uuids())
    def test_takes_any_case(self, value: uuid.UUID) -> None:
        assert canonical_uuid(str(value).upper()) == str(value)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "0b6c1f0e6a0e4f3a9d431f2f6b6f0c55",
            "{0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55}",
            "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c5",
            "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c5g",
            "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55\n",
            "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c5٣",
        ],
    )
    def test_refuses_what_is_none(self, text: str) -> None:
        with pytest.raises(ValidationError) as caught:
            canonical_uuid(text, "notification_id")
        assert caught.value.field == "notification_id"


class TestRequestId:
    @pytest.mark.parametrize("offered", [b"a", b"req 7/x", b"~" * 128])
    def test_keeps_the_callers(self, offered: bytes) -> None:
        assert request_id(offered) == offered.decode()

    @pytest.mark.parametrize(
        "offered", [None, b"", b" ", b"~" * 129, b"a\tb", b"a\nb", b"\x7f", b"\xc3\xa4", b"\x00"]
    )
    def test_makes_one_where_it_is_not_acceptable(self, offered: bytes | None) -> None:
        assert uuid.UUID(request_id(offered)).version == 4


class TestTimestampText:
    def test_reads_as_rfc_3339_to_the_millisecond(self) -> None:
        moment = datetime(2026, 1, 1, 12, tzinfo=UTC)
        assert timestamp_text(moment.timestamp()) == "2026-01-01T12:00:00.000Z"
        assert timestamp_text(0) == "1970-01-01T00:00:00.000Z"
        assert timestamp_text(1767268800.123) == "2026-01-01T12:00:00.123Z"
        assert timestamp_text(1767268800.9996) == "2026-01-01T12:00:01.000Z"

    @given(st.integers(min_value=0, max_value=253402300799999))
    def test_every_millisecond_comes_back(self, milliseconds: int) -> None:
        text = timestamp_text(milliseconds / 1000)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
        back = (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
        assert round(back * 1000) == milliseconds

    def test_a_time_beyond_the_calendar_is_its_last_second(self) -> None:
        assert timestamp_text(1e15) == "9999-12-31T23:59:59.000Z"
