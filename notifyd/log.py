"""The log: structured entries, one formatter for ours and everybody's, nothing secret in it.

`configure_logging` is called once by `notifyd serve`; an application that embeds the server keeps
the logging it has. An entry that the level leaves out costs least on a logger that was bound:
`log = structlog.get_logger().bind()`.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from notifyd.options import LogSettings

MASK = "[masked]"

MAX_TEXT = 8192
"""Characters of one text in an entry."""

_MAX_NESTING = 6
_MAX_ITEMS = 100

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# --- masking --------------------------------------------------------------------------------------

_SECRET_WORDS = frozenset(
    [
        *("token", "tokens", "secret", "secrets", "key", "keys", "apikey", "password", "passwd"),
        *("passphrase", "authorization", "cookie", "cookies", "credential", "credentials", "jwt"),
    ]
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")

# None of these can backtrack further than the run of characters it stands in.
_HEADER = re.compile(
    r"(?i)\b((?:authorization|(?:set-)?cookie|x-api-key)['\"]?\s*+[:,]\s*+b?['\"]?)[^\r\n'\"]++"
)
_JWT = re.compile(
    r"(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_-]*eyJ)[A-Za-z0-9_-]++\.[A-Za-z0-9_-]++\.[A-Za-z0-9_-]*+"
)
_BEARER = re.compile(r"(?i)\b(bearer(?:[\s.+:]|%20)++)[^\s,;\"'&<>)\]]++")
_NAMED = r"(?i)((?:token|secret|password|passwd|passphrase|api[_-]?key|(?<![a-z])(?:key|jwt))"
_ASSIGNED = re.compile(_NAMED + r"(?:=|%3d))(?:\"[^\"]*+\"?|'[^']*+'?|[^\s&\"'<>;,)\]]++)")
_MEMBER = re.compile(_NAMED + r"\\?['\"]\s*+:\s*+b?\\?['\"])[^'\"\\]++")
# Up to the last @: a password may have been written with one in it.
_USERINFO = re.compile(r"(://[^\s/:@\"']*+:)[^\s/\"']+@")


# Every secret above needs one of the characters that are missing here, or the word bearer.
_PLAIN = re.compile(r"(?:(?!bearer)[A-Za-z0-9 _/()-])*+", re.IGNORECASE)


def _keep_name(found: re.Match[str]) -> str:
    return found[1] + MASK


def mask_text(text: str) -> str:
    """`text` without JWTs, bearer credentials, `token=…` and its like, and passwords in URLs."""
    text = _HEADER.sub(_keep_name, text)
    text = _JWT.sub(MASK, text)
    text = _BEARER.sub(_keep_name, text)
    text = _ASSIGNED.sub(_keep_name, text)
    text = _MEMBER.sub(_keep_name, text)
    return _USERINFO.sub(rf"\1{MASK}@", text)


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Whether what stands under `name` is secret: one of its words is token, secret, key, …"""
    return any(word.lower() in _SECRET_WORDS for word in _WORD.findall(name))


# --- foreign text ---------------------------------------------------------------------------------

# What moves a terminal's cursor, starts another line, reverses reading order, or is no character:
# C0 and C1 controls, line and paragraph separators, bidirectional controls, surrogates.
_UNSAFE = r"\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_UNSAFE}]")
_CONTROL_BUT_NEWLINE = re.compile(f"(?!\n)[{_UNSAFE}]")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def safe_text(text: str) -> str:
    """`text` on one line, without secrets and control characters, at most 8,192 characters long."""
    if len(text) <= MAX_TEXT and _PLAIN.fullmatch(text):
        return text
    text = _CONTROL.sub(_escaped, mask_text(text))
    if len(text) > MAX_TEXT:
        return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT} more)"
    return text


def _safe_traceback(text: str) -> str:
    """A traceback keeps its lines, indented: a stranger's text in it cannot pass for an entry."""
    text = _CONTROL_BUT_NEWLINE.sub(_escaped, mask_text(text))
    return "\n".join("  " + line for line in text.splitlines())


def _safe(value: object, nesting: int = 0) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return safe_text(value)
    if nesting == _MAX_NESTING:
        return "…"
    if isinstance(value, Mapping):
        return {
            safe_text(str(name)): _safe_item(name, item, nesting + 1)
            for name, item in list(value.items())[:_MAX_ITEMS]
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)[:_MAX_ITEMS]
        if len(items) == 2 and isinstance(items[0], str | bytes):
            # It may be a header: a name and its value.
            return [_safe(items[0], nesting + 1), _safe_item(items[0], items[1], nesting + 1)]
        return [_safe(item, nesting + 1) for item in items]
    if isinstance(value, bytes | bytearray):
        return safe_text(bytes(value).decode("utf-8", "backslashreplace"))
    return safe_text(repr(value))


def _safe_item(name: object, value: object, nesting: int) -> object:
    """Numbers are no secrets (`max_keys`); everything else under a secret name is."""
    text = name.decode("latin-1") if isinstance(name, bytes) else str(name)
    if is_secret_name(text) and value is not None and not isinstance(value, bool | int | float):
        return MASK
    return _safe(value, nesting)


def make_safe(logger: object, method: str, entry: EventDict) -> EventDict:
    """The structlog processor that masks secrets and escapes foreign text, the names too."""
    safe: EventDict = {}
    for name, value in entry.items():
        if name in {"timestamp", "level"}:
            safe[name] = value  # written by the processors before this one
        elif name in {"exception", "stack"} and isinstance(value, str):
            safe[name] = _safe_traceback(value)
        else:
            safe[safe_text(name)] = _safe_item(name, value, 0)
    return safe


# --- configuration --------------------------------------------------------------------------------


def configure_logging(settings: LogSettings, stream: TextIO) -> None:
    """Write structlog's entries and those of the standard library's loggers to `stream`, alike.

    Takes the handlers off the root logger and uvicorn's loggers: start uvicorn with
    `log_config=None`. Calling it again replaces what was configured.
    """
    level = _LEVELS[settings.level]
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        make_safe,
    ]
    renderer: Processor
    if settings.format == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*before, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        # A cached logger would keep the stream of a configuration that was replaced.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *before,
                renderer,
            ]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Its warning is a traceback each time that PostgreSQL is away, which we say in one line.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


# --- saying it once -------------------------------------------------------------------------------


class _Said(msgspec.Struct):
    at: float
    suppressed: int = 0


class RateLimitedLog:
    """Warnings that a stranger can cause at will: each reason at most once in `interval` seconds.

    The next entry of a reason says how many were left out since (`suppressed`). Reasons are the
    program's own words; beyond `max_reasons` the one logged longest ago is forgotten.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        *,
        interval: float = 60.0,
        max_reasons: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._interval = interval
        self._max_reasons = max_reasons
        self._clock = clock
        self._reasons: dict[str, _Said] = {}

    def warning(self, event: str, *, reason: str, **fields: Any) -> bool:
        """Log a warning unless its reason was logged lately; says whether it was logged now."""
        now = self._clock()
        said = self._reasons.get(reason)
        if said is not None:
            if now - said.at < self._interval:
                said.suppressed += 1
                return False
            # Taken out and put in again: the order is that of logging.
            del self._reasons[reason]
            if said.suppressed:
                fields["suppressed"] = said.suppressed
        elif len(self._reasons) >= self._max_reasons:
            del self._reasons[next(iter(self._reasons))]
        self._reasons[reason] = _Said(now)
        self._log.warning(event, reason=reason, **fields)
        return True
