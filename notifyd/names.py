"""What channels, users and tenants may be called.

Each check returns the name, so that it can stand where the name is used, and raises ValidationError
otherwise. A name that is refused is never in the message: it may be long, or hostile to a terminal.
"""

from __future__ import annotations

import re

from notifyd.errors import ValidationError

MAX_CHANNEL = 64
MAX_CHANNEL_PATTERN = 128
MAX_USER_ID = 256
MAX_TENANT_ID = 64

# Matched with fullmatch: `$` would let a newline pass at the end. Letters and digits are ASCII's,
# so that a name looks like one name only and needs no percent-encoding in a path.
_CHANNEL = re.compile(r"[A-Za-z0-9_.-](?:[A-Za-z0-9_.:-]{0,62}[A-Za-z0-9_.-])?").fullmatch
_CHANNEL_PATTERN = re.compile(r"[A-Za-z0-9_.:*-]{1,128}").fullmatch
_TENANT_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}").fullmatch


def channel_name(text: str, field: str = "channel") -> str:
    """`text`, if it is 1 to 64 of ASCII letters, digits, `-`, `_`, `.`, and `:` inside.

    Raises ValidationError for `field`.
    """
    if _CHANNEL(text) is None:
        constraint = f"1 to {MAX_CHANNEL} of letters, digits, - _ . and, not at either end, :"
        raise ValidationError(
            f"{field} must be a channel name: {constraint}.", field=field, constraint=constraint
        )
    return text


def channel_pattern(text: str, field: str = "channels") -> str:
    """`text`, if it is a channel name or a pattern in which `*` stands for any run of characters.

    At most 128 characters. Raises ValidationError for `field`.
    """
    # A colon at either end is right in a pattern: `order:*`.
    if _CHANNEL_PATTERN(text) is None or ("*" not in text and _CHANNEL(text) is None):
        constraint = f"a channel name, or a pattern of at most {MAX_CHANNEL_PATTERN} with *"
        raise ValidationError(
            f"{field} must be {constraint}: letters, digits, - _ . and : are allowed.",
            field=field,
            constraint=constraint,
        )
    return text


def user_id(text: str, field: str = "user_id") -> str:
    """`text`, if it is 1 to 256 printable characters, as Unicode and `str.isprintable` have it.

    So there is no control character, NUL or line break in it, no lone surrogate, nothing invisible
    and no space but U+0020. Raises ValidationError for `field`.
    """
    if not is_user_id(text):
        constraint = f"1 to {MAX_USER_ID} printable characters"
        raise ValidationError(f"{field} must be {constraint}.", field=field, constraint=constraint)
    return text


def is_user_id(text: str) -> bool:
    """Whether `user_id` takes it."""
    return 1 <= len(text) <= MAX_USER_ID and text.isprintable()


def tenant_id(text: str, field: str = "tenant_id") -> str:
    """`text`, if it is 1 to 64 of ASCII letters, digits, `-`, `_`, `.`.

    Raises ValidationError for `field`.
    """
    if _TENANT_ID(text) is None:
        constraint = f"1 to {MAX_TENANT_ID} of letters, digits, - _ ."
        raise ValidationError(
            f"{field} must be a tenant id: {constraint}.", field=field, constraint=constraint
        )
    return text
