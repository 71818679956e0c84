"""The command `notifyd`. Exit codes: 0, 1 failed, 2 usage or configuration."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from notifyd import __version__
from notifyd.development import with_credentials, with_kept_credentials
from notifyd.errors import ConfigurationError, NotifydError, ValidationError
from notifyd.identity import DEFAULT_TENANT
from notifyd.options import BreakerSettings, Settings
from notifyd.settings import default_config, load_settings

if TYPE_CHECKING:
    from notifyd.auth import TokenVerifier
    from notifyd.client import Disconnected, Event, Notification

EXIT_FAILED = 1
EXIT_USAGE = 2
DAY = 86_400

Arguments = argparse.Namespace
Environment = Mapping[str, str]


def main(argv: Sequence[str] | None = None, environ: Environment | None = None) -> int:
    """Run one command and return its exit code; wrong usage raises SystemExit(2), as argparse does.

    `argv` and `environ` are the process's own unless given.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[Arguments, Environment], int] = arguments.run
    try:
        return run(arguments, os.environ if environ is None else environ)
    except ConfigurationError as error:
        lines = "".join(f"\n  {line}" for line in str(error).splitlines())
        _say(f"the settings cannot be used:{lines}")
        return EXIT_USAGE
    except NotifydError as error:
        _say(f"{error.message} {error.hint or ''}".rstrip())
        return EXIT_USAGE if isinstance(error, ValidationError) else EXIT_FAILED
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Who read our output has gone (`| head`). What Python still holds for it goes nowhere, or
        # it complains once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="notifyd", description="Real-time notifications over WebSocket and SSE."
    )
    parser.add_argument("--version", action="version", version=f"notifyd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    configured = argparse.ArgumentParser(add_help=False)
    configured.add_argument(
        "--config", metavar="FILE", help="settings, TOML (or NOTIFYD_CONFIG names the file)"
    )
    remote = argparse.ArgumentParser(add_help=False, parents=[configured])
    remote.add_argument(
        "--url", type=_url, help="the server (default: where the settings have it listen)"
    )

    serve = commands.add_parser("serve", parents=[configured], help="run the server")
    serve.add_argument("--host", help="address to listen on, instead of server.host")
    serve.add_argument("--port", help="port to listen on, instead of server.port")
    serve.add_argument(
        "--workers", metavar="N", help="processes on that port, instead of server.workers"
    )
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check-config", parents=[configured], help="say what is wrong with the settings"
    )
    check.set_defaults(run=_check_config)

    default = commands.add_parser(
        "default-config", help="print every option with its default, unit and meaning"
    )
    default.set_defaults(run=_default_config)

    migrate = commands.add_parser(
        "migrate", parents=[configured], help="bring the schema in PostgreSQL up to date"
    )
    migrate.add_argument(
        "--check", action="store_true", help="change nothing; say what is missing, with exit code 1"
    )
    migrate.set_defaults(run=_migrate)

    token = commands.add_parser("token", parents=[configured], help="make a user's token")
    token.add_argument("--user", required=True, help="user id")
    token.add_argument("--tenant", default="default", help="whose user (default: default)")
    token.add_argument("--role", action="append", default=[], help="may be given several times")
    token.add_argument(
        "--channel",
        action="append",
        help="channel or pattern the user may subscribe to, several times; none: as the rules say",
    )
    token.add_argument(
        "--ttl", type=int, default=DAY, metavar="SECONDS", help="lifetime (default: a day)"
    )
    token.set_defaults(run=_token)

    send = commands.add_parser("send", parents=[remote], help="send one notification")
    target = send.add_mutually_exclusive_group(required=True)
    target.add_argument("--user", type=_text, help="to this user")
    target.add_argument("--channel", type=_text, help="to who is subscribed to this channel")
    target.add_argument("--broadcast", action="store_true", help="to everybody connected")
    send.add_argument(
        "--tenant", type=_text, help="for this tenant, where the key is bound to none"
    )
    send.add_argument("event", type=_text, metavar="EVENT", help="its type, as order.created")
    send.add_argument("payload", metavar="JSON", type=_json, help='as {"order_id":42}')
    send.set_defaults(run=_send)

    listen = commands.add_parser(
        "listen", parents=[remote], help="print what arrives, one JSON object a line"
    )
    listen.add_argument("--user", default="cli", help="as this user (default: cli)")
    listen.add_argument("--tenant", default="default", help="whose user (default: default)")
    listen.add_argument(
        "--channel", type=_text, action="append", default=[], help="subscribe to it; several times"
    )
    listen.set_defaults(run=_listen)
    return parser


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// or https://")
    try:
        parts = urlsplit(text)
        # Both raise ValueError where they make no sense.
        named = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL: {error}") from error
    if not named:
        raise argparse.ArgumentTypeError(f"{text!r} names no host, or port 0")
    return text


def _text(text: str) -> str:
    # What the shell gave in another encoding, Python holds as halves of surrogate pairs.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return text


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(_text(text))
    except RecursionError as error:
        raise argparse.ArgumentTypeError("the JSON is nested too deep") from error
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def _serve(arguments: Arguments, environ: Environment) -> int:
    flags = {
        "server.host": arguments.host,
        "server.port": arguments.port,
        "server.workers": arguments.workers,
    }
    settings = load_settings(
        arguments.config,
        environ,
        warn=_warn,
        overrides={name: text for name, text in flags.items() if text is not None},
    )
    settings = with_credentials(settings)

    from notifyd.app import serve

    def announce(url: str) -> None:
        if not settings.production:
            print(_welcome(settings, url), flush=True)

    return serve(settings, announce=announce)


def _check_config(arguments: Arguments, environ: Environment) -> int:
    settings = load_settings(arguments.config, environ, warn=_warn)

    from notifyd.auth import ApiKeys, TokenVerifier
    from notifyd.channel_rules import ChannelRules

    # Keys and patterns are refused by those who use them.
    TokenVerifier(settings.auth, production=settings.production)
    ApiKeys(settings.auth)
    ChannelRules(settings.channels.rules)
    if "redis" in settings.backends:
        from notifyd.redis_client import RedisAddress

        RedisAddress.parse(settings.redis.url)
    print(f"The settings are fine: {settings.server.mode}, {_own_url(settings)}")
    return 0


def _default_config(_arguments: Arguments, _environ: Environment) -> int:
    sys.stdout.write(default_config())
    return 0


def _migrate(arguments: Arguments, environ: Environment) -> int:
    settings = load_settings(arguments.config, environ, warn=_warn).postgres
    if settings.url is None:
        raise ConfigurationError(
            "postgres.url: is not set, nor is DATABASE_URL; set it, as "
            "postgresql://notifyd@localhost:5432/notifyd"
        )

    from notifyd.postgres import Postgres
    from notifyd.queue.postgres import MIGRATIONS
    from notifyd.resilience import CircuitBreaker

    postgres = Postgres(
        settings.url,
        CircuitBreaker(BreakerSettings()),
        migrations=MIGRATIONS,
        pool_max=1,
        command_timeout_seconds=settings.command_timeout_seconds,
        statement_cache_size=settings.statement_cache_size,
    )

    async def names() -> Sequence[str]:
        await postgres.start()
        try:
            return await (postgres.check() if arguments.check else postgres.migrate())
        finally:
            await postgres.aclose()

    found = asyncio.run(names())
    for name in found:
        print(f"{'missing' if arguments.check else 'applied'}: {name}")
    if found and arguments.check:
        return EXIT_FAILED
    print("The schema is up to date.")
    return 0


def _token(arguments: Arguments, environ: Environment) -> int:
    settings = with_credentials(load_settings(arguments.config, environ, warn=_warn))

    verifier = _verifier(settings)
    token, _ = verifier.mint(
        arguments.user,
        ttl=arguments.ttl,
        roles=arguments.role,
        channels=arguments.channel,
        tenant=arguments.tenant,
    )
    print(token)
    return 0


def _verifier(settings: Settings) -> TokenVerifier:
    from notifyd.auth import TokenVerifier
    from notifyd.tenants import MemoryTenants, Tenants, only_default

    off = only_default()
    # Which tenants were created since is for the server to know.
    any_tenant = msgspec.structs.replace(settings.tenant, auto_create=True)
    tenants = Tenants(
        any_tenant, MemoryTenants(), limits=off.limits(DEFAULT_TENANT), clock=time.time
    )
    return TokenVerifier(settings.auth, production=settings.production, tenants=tenants)


def _send(arguments: Arguments, environ: Environment) -> int:
    settings = _settings_of_client(arguments, environ)
    key = settings.auth.publishing_key
    if key is None:
        raise ConfigurationError(
            "auth.api_key: a key that may publish is needed; set NOTIFYD_AUTH__API_KEY, or run "
            "this where `notifyd serve` was started"
        )

    from notifyd.client import Client, NotifydClientError

    url = arguments.url or _own_url(settings)
    try:
        with Client(url, api_key=key, tenant=arguments.tenant) as client:
            receipt = client.send(
                user=arguments.user,
                channel=arguments.channel,
                broadcast=arguments.broadcast,
                event=arguments.event,
                payload=arguments.payload,
            )
    except NotifydClientError as error:
        _say(f"{url}: {error}")
        return EXIT_FAILED
    known = {name: value for name, value in msgspec.to_builtins(receipt).items() if value}
    print(json.dumps({"outcome": receipt.outcome, "delivered_to": 0} | known, ensure_ascii=False))
    return EXIT_FAILED if receipt.outcome == "failed" else 0


def _listen(arguments: Arguments, environ: Environment) -> int:
    settings = _settings_of_client(arguments, environ)

    from notifyd.client import Client, NotifydClientError

    verifier = _verifier(settings)

    def token() -> str:
        # The claim covers what is asked for, so that rules of `claim` are met too.
        token, _ = verifier.mint(
            arguments.user,
            ttl=DAY,
            channels=arguments.channel or None,
            tenant=arguments.tenant,
        )
        return token

    # `_tell` says what the client would log.
    logging.getLogger("notifyd.client").addHandler(logging.NullHandler())
    url = arguments.url or _own_url(settings)
    try:
        with Client(url, token=token) as client:
            for notification in client.listen(arguments.channel, on_event=_tell):
                print(_line(notification), flush=True)
                notification.ack()
    except NotifydClientError as error:
        _say(f"{url}: {error}")
        return EXIT_FAILED
    _say("the connection was closed because its user opened newer ones")
    return EXIT_FAILED


def _settings_of_client(arguments: Arguments, environ: Environment) -> Settings:
    return with_kept_credentials(load_settings(arguments.config, environ, warn=_warn))


def _line(notification: Notification[None]) -> str:
    metadata = msgspec.to_builtins(notification.metadata)
    told = {
        "id": notification.id,
        "occurred_at": notification.occurred_at,
        "event_type": notification.event_type,
        "payload": notification.payload,
        "metadata": {name: value for name, value in metadata.items() if value},
    }
    return msgspec.json.encode(told).decode()


def _tell(event: Event) -> None:
    """Say on standard error what a person at a terminal wants to know."""
    from notifyd.client import Connected, Disconnected, Gap, Problem, Subscribed

    match event:
        case Connected():
            _say(f"connected as {event.user_id}")
        case Subscribed():
            _say(f"subscribed to {', '.join(event.channels)}")
        case Gap():
            _say(f"some notifications of {event.stream} were missed: {event.reason}")
        case Problem():
            _say(f"{event.code}: {event.message}")
        case Disconnected():
            _say(_disconnection(event))


def _disconnection(event: Disconnected) -> str:
    again = "" if event.retry_in is None else f"; trying again in {event.retry_in:.1f} s"
    return f"disconnected ({event.code} {event.reason}){again}"


def _own_url(settings: Settings) -> str:
    """Where a server with these settings is reached from the same machine."""
    scheme = "http" if settings.server.tls_cert is None else "https"
    host = settings.server.host.strip("[]")
    # An address that stands for all of them is no destination.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- nothing is bound
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.server.port}"


def _welcome(settings: Settings, url: str) -> str:
    """What development prints once it listens: a page to open, and commands to copy."""
    program = _program()
    publisher = settings.auth.publisher
    bound = None if publisher is None else publisher.tenant_id
    tenant = bound or DEFAULT_TENANT
    whose = "" if tenant == DEFAULT_TENANT else f" --tenant {tenant}"
    lines = [
        f"notifyd {__version__}, development",
        "",
        f"  Open     {url}/demo",
        f"  Listen   {program} listen --user alice{whose} --url {url}",
    ]
    if key := settings.auth.publishing_key:
        body = {
            "target": {"type": "user", "value": "alice"},
            "event_type": "order.created",
            "payload": {"order_id": 42},
        }
        needs_tenant = []
        if settings.tenant.enabled and bound is None:
            needs_tenant = [f"             -H 'X-Tenant-ID: {tenant}' \\"]
        lines += [
            f"  Send     curl {url}/api/v1/notifications \\",
            f"             -H 'X-API-Key: {key}' -H 'Content-Type: application/json' \\",
            *needs_tenant,
            f"             -d {shlex.quote(json.dumps(body))}",
        ]
    if settings.auth.jwt_secrets:
        token, _ = _verifier(settings).mint("alice", ttl=DAY, tenant=tenant)
        lines += [
            f"  Token    {token}",
            f"           (alice's, for a day; another: {program} token --user bob{whose})",
        ]
    return "\n".join([*lines, ""])


def _program() -> str:
    """The command as one can type it here: not everybody has it in PATH."""
    called = sys.argv[0]
    if shutil.which("notifyd") or not os.path.isfile(called):
        return "notifyd"
    if os.path.basename(called) == "__main__.py":
        # So Python calls what `python -m notifyd` runs.
        python = os.path.basename(sys.executable)
        in_path = shutil.which(python) == sys.executable
        return f"{python if in_path else shlex.quote(sys.executable)} -m notifyd"
    return shlex.quote(os.path.relpath(called))


def _warn(message: str) -> None:
    _say(f"warning: {message}")


def _say(message: str) -> None:
    print(f"notifyd: {message}", file=sys.stderr, flush=True)
