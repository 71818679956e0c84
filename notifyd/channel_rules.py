"""Who may subscribe to which channel: the rules of the settings and the token's own claim."""

from __future__ import annotations

import re
from collections.abc import Mapping

from notifyd.errors import ConfigurationError
from notifyd.identity import Identity
from notifyd.options import ChannelRule

_RULE_PATTERN = re.compile(r"(?:[A-Za-z0-9_.:*-]|\{user_id\}|\{tenant_id\})+").fullmatch
_PLACEHOLDER = re.compile(r"(\{user_id\}|\{tenant_id\})")
_STRICTEST_FIRST = ("none", "claim", "any")
_MAX_GLOBS = 4096


class Glob:
    """A pattern in which `*` stands for any run of characters, an empty one and `:` included.

    Nothing backtracks: between two stars the leftmost place is as good as any later one, so a match
    costs one `str.find` for each literal part, whatever the pattern.
    """

    __slots__ = ("_exact", "_inner", "_least", "_prefix", "_suffix")

    def __init__(self, literals: list[str]) -> None:
        """`literals` are what stands between the stars; a single one must match as a whole."""
        self._exact = len(literals) == 1
        self._prefix = literals[0]
        self._suffix = literals[-1]
        self._inner = tuple(literal for literal in literals[1:-1] if literal)
        self._least = len(self._prefix) + len(self._suffix)

    @classmethod
    def of(cls, pattern: str) -> Glob:
        """The glob that `pattern` writes."""
        return cls(pattern.split("*"))

    def matches(self, text: str) -> bool:
        """Whether the pattern covers the whole of `text`."""
        if self._exact:
            return text == self._prefix
        if (
            len(text) < self._least
            or not text.startswith(self._prefix)
            or not text.endswith(self._suffix)
        ):
            return False
        position, end = len(self._prefix), len(text) - len(self._suffix)
        for literal in self._inner:
            found = text.find(literal, position, end)
            if found < 0:
                return False
            position = found + len(literal)
        return True


class _Rule:
    """One rule, its pattern taken apart once."""

    __slots__ = ("_glob", "_literals", "subscribe")

    def __init__(self, pattern: str, subscribe: str) -> None:
        self.subscribe = subscribe
        # Split at the stars before anything is put in, so that a star or a brace in a user's id
        # is a character like any other.
        self._literals = [_PLACEHOLDER.split(literal) for literal in pattern.split("*")]
        personal = any(len(pieces) > 1 for pieces in self._literals)
        self._glob = None if personal else Glob.of(pattern)

    def matches(self, channel: str, identity: Identity) -> bool:
        if self._glob is not None:
            return self._glob.matches(channel)
        own = {"{user_id}": identity.user_id, "{tenant_id}": identity.tenant}
        literals = ["".join(own.get(piece, piece) for piece in row) for row in self._literals]
        return Glob(literals).matches(channel)


class ChannelRules:
    """The rules of `channels.rules`, compiled.

    `rules` maps a pattern to its rule. The longest pattern, as written, that matches decides; of
    equally long ones the strictest. Raises ConfigurationError for a pattern that can match nothing.
    """

    __slots__ = ("_globs", "_rules")

    def __init__(self, rules: Mapping[str, ChannelRule]) -> None:
        for pattern in rules:
            if _RULE_PATTERN(pattern) is None:
                raise ConfigurationError(
                    f'channels.rules: "{pattern}" matches no channel; a pattern has letters, '
                    "digits, - _ . : and *, {user_id}, {tenant_id}"
                )
        ordered = sorted(
            rules.items(),
            key=lambda item: (-len(item[0]), _STRICTEST_FIRST.index(item[1].subscribe)),
        )
        self._rules = tuple(_Rule(pattern, rule.subscribe) for pattern, rule in ordered)
        self._globs: dict[str, Glob] = {}

    def refusal(self, channel: str, identity: Identity) -> str | None:
        """Why `identity` may not subscribe to `channel`, in one plain clause; None if he may.

        `channel` is a name that `names.channel_name` accepts. For what a client asks for: the
        server's own subscriptions need no rule.
        """
        for rule in self._rules:
            if rule.matches(channel, identity):
                break
        else:
            return "no channel rule allows it"
        if rule.subscribe == "none":
            return "only the server subscribes to it"
        claim = identity.channels
        if claim is None:
            return None if rule.subscribe == "any" else "it needs a token with a channels claim"
        if channel in claim or self._covered(channel, claim):
            return None
        return "the token's channels claim does not cover it"

    def _covered(self, channel: str, claim: tuple[str, ...]) -> bool:
        return any("*" in entry and self._glob(entry).matches(channel) for entry in claim)

    def _glob(self, pattern: str) -> Glob:
        glob = self._globs.get(pattern)
        if glob is None:
            if len(self._globs) >= _MAX_GLOBS:
                # Tokens with a pattern for each user would fill it: compiling again costs 1 µs.
                self._globs.clear()
            glob = self._globs[pattern] = Glob.of(pattern)
        return glob
