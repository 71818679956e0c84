"""Request bodies: bytes -> structs, and what is wrong with those that are not."""

from __future__ import annotations

import difflib
import json
import re
from functools import lru_cache
from typing import Generic, TypeVar

import msgspec
from msgspec import inspect

from notifyd.errors import BadRequest, NotifydError, ValidationError

T = TypeVar("T")


class Decoder(Generic[T]):
    """Decodes one type of body, or one item of a body.

    The type forbids unknown fields; how strict it is otherwise stands in its annotations.
    """

    __slots__ = ("_decode", "type")

    def __init__(self, type: type[T]) -> None:
        self.type = type
        self._decode = msgspec.json.Decoder(type).decode

    def __call__(self, data: bytes) -> T:
        """The body as `type`.

        Raises BadRequest where it is not JSON in strict UTF-8 (RFC 8259, section 8.1), and
        ValidationError, which names the field, where it has another shape.
        """
        # What msgspec.Raw takes over, msgspec does not look into.
        if not data.isascii():
            _require_utf8(data)
        try:
            return self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._refusal(error, data) from error

    def item(self, data: msgspec.Raw) -> T:
        """One item of a body that was decoded strictly; raises ValidationError."""
        try:
            return self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._refusal(error, bytes(data)) from error

    def _refusal(self, error: Exception, data: bytes) -> NotifydError:
        if isinstance(error, RecursionError):
            return ValidationError(
                "The JSON is nested too deeply.", constraint="nested at most 64 deep"
            )
        if isinstance(error, msgspec.ValidationError):
            return _shape_refusal(str(error), self.type)
        if b"\\u" in data and _is_json(data):
            # msgspec takes half a surrogate pair for a body that ends too early.
            return ValidationError("A string holds half of a surrogate pair, which no text can.")
        return BadRequest(f"The body is not JSON: {error}.")


def _require_utf8(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8: byte {error.start}.") from error


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`$")
_EXPECTED = re.compile(r"Expected (?P<expected>.*?)(?:, got `(?P<got>[^`]*)`)?$")


def _shape_refusal(text: str, type: type) -> ValidationError:
    """msgspec's sentence, as one that names the field by its path."""
    path = ""
    if at := _AT.search(text):
        path = at["path"].removeprefix(".")
        text = text[: at.start()]
    if unknown := _UNKNOWN.match(text):
        name = unknown["name"]
        near = _nearest(name, _fields(type, path))
        guess = f' The nearest known one is "{near}".' if near else ""
        return ValidationError(
            f'"{_shortened(name)}" is no known field.{guess}',
            field=_join(path, _shortened(name)),
            constraint="a known field",
        )
    if missing := _MISSING.match(text):
        field = _join(path, missing["name"])
        return ValidationError(f"{field} is missing.", field=field, constraint="required")
    if expected := _EXPECTED.match(text):
        constraint = expected["expected"].replace("`", "")
        got = f", not {expected['got']}" if expected["got"] else ""
        return ValidationError(
            f"{path or 'The body'} must be {constraint}{got}.",
            field=path or None,
            constraint=constraint,
        )
    return ValidationError(f"{path or 'The body'}: {text}.", field=path or None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shortened(name: str) -> str:
    return name if len(name) <= 64 else name[:63] + "…"


def _nearest(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name[:64], known, n=1, cutoff=0.0)), None)


@lru_cache(maxsize=256)
def _fields(type: type, path: str) -> list[str]:
    """The fields of the struct at `path` inside `type`; none where there is no one struct."""
    found: inspect.Type = inspect.type_info(type)
    for step in re.findall(r"[^.\[\]]+|\[[^\]]*\]", path):
        found = _inner(found, step)
    found = _bare(found)
    return (
        [field.encode_name for field in found.fields]
        if isinstance(found, inspect.StructType)
        else []
    )


def _inner(type: inspect.Type, step: str) -> inspect.Type:
    bare = _bare(type)
    if isinstance(bare, inspect.StructType):
        return next(field.type for field in bare.fields if field.encode_name == step)
    return bare.item_type if isinstance(bare, inspect.CollectionType) else inspect.AnyType()


def _bare(type: inspect.Type) -> inspect.Type:
    if isinstance(type, inspect.Metadata):
        return _bare(type.type)
    if isinstance(type, inspect.UnionType):
        return _bare(next(one for one in type.types if not isinstance(one, inspect.NoneType)))
    return type
