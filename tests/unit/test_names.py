"""What may be called what."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd import names
from notifyd.errors import ValidationError

CHANNEL_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


@pytest.mark.parametrize(
    "name", ["a", "orders", "order:42", "a:b:c", "A-_.z", "x" * 64, "9", ".", "a::b", "v1.2-rc_3"]
)
def test_channel_names(name: str) -> None:
    assert names.channel_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 65,
        ":a",
        "a:",
        ":",
        "a b",
        "a\n",
        "\na",
        "a/b",
        "é",
        "a*",
        "{user_id}",
        "a\0",
        "a\ud800",
    ],
)
def test_what_is_no_channel_name(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        names.channel_name(name, "channels[3]")
    assert refused.value.field == "channels[3]"
    assert refused.value.constraint is not None
    assert refused.value.message.startswith("channels[3] must be a channel name")


@given(st.text())
def test_channel_names_are_what_the_contract_says(text: str) -> None:
    allowed = (
        1 <= len(text) <= 64
        and all(character in CHANNEL_CHARACTERS + ":" for character in text)
        and text[0] != ":"
        and text[-1] != ":"
    )
    assert accepts(names.channel_name, text) == allowed


@pytest.mark.parametrize("pattern", ["*", "order:*", "*:x", "a*b*c", "orders", ":*", "*" * 128])
def test_channel_patterns(pattern: str) -> None:
    assert names.channel_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern", ["", ":a", "a:", "*" * 129, "x" * 65, "a *", "*\n", "{user_id}"]
)
def test_what_is_no_channel_pattern(pattern: str) -> None:
    assert not accepts(names.channel_pattern, pattern)


@pytest.mark.parametrize(
    "name",
    ["u", "42", "x" * 256, "a b", "anna@example.com", "søren", "用户", "auth0|1", "🙂", "a/b?c#d%"],
)
def test_user_ids(name: str) -> None:
    assert names.user_id(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 257,
        "a\0",
        "a\n",
        "\r",
        "a\tb",
        "\x7f",
        "a\ud800",
        "\udfff",
        "a\u00a0b",
        "\u200b",
        "\u2028",
    ],
)
def test_what_is_no_user_id(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        names.user_id(name, "target_user_id")
    assert refused.value.field == "target_user_id"
    assert not name or name not in refused.value.message


@given(st.text(min_size=1, max_size=260))
def test_user_ids_can_always_be_written_and_shown(text: str) -> None:
    if accepts(names.user_id, text):
        assert len(text) <= 256
        assert text.encode().decode() == text
        assert not {unicodedata.category(character)[0] for character in text} & {"C"}


@pytest.mark.parametrize("name", ["default", "acme", "a-b_c.D9", "x" * 64])
def test_tenant_ids(name: str) -> None:
    assert names.tenant_id(name) == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a:b", "a b", "a\n", "ü", "*"])
def test_what_is_no_tenant_id(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        names.tenant_id(name)
    assert refused.value.field == "tenant_id"


def accepts(check: Callable[[str], str], text: str) -> bool:
    try:
        return check(text) == text
    except ValidationError:
        return False
