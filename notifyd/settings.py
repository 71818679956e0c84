"""How settings are read, and what is refused: file, environment, command line.

What can be set stands in options.py; nothing here knows a single option but the cross-checks. The
sections can be made directly too, as an embedding application does; `problems()` says what is wrong
with settings however they came about.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import inspect

from notifyd import names
from notifyd.errors import ConfigurationError, ValidationError
from notifyd.identity import DEFAULT_TENANT
from notifyd.options import (
    RATE,
    AckSettings,
    ApiKeySettings,
    AuthSettings,
    BreakerSettings,
    ChannelRule,
    ChannelSettings,
    CorsSettings,
    IdempotencySettings,
    LogSettings,
    MetricsSettings,
    Option,
    PostgresSettings,
    QueueSettings,
    RateLimitSettings,
    RedisSettings,
    ServerSettings,
    Settings,
    TenantOverride,
    TenantSettings,
    WebSocketSettings,
    bare,
    expectation,
    options,
    sections,
    shown_address,
)

__all__ = [
    "AckSettings",
    "ApiKeySettings",
    "AuthSettings",
    "BreakerSettings",
    "ChannelRule",
    "ChannelSettings",
    "CorsSettings",
    "IdempotencySettings",
    "LogSettings",
    "MetricsSettings",
    "Option",
    "PostgresSettings",
    "QueueSettings",
    "RateLimitSettings",
    "RedisSettings",
    "ServerSettings",
    "Settings",
    "TenantOverride",
    "TenantSettings",
    "WebSocketSettings",
    "default_config",
    "load_settings",
    "options",
    "problems",
]

PREFIX = "NOTIFYD_"
CONFIG_VARIABLE = "NOTIFYD_CONFIG"
COMMON_VARIABLES = {"REDIS_URL": ("redis", "url"), "DATABASE_URL": ("postgres", "url")}
"""What platforms call it; read where ours is unset."""

MIN_API_KEY_CHARACTERS = 16
MIN_SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}


def load_settings(
    path: str | None,
    environ: Mapping[str, str],
    *,
    warn: Callable[[str], None] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from a TOML file, then the environment, then `overrides`; the later wins.

    `path` is the file named on the command line; without it, NOTIFYD_CONFIG names one, or there is
    none. An empty variable counts as unset. `overrides` maps `section.key` to a text and stands for
    flags of the command line. REDIS_URL and DATABASE_URL are taken where neither file nor
    environment says otherwise. `warn` gets one sentence for each variable that looks like a
    misspelt one of ours.

    Raises ConfigurationError with everything that is wrong, one line each.
    """
    reader = _Reader()
    reader.file(path or environ.get(CONFIG_VARIABLE) or None)
    reader.environment(environ, warn)
    for name, text in (overrides or {}).items():
        section, _, key = name.partition(".")
        reader.text(section, key, text, f"--{key.replace('_', '-')}")
    return reader.settings()


def problems(settings: Settings) -> list[str]:
    """What settings may not be together, and what production refuses; empty where all is well.

    Each names the option as `section.key` and says how to mend it.
    """
    found = [
        *_limits(settings),
        *_stores(settings),
        *_server(settings.server),
        *_secrets(settings.auth),
        *_public_keys(settings.auth, production=settings.production),
        *_api_keys(
            settings.auth, limited=settings.ratelimit.enabled, tenants=settings.tenant.enabled
        ),
        *_tenants(settings),
        *_patterns(settings.channels),
        *_origins(settings.cors),
    ]
    if settings.production:
        found += _production(settings)
    return found


def default_config() -> str:
    """A TOML file with every option, its default, unit and meaning; `config/default.toml` is it."""
    lines = [
        "# Every option of notifyd with its default. Printed by `notifyd default-config`.",
        "#",
        "# Each is also an environment variable, which wins: server.port is NOTIFYD_SERVER__PORT.",
        "# Lists and tables are given as JSON there. With _FILE appended, the variable names the",
        "# file to read the value from: NOTIFYD_AUTH__JWT_SECRET_FILE=/run/secrets/jwt_secret.",
        "#",
        "# What is commented out is unset or empty by default, and shown with an example.",
    ]
    section = None
    for option in options():
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        lines += [f"# {line}" for line in _wrap(f"{option.meaning} {_sentence(option)}", 97)]
        if option.example is None:
            lines.append(f"{option.key} = {_toml(option.default)}")
        else:
            lines.append(f"# {option.key} = {_toml(option.example)}")
    return "\n".join(lines) + "\n"


class _Reader:
    """Gathers values with where they came from, and every problem on the way."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}
        self.options = {option.name: option for option in options()}

    def file(self, path: str | None) -> None:
        if path is None:
            return
        try:
            tables = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise ConfigurationError(
                f"{path}: the settings file cannot be read ({error.strerror}); name another with "
                f"--config or {CONFIG_VARIABLE}"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: not valid TOML: {error}") from error
        known = sections()
        for section, table in tables.items():
            if section not in known:
                near = _nearest(section, known)
                self.problems.append(
                    f"{section}: unknown section (in {path}); the nearest known one is [{near}]"
                    if isinstance(table, dict)
                    else f"{section}: unknown key outside any section (in {path}); "
                    f"{self._suggest(section)}"
                )
            elif not isinstance(table, dict):
                self.problems.append(f"{section}: is a section, write [{section}] (in {path})")
            else:
                for key, value in table.items():
                    self._take(section, key, value, f"in {path}")

    def environment(self, environ: Mapping[str, str], warn: Callable[[str], None] | None) -> None:
        """Take every variable of ours; values of `…_FILE` come from the file they name."""
        squeezed = {option.variable.replace("_", ""): option for option in self.options.values()}
        for variable, text in sorted(environ.items()):
            if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
                continue
            if "__" not in variable:
                stem = variable.removesuffix("_FILE")
                if warn and (meant := squeezed.get(stem.replace("_", ""))):
                    suffix = variable[len(stem) :]
                    warn(
                        f"{variable} is ignored; to set {meant.name}, write "
                        f"{meant.variable}{suffix} (two underscores after the section)"
                    )
                continue
            section, _, key = variable[len(PREFIX) :].lower().partition("__")
            if f"{section}.{key}" in self.options:
                if text:
                    self.text(section, key, text, variable)
            elif key.endswith("_file") and f"{section}.{key.removesuffix('_file')}" in self.options:
                if text:
                    self._from_file(section, key.removesuffix("_file"), text, variable, environ)
            else:
                near = self._near(f"{section}.{key}")
                self.problems.append(
                    f"{variable}: unknown variable; the nearest known one is {near.variable} "
                    f"({near.name})"
                )
        for variable, (section, key) in COMMON_VARIABLES.items():
            if f"{section}.{key}" not in self.origins and (url := environ.get(variable)):
                self.text(section, key, url, variable)

    def _from_file(
        self, section: str, key: str, path: str, variable: str, environ: Mapping[str, str]
    ) -> None:
        if environ.get(variable.removesuffix("_FILE")):
            self.problems.append(
                f"{section}.{key}: both {variable.removesuffix('_FILE')} and {variable} are set; "
                "unset one"
            )
            return
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            self.problems.append(
                f"{section}.{key}: {path} cannot be read: {reason} (named by {variable})"
            )
            return
        self.text(section, key, re.sub(r"\r?\n\Z", "", text), variable)

    def text(self, section: str, key: str, text: str, origin: str) -> None:
        """Take a value that is given as text: JSON for lists and tables, itself for the others."""
        option = self.options[f"{section}.{key}"]
        value: Any = text
        if isinstance(option.default, list | dict):
            try:
                value = json.loads(text)
            except ValueError:
                example = "{…}" if isinstance(option.default, dict) else '["…"]'
                self.problems.append(
                    f"{option.name}: lists and tables are given as JSON, such as {example} "
                    f"(from {origin})"
                )
                return
        self._take(section, key, value, f"from {origin}", strict=False)

    def _take(
        self, section: str, key: str, value: Any, origin: str, *, strict: bool = True
    ) -> None:
        name = f"{section}.{key}"
        if name not in self.options:
            self.problems.append(f"{name}: unknown key ({origin}); {self._suggest(name)}")
            return
        option = self.options[name]
        self.origins[name] = origin
        unknown = list(_unknown_keys(value, option.kind, name))
        if unknown:
            self.problems += [f"{problem} ({origin})" for problem in unknown]
            return
        try:
            converted = msgspec.convert(value, type=option.annotation, strict=strict)
        except msgspec.ValidationError as error:
            self.problems.append(self._wrong(option, value, error, origin))
            return
        self.values.setdefault(section, {})[key] = converted

    def _wrong(
        self, option: Option, value: object, error: msgspec.ValidationError, origin: str
    ) -> str:
        reason, _, at = str(error).partition(" - at ")
        table = bare(option.kind)
        if at.startswith("`key` in") and isinstance(table, inspect.DictType):
            return f"{option.name}: expected as keys {expectation(table.key_type)} ({origin})"
        inner = at.removeprefix("`$").removesuffix("`")
        if inner:
            where = option.name + inner.replace("[...]", "")
            if reason.startswith("Object missing"):
                return f"{where}: {reason[0].lower()}{reason[1:]} ({origin})"
            return f"{where}: expected {expectation(_inside(option.kind, inner))} ({origin})"
        # What a list or a text holds may be a secret in the wrong place.
        plain = not option.secret and isinstance(option.default, str | int | float)
        plain = plain and not option.address
        got = f", got {_show(value)}" if plain else ""
        return f"{option.name}: expected {option.expects}{got} ({origin})"

    def _near(self, name: str) -> Option:
        key = name.rpartition(".")[2]
        return max(
            self.options.values(),
            key=lambda option: _likeness(name, option.name) + _likeness(key, option.key),
        )

    def _suggest(self, name: str) -> str:
        return f"the nearest known one is {self._near(name).name}"

    def settings(self) -> Settings:
        """What was read, if nothing is wrong with it."""
        made: dict[str, Any] = {
            section: sections()[section](**values) for section, values in self.values.items()
        }
        settings = Settings(**made)
        # An option whose value was refused stands at its default now: what is said of that default
        # would only confuse.
        refused = {_subject(problem) for problem in self.problems}
        for problem in problems(settings):
            subject = _subject(problem)
            if subject not in refused:
                origin = self.origins.get(subject)
                self.problems.append(f"{problem} ({origin})" if origin else problem)
        if self.problems:
            raise ConfigurationError("\n".join(self.problems))
        return settings


def _subject(problem: str) -> str:
    """The option that a problem begins with."""
    return re.split(r"[:\[]", problem, maxsplit=1)[0]


_PATTERN = re.compile(r"(?:[A-Za-z0-9._:*-]|\{user_id\}|\{tenant_id\})+")


def _limits(settings: Settings) -> Iterator[str]:
    websocket, queue, server = settings.websocket, settings.queue, settings.server
    if websocket.idle_timeout <= websocket.heartbeat_interval:
        yield (
            f"websocket.idle_timeout: {websocket.idle_timeout:g} s must be more than "
            f"websocket.heartbeat_interval ({websocket.heartbeat_interval:g} s), or every quiet "
            "connection is closed"
        )
    if server.max_sockets < websocket.max_connections:
        yield (
            f"server.max_sockets: {server.max_sockets} must be at least websocket.max_connections "
            f"({websocket.max_connections}); raise it, or lower the other"
        )
    if websocket.outbox_total_bytes < websocket.outbox_max_bytes:
        yield (
            f"websocket.outbox_total_bytes: {websocket.outbox_total_bytes} must be at least "
            f"websocket.outbox_max_bytes ({websocket.outbox_max_bytes})"
        )
    if queue.backend == "memory" and queue.max_messages < queue.max_size_per_user:
        yield (
            f"queue.max_messages: {queue.max_messages} must be at least queue.max_size_per_user "
            f"({queue.max_size_per_user})"
        )


def _secrets(auth: AuthSettings) -> Iterator[str]:
    needed = max((MIN_SECRET_BYTES.get(name, 0) for name in auth.jwt_algorithms), default=0)
    if auth.jwt_secrets and not needed:
        yield "auth.jwt_secret: no algorithm uses it; add HS256 to auth.jwt_algorithms or unset it"
    for index, secret in enumerate(auth.jwt_secrets):
        option = "auth.jwt_secret" if secret == auth.jwt_secret else f"auth.jwt_secrets[{index}]"
        size = len(secret.encode())
        if size < needed:
            algorithm = next(name for name, least in MIN_SECRET_BYTES.items() if least == needed)
            yield (
                f"{option}: {size} bytes are too few, {algorithm} needs {needed}; make one with: "
                f"openssl rand -hex {needed}"
            )


def _public_keys(auth: AuthSettings, *, production: bool) -> Iterator[str]:
    asymmetric = [name for name in auth.jwt_algorithms if name not in MIN_SECRET_BYTES]
    if auth.jwt_public_key is not None:
        if "PRIVATE KEY" in auth.jwt_public_key:
            yield "auth.jwt_public_key: this is a private key; give the public one, and no more"
        elif "-----BEGIN" not in auth.jwt_public_key:
            yield (
                "auth.jwt_public_key: expected PEM text, -----BEGIN PUBLIC KEY----- and so on; to "
                "name a file, use NOTIFYD_AUTH__JWT_PUBLIC_KEY_FILE"
            )
        if auth.jwks_url is not None:
            yield "auth.jwt_public_key: auth.jwks_url is set too; unset one of them"
        elif not asymmetric:
            yield (
                "auth.jwt_algorithms: the algorithm of auth.jwt_public_key is not among them; set "
                'it to ["RS256"], ["ES256"] or ["EdDSA"]'
            )
    elif asymmetric and auth.jwks_url is None:
        yield (
            f"auth.jwt_algorithms: {asymmetric[0]} needs a key; set auth.jwt_public_key or "
            "auth.jwks_url"
        )
    if auth.jwks_url is not None:
        url = _split(auth.jwks_url)
        if url is None or url.scheme not in {"http", "https"}:
            yield (
                f'auth.jwks_url: "{auth.jwks_url}" is no address of keys; write it as '
                '"https://issuer.example.com/.well-known/jwks.json"'
            )
        elif production and url.scheme != "https":
            yield f'auth.jwks_url: "{auth.jwks_url}" is refused in production; use https'


def _api_keys(auth: AuthSettings, *, limited: bool, tenants: bool) -> Iterator[str]:
    taken: set[str] = set()
    for index, key in enumerate(auth.api_keys):
        option = f'auth.api_keys[{index}] ("{key.name}")'
        if (key.key is None) == (key.sha256 is None):
            yield f"{option}: give either key or sha256"
        if key.name in taken:
            yield f"{option}: another key has this name; give it one of its own"
        taken.add(key.name)
        if key.rate is not None and not limited:
            yield (
                f'{option}: rate "{key.rate}" holds only where limits are on; set '
                "ratelimit.enabled to true, or remove it"
            )
        elif key.rate is not None and not re.search(RATE, key.rate):
            yield f'{option}: rate "{key.rate}" is no rate; write it as "1000/hour"'
        if key.tenant_id is None:
            continue
        if not tenants and key.tenant_id != DEFAULT_TENANT:
            yield (
                f'{option}: tenant_id "{key.tenant_id}" is refused, there are no tenants but '
                f'"{DEFAULT_TENANT}"; remove it, or set tenant.enabled to true'
            )
        elif not _is_tenant(key.tenant_id):
            yield f'{option}: tenant_id "{key.tenant_id}" is no tenant id, {_TENANT_RULE}'


_TENANT_RULE = f"which is 1 to {names.MAX_TENANT_ID} of letters, digits, - _ ."


def _is_tenant(name: str) -> bool:
    try:
        names.tenant_id(name)
    except ValidationError:
        return False
    return True


def _tenants(settings: Settings) -> Iterator[str]:
    tenant, most = settings.tenant, settings.websocket.max_connections
    if not tenant.enabled:
        if tenant.overrides:
            yield (
                "tenant.overrides: tenants are switched off; set tenant.enabled to true, or remove "
                "them"
            )
        return
    if tenant.max_connections > most:
        yield (
            f"tenant.max_connections: {tenant.max_connections} must be at most "
            f"websocket.max_connections ({most}), which is for all tenants together"
        )
    for name, override in tenant.overrides.items():
        if not _is_tenant(name):
            yield f'tenant.overrides: "{name}" is no tenant id, {_TENANT_RULE}'
        if override.max_connections is not None and override.max_connections > most:
            yield (
                f'tenant.overrides: max_connections of "{name}", {override.max_connections}, must '
                f"be at most websocket.max_connections ({most})"
            )


def _patterns(channels: ChannelSettings) -> Iterator[str]:
    for pattern in channels.rules:
        if not _PATTERN.fullmatch(pattern):
            yield (
                f'channels.rules: "{pattern}" matches no channel; a pattern has letters, digits, '
                "- _ . : and *, {user_id}, {tenant_id}"
            )


def _origins(cors: CorsSettings) -> Iterator[str]:
    """Origins are scheme, host and port as browsers write them (RFC 6454, section 6.2)."""
    for origin in cors.origins:
        url = _split(origin)
        if origin == "*":
            continue
        if url is None or not url.scheme:
            yield (
                f'cors.origins: "{origin}" is no origin; write scheme and host, as '
                '"https://app.example.com"'
            )
            continue
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        port = "" if url.port in {None, _PORTS.get(url.scheme)} else f":{url.port}"
        sent = f"{url.scheme}://{host}{port}"
        if origin != sent:
            yield f'cors.origins: "{origin}" is not what a browser sends; write "{sent}"'


def _stores(settings: Settings) -> Iterator[str]:
    queue, breaker, postgres = settings.queue, settings.breaker, settings.postgres
    if breaker.backoff_initial_ms > breaker.backoff_max_ms:
        yield (
            f"breaker.backoff_initial_ms: {breaker.backoff_initial_ms} must be at most "
            f"breaker.backoff_max_ms ({breaker.backoff_max_ms})"
        )
    if postgres.pool_min > postgres.pool_max:
        yield (
            f"postgres.pool_min: {postgres.pool_min} must be at most postgres.pool_max "
            f"({postgres.pool_max})"
        )
    if queue.mode == "always" and not queue.enabled:
        yield (
            'queue.mode: "always" stores everything, and the queue is switched off; set '
            "queue.enabled to true"
        )
    for section, uses in (("queue", queue), ("ack", settings.ack)):
        if uses.enabled and uses.backend == "postgres" and postgres.url is None:
            yield (
                f'postgres.url: {section}.backend is "postgres" and needs to know where it is; set '
                "it, as postgresql://notifyd@localhost:5432/notifyd"
            )
            break
    if "redis" in settings.backends:
        yield from _redis_url(settings.redis.url)
    if settings.redis.trigger_enabled and not settings.redis.trigger_patterns:
        yield (
            "redis.trigger_patterns: is empty, so that the trigger hears nothing; name patterns, "
            "or set redis.trigger_enabled to false"
        )
    if "postgres" in settings.backends and postgres.url is not None:
        yield from _postgres_url(postgres.url)


def _redis_url(text: str) -> Iterator[str]:
    said = f"redis.url: {shown_address(text)}"
    url = _parts(text)
    if url is None or url.scheme not in {"redis", "rediss", "unix"}:
        yield f"{said} is no URL of a Redis; write it as redis://localhost:6379"
    elif url.scheme == "unix":
        if not url.path.strip("/"):
            yield f"{said} names no socket; write it as unix:///run/redis.sock"
    elif not url.hostname:
        yield f"{said} names no host; write it as redis://localhost:6379"
    elif not re.fullmatch(r"(/[0-9]*)?", url.path):
        yield f"{said}: a database has a number; write it as redis://localhost:6379/0"


def _postgres_url(text: str) -> Iterator[str]:
    said = f"postgres.url: {shown_address(text)}"
    scheme = text.partition(":")[0]
    # Several hosts, as libpq has them, are no URL of RFC 3986: their ports are not looked at.
    several = "," in text.partition("://")[2].partition("/")[0].rpartition("@")[2]
    if scheme not in {"postgresql", "postgres"} or not (several or _parts(text)):
        yield (
            f"{said} is no URL of a PostgreSQL; write it as "
            "postgresql://notifyd@localhost:5432/notifyd"
        )


def _parts(text: str) -> SplitResult | None:
    """The parts of a URL; None for any other text."""
    try:
        url = urlsplit(text)
        return url if "://" in text and url.port != 0 else None
    except ValueError:
        return None


_PORTS = {"http": 80, "https": 443}


def _split(text: str) -> SplitResult | None:
    """The parts of a URL that has a host; None for any other text."""
    try:
        url = urlsplit(text)
        return url if url.hostname and url.port != 0 else None
    except ValueError:
        return None


def _server(server: ServerSettings) -> Iterator[str]:
    if (server.tls_cert is None) != (server.tls_key is None):
        missing = "tls_key" if server.tls_key is None else "tls_cert"
        yield f"server.{missing}: TLS needs both tls_cert and tls_key; set this one too"
    for key, path in (("tls_cert", server.tls_cert), ("tls_key", server.tls_key)):
        if path is not None and not os.access(path, os.R_OK):
            yield f"server.{key}: {path} cannot be read; name a PEM file"
    for address in server.forwarded_allow_ips:
        if address != "*" and not _is_network(address):
            yield (
                f'server.forwarded_allow_ips: "{address}" is no address or network; write them as '
                '"10.0.0.0/8"'
            )
    if server.mode == "development" and not _is_loopback(server.host):
        yield (
            f"server.host: development listens on loopback only, not on {server.host}; set "
            'server.mode to "production", or server.host to 127.0.0.1'
        )


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _production(settings: Settings) -> Iterator[str]:
    auth = settings.auth
    if not auth.jwt_secrets and auth.jwt_public_key is None and auth.jwks_url is None:
        yield (
            "auth.jwt_secret: production needs a way to verify tokens; set it (easiest by "
            "NOTIFYD_AUTH__JWT_SECRET_FILE), or auth.jwt_public_key, or auth.jwks_url"
        )
    if not auth.api_keys:
        yield (
            "auth.api_key: production needs a key for backends; set it (easiest by "
            "NOTIFYD_AUTH__API_KEY_FILE), or auth.api_keys"
        )
    for index, key in enumerate(auth.api_keys):
        if key.key is not None and len(key.key) < MIN_API_KEY_CHARACTERS:
            option = "auth.api_key" if key.key == auth.api_key else f"auth.api_keys[{index}].key"
            yield (
                f"{option}: {len(key.key)} characters are too few, production needs "
                f"{MIN_API_KEY_CHARACTERS}; make one with: openssl rand -hex 24"
            )
    if not settings.cors.origins:
        yield (
            "cors.origins: production needs the origins of your pages, as "
            '["https://app.example.com"]'
        )
    if "*" in settings.cors.origins:
        yield 'cors.origins: production refuses "*"; list the origins of your pages'
    if not settings.channels.rules:
        yield (
            "channels.rules: production needs at least one rule, as "
            '[channels.rules."news"] with subscribe = "any"'
        )


def _unknown_keys(value: object, kind: inspect.Type, path: str) -> Iterator[str]:
    """Keys inside a value that its struct does not have, each with the nearest that it has."""
    match bare(kind), value:
        case inspect.StructType() as struct, dict():
            known = {field.name: field.type for field in struct.fields}
            for key, inner in value.items():
                if key in known:
                    yield from _unknown_keys(inner, known[key], f"{path}.{key}")
                else:
                    near = _nearest(str(key), known)
                    yield f"{path}.{key}: unknown key; the nearest known one is {near}"
        case inspect.DictType() as table, dict():
            for key, inner in value.items():
                yield from _unknown_keys(inner, table.value_type, f'{path}."{key}"')
        case inspect.VarTupleType() as sequence, list():
            for index, inner in enumerate(value):
                yield from _unknown_keys(inner, sequence.item_type, f"{path}[{index}]")
        case _:
            return


def _inside(kind: inspect.Type, at: str) -> inspect.Type:
    """The type of what stands at a path such as `[0].scopes[1]` inside a value."""
    for step in re.findall(r"\.\w+|\[[^]]*\]", at):
        match bare(kind):
            case inspect.StructType(fields=inner):
                kind = next(field.type for field in inner if field.name == step[1:])
            case inspect.VarTupleType(item_type=item):
                kind = item
            case inspect.DictType(value_type=value):
                kind = value
    return kind


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _nearest(name: str, known: Mapping[str, object]) -> str:
    return max(known, key=lambda candidate: _likeness(name, candidate))


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _sentence(option: Option) -> str:
    """Unit and bounds of a number, or the choices; nothing where the meaning says it all."""
    if option.unit is not None:
        bounds = re.sub(r"^a (whole )?number (of )?", "", option.expects)
        return f"{option.unit.capitalize()}, {bounds}."
    if isinstance(option.default, str) and " or " in option.expects:
        return f"One of {option.expects.replace(' or ', ', ')}."
    return ""


def _wrap(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = [f"{_toml_key(key)} = {_toml(inner)}" for key, inner in value.items()]
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
