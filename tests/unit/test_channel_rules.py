"""Who may subscribe to which channel."""

from __future__ import annotations

import re
import time
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.channel_rules import ChannelRules, Glob
from notifyd.errors import ConfigurationError
from notifyd.identity import Identity
from notifyd.options import ChannelRule

ANYBODY = Identity("u1")
Subscribe = Literal["any", "claim", "none"]


def rules(**patterns: Subscribe) -> ChannelRules:
    return made(patterns)


def made(patterns: dict[str, Subscribe]) -> ChannelRules:
    return ChannelRules({name: ChannelRule(subscribe=value) for name, value in patterns.items()})


def test_no_rule_refuses() -> None:
    assert made({}).refusal("orders", ANYBODY) == "no channel rule allows it"
    assert made({"news": "any"}).refusal("orders", ANYBODY) == "no channel rule allows it"


def test_any_and_none() -> None:
    wanted = rules(news="any", secret="none")
    assert wanted.refusal("news", ANYBODY) is None
    assert wanted.refusal("secret", ANYBODY) == "only the server subscribes to it"
    # A claim does not open what no client may have.
    assert wanted.refusal("secret", Identity("u1", channels=("*",))) is not None


def test_the_star_matches_colons_and_nothing_at_all() -> None:
    wanted = made({"order:*": "any"})
    assert wanted.refusal("order:1", ANYBODY) is None
    assert wanted.refusal("order:1:items", ANYBODY) is None
    assert wanted.refusal("orders", ANYBODY) is not None
    assert made({"order*": "any"}).refusal("order", ANYBODY) is None


def test_a_pattern_covers_the_whole_name() -> None:
    wanted = made({"order": "any", "a*a": "any"})
    assert wanted.refusal("orders", ANYBODY) is not None
    assert wanted.refusal("my-order", ANYBODY) is not None
    assert wanted.refusal("a", ANYBODY) is not None
    assert wanted.refusal("aa", ANYBODY) is None


def test_a_dot_is_a_dot() -> None:
    assert made({"a.b": "any"}).refusal("axb", ANYBODY) is not None


def test_the_longest_pattern_as_written_wins() -> None:
    wanted = made({"*": "any", "order:*": "none", "order:public:*": "any"})
    assert wanted.refusal("news", ANYBODY) is None
    assert wanted.refusal("order:1", ANYBODY) is not None
    assert wanted.refusal("order:public:1", ANYBODY) is None


def test_the_length_of_a_placeholder_is_as_written() -> None:
    # {user_id} is written with nine characters and stands for two.
    wanted = made({"inbox:{user_id}": "any", "inbox:u*": "none"})
    assert wanted.refusal("inbox:u1", ANYBODY) is None
    assert wanted.refusal("inbox:u2", ANYBODY) is not None


def test_of_equally_long_patterns_the_strictest_wins() -> None:
    assert made({"a*": "any", "*b": "none"}).refusal("ab", ANYBODY) is not None
    assert made({"*b": "none", "a*": "any"}).refusal("ab", ANYBODY) is not None


def test_own_channels() -> None:
    wanted = made({"inbox:{user_id}": "any", "{tenant_id}.news": "any"})
    assert wanted.refusal("inbox:u1", ANYBODY) is None
    assert wanted.refusal("inbox:u2", ANYBODY) is not None
    assert wanted.refusal("inbox:{user_id}", ANYBODY) is not None
    assert wanted.refusal("default.news", ANYBODY) is None
    assert wanted.refusal("acme.news", ANYBODY) is not None


@pytest.mark.parametrize("user_id", ["*", "u*", ".*", "[a-z]", "{tenant_id}", "\\", "u2|u3", ""])
def test_a_user_id_is_taken_literally(user_id: str) -> None:
    identity = Identity(user_id)
    wanted = made({"inbox:{user_id}": "any", "team:*:{user_id}:*": "any"})
    for channel in ("inbox:u2", "inbox:default", "inbox:uu", "team:a:u2:b"):
        assert wanted.refusal(channel, identity) is not None


def test_stars_around_placeholders() -> None:
    wanted = made({"team:*:{user_id}:*": "any"})
    assert wanted.refusal("team:red:u1:drafts", ANYBODY) is None
    assert wanted.refusal("team:red:u2:drafts", ANYBODY) is not None


def test_claim_mode_needs_the_claim() -> None:
    wanted = made({"*": "claim"})
    assert wanted.refusal("orders", ANYBODY) == "it needs a token with a channels claim"
    assert wanted.refusal("orders", Identity("u1", channels=("orders",))) is None
    assert wanted.refusal("order:9", Identity("u1", channels=("x", "order:*"))) is None
    outside = wanted.refusal("news", Identity("u1", channels=("orders", "order:*")))
    assert outside == "the token's channels claim does not cover it"
    assert wanted.refusal("orders", Identity("u1", channels=())) is not None


def test_a_claim_restricts_where_the_rule_says_any() -> None:
    wanted = made({"*": "any"})
    held = Identity("u1", channels=("order:*",))
    assert wanted.refusal("order:1", held) is None
    assert wanted.refusal("news", held) is not None
    assert wanted.refusal("news", Identity("u1", channels=())) is not None


def test_a_claim_does_not_stand_in_for_a_rule() -> None:
    assert made({"news": "any"}).refusal("orders", Identity("u1", channels=("*",))) is not None


@pytest.mark.parametrize("pattern", ["", "a b", "{userid}", "{", "a\n", "é"])
def test_a_pattern_that_matches_nothing_stops_the_start(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match=r"channels\.rules"):
        made({pattern: "any"})


def test_many_claimed_patterns_stay_bounded() -> None:
    wanted = made({"*": "claim"})
    for number in range(10_000):
        assert wanted.refusal(f"o:{number}:x", Identity("u1", channels=(f"o:{number}:*",))) is None
    assert len(wanted._globs) <= 4096


def reference(pattern: str, text: str) -> bool:
    """The plainest matcher: it tries everything."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(reference(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] == text[0] and reference(pattern[1:], text[1:])


@given(st.text("ab:*", max_size=8), st.text("ab:*.", max_size=12))
def test_globs_match_as_the_reference_does(pattern: str, text: str) -> None:
    assert Glob.of(pattern).matches(text) == reference(pattern, text)


@given(
    st.dictionaries(st.text("ab*", min_size=1, max_size=5), st.sampled_from(["any", "none"])),
    st.text("ab", min_size=1, max_size=6),
)
def test_rules_decide_as_the_reference_does(patterns: dict[str, Subscribe], channel: str) -> None:
    matching = [pattern for pattern in patterns if reference(pattern, channel)]
    longest = max(map(len, matching), default=0)
    deciding = {patterns[pattern] for pattern in matching if len(pattern) == longest}
    allowed = made(patterns).refusal(channel, ANYBODY) is None
    assert allowed == (deciding == {"any"})


@given(st.text("ab*{}_usertenidx.[]\\", min_size=1, max_size=12), st.text("abx", max_size=4))
def test_any_user_id_matches_itself_only(user_id: str, other: str) -> None:
    wanted = made({"{user_id}": "any"})
    assert wanted.refusal(user_id, Identity(user_id)) is None
    assert (wanted.refusal(other, Identity(user_id)) is None) == (other == user_id)


def test_a_hostile_pattern_takes_no_time() -> None:
    # A backtracking regular expression would need longer than the universe has: 60 stars.
    hostile = "*a" * 60 + "*b"
    assert re.fullmatch(r"[a*b]{122}", hostile)
    glob = Glob.of(hostile)
    started = time.process_time()
    for _ in range(100):
        assert not glob.matches("a" * 256)
    assert time.process_time() - started < 1
