"""What can be set: a section is a struct, its fields are the options.

The default, the unit, the bounds and the meaning of an option stand here and nowhere else. From
these declarations come the reading of the file and of the environment, the texts of the errors, and
`notifyd default-config` (all in settings.py). To add an option, add a field: nothing else needs to
know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, inspect

from notifyd.identity import Scope

Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA"]
ClaimName = Literal["user_id", "tenant", "roles", "channels", "subscribe"]

HMAC_ALGORITHMS = frozenset({"HS256", "HS384", "HS512"})


def says(meaning: str, *, example: object = None) -> Meta:
    """What an option is for; `example` is what an option without a default may look like."""
    return Meta(description=meaning, examples=None if example is None else [example])


def count(unit: str, least: int = 1, most: int | None = None) -> Meta:
    """Bounds of a whole number, both included, and what it counts."""
    return Meta(ge=least, le=most, extra={"unit": unit})


Text = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0, le=315_360_000, extra={"unit": "seconds"})]
SECRET = Meta(extra={"secret": True})
ADDRESS = Meta(extra={"address": True})
"""A URL that may hold a password."""

Backend = Literal["memory", "redis", "postgres"]

RATE = "^[1-9][0-9]{0,5}/(second|minute|hour|day)$"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some options. Secret ones never show in its repr, and so in no log and no traceback."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(type(self)):
            value = getattr(self, field.name)
            extra = metadata(field.type).extra
            if value and extra.get("secret"):
                text = "***"
            else:
                text = repr(shown_address(value) if value and extra.get("address") else value)
            shown.append(f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"


_HOST = r"(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::[0-9]+)?"
_ADDRESS = re.compile(
    rf"([a-z+]+://)([^@/?#\s]*@)?((?:{_HOST}(?:,{_HOST})*)?(?:/[A-Za-z0-9._~/-]*)?)([?#][^@]*)?"
)


def shown_address(url: str) -> str:
    """A URL as it may be shown: without who connects, by what password, with which options.

    Whatever is not quite a URL, as with a password that was not percent-encoded, is shown not at
    all.
    """
    found = _ADDRESS.fullmatch(url)
    if found is None:
        return "***"
    scheme, whom, where, options = found.groups()
    return f"{scheme}{'***@' if whom else ''}{where}{'?***' if options else ''}"


class ServerSettings(Section, frozen=True, kw_only=True):
    """Where the server listens and how it ends."""

    host: Annotated[Text, says("Address to listen on. Development listens on loopback only.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=0, le=65535), says("Port to listen on; 0 takes a free one.")] = (
        8081
    )
    mode: Annotated[
        Literal["development", "production"],
        says(
            "`development` needs no other setting; `production` refuses to start half configured "
            "and tells callers no internals."
        ),
    ] = "development"
    workers: Annotated[
        int,
        count("processes", 1, 256),
        says(
            "Processes on one port, each a node of the cluster: more than one needs "
            "cluster.enabled, and a system with SO_REUSEPORT."
        ),
    ] = 1
    tls_cert: Annotated[
        Text | None,
        says("PEM file of the certificate chain; with tls_key.", example="/etc/notifyd/tls.crt"),
    ] = None
    tls_key: Annotated[
        Text | None,
        says("PEM file of the private key; with tls_cert.", example="/etc/notifyd/tls.key"),
    ] = None
    forwarded_allow_ips: Annotated[
        tuple[str, ...],
        says(
            "Addresses or networks of proxies whose X-Forwarded-For is believed; "
            '["*"] believes anybody.'
        ),
    ] = ("127.0.0.1", "::1")
    shutdown_grace_seconds: Annotated[
        float,
        Meta(ge=0, le=86_400, extra={"unit": "seconds"}),
        says("How long requests and connections may take to end at shutdown."),
    ] = 30
    max_sockets: Annotated[
        int,
        count("sockets"),
        says("Open sockets at most, handshakes and HTTP requests included."),
    ] = 110_000


class ApiKeySettings(Section, frozen=True, kw_only=True):
    """A backend's key: `key` itself, or `sha256`, the hex digest of its UTF-8 bytes."""

    name: Annotated[str, Meta(min_length=1, max_length=128), says("What logs call it; unique.")]
    key: Annotated[Text | None, SECRET, says("The key itself.")] = None
    sha256: Annotated[
        Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None,
        says("The SHA-256 digest of the key in hex, instead of it."),
    ] = None
    scopes: Annotated[
        tuple[Scope, ...],
        Meta(min_length=1),
        says("`read`, `publish`, `admin` (which includes both)."),
    ] = ("admin",)
    tenant_id: Annotated[Text | None, says("The tenant it is bound to.")] = None
    expires_at: Annotated[
        Annotated[datetime, Meta(tz=True)] | None, says("When it ends, with its time zone.")
    ] = None
    rate: Annotated[
        Annotated[str, Meta(pattern=RATE)] | None,
        says("A rate of its own, as 1000/hour; needs ratelimit.enabled."),
    ] = None


class AuthSettings(Section, frozen=True, kw_only=True):
    """Who users and backends are.

    Once made, `jwt_secrets` holds `jwt_secret` too (as the newest), `api_keys` holds `api_key` (as
    `default`, with every scope), and `jwt_algorithms` holds what a JWKS URL implies.
    """

    jwt_secret: Annotated[
        Text | None,
        SECRET,
        says(
            "Secret of HS256 (32 bytes at least), HS384 (48) or HS512 (64) tokens; development "
            "makes one.",
            example="…",
        ),
    ] = None
    jwt_secrets: Annotated[
        tuple[Text, ...],
        SECRET,
        says("Several secrets, for changing them; the first is the newest.", example=["…", "…"]),
    ] = ()
    jwt_algorithms: Annotated[
        tuple[Algorithm, ...],
        Meta(min_length=1),
        says(
            "Accepted algorithms, each with its own kind of key: HS256, HS384, HS512, RS256, "
            "ES256, EdDSA."
        ),
    ] = ("HS256",)
    jwt_public_key: Annotated[
        Text | None,
        says(
            "Public key of RS256, ES256 or EdDSA tokens, PEM text; easiest as "
            "NOTIFYD_AUTH__JWT_PUBLIC_KEY_FILE.",
            example="-----BEGIN PUBLIC KEY-----…",
        ),
    ] = None
    jwks_url: Annotated[
        Text | None,
        says(
            "Where the issuer publishes its keys; implies RS256 and ES256. https in production.",
            example="https://issuer.example.com/.well-known/jwks.json",
        ),
    ] = None
    jwt_issuer: Annotated[
        Text | None,
        says("The `iss` that tokens must have; unset: any.", example="https://issuer.example.com/"),
    ] = None
    jwt_audience: Annotated[
        Text | None, says("The `aud` that tokens must name; unset: any.", example="notifyd")
    ] = None
    leeway_seconds: Annotated[
        float,
        Meta(ge=0, le=600, extra={"unit": "seconds"}),
        says("How far clocks may disagree: for `exp` and `nbf`, and for closing at expiry."),
    ] = 30
    claims: Annotated[
        dict[ClaimName, Text],
        says(
            "Other names of claims, with dots into nested ones; of user_id, tenant, roles, "
            "channels, subscribe.",
            example={"tenant": "app_metadata.org_id"},
        ),
    ] = {}
    cookie_name: Annotated[
        Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")] | None,
        says(
            "Cookie that may carry the token; then an allowed Origin or Sec-Fetch-Site: "
            "same-origin is required. Unset: none.",
            example="session",
        ),
    ] = None
    token_cache_size: Annotated[int, count("tokens", 0), says("Verified tokens remembered.")] = (
        50_000
    )
    api_keys: Annotated[
        tuple[ApiKeySettings, ...],
        says(
            "Keys of backends: name, key or sha256 (hex), scopes (read, publish, admin; admin if "
            "not given), tenant_id (with tenants: the one it is bound to), expires_at, rate (as "
            "1000/hour, instead of that of ratelimit).",
            example=[{"name": "shop", "key": "…", "scopes": ["publish"]}],
        ),
    ] = ()
    api_key: Annotated[
        Text | None,
        SECRET,
        says(
            "One key with every scope, instead of api_keys; 16 characters at least in production; "
            "development makes one.",
            example="…",
        ),
    ] = None

    def __post_init__(self) -> None:
        fold = msgspec.structs.force_setattr
        if self.jwt_secret and self.jwt_secret not in self.jwt_secrets:
            fold(self, "jwt_secrets", (self.jwt_secret, *self.jwt_secrets))
        if self.api_key and all(known.key != self.api_key for known in self.api_keys):
            single = ApiKeySettings(name="default", key=self.api_key)
            fold(self, "api_keys", (*self.api_keys, single))
        if self.jwks_url and HMAC_ALGORITHMS.issuperset(self.jwt_algorithms):
            fold(self, "jwt_algorithms", (*self.jwt_algorithms, "RS256", "ES256"))

    @property
    def publisher(self) -> ApiKeySettings | None:
        """The first key that may publish and is known in full, not by its digest alone."""
        for entry in self.api_keys:
            if entry.key is not None and {"publish", "admin"} & set(entry.scopes):
                return entry
        return None

    @property
    def publishing_key(self) -> str | None:
        """That key itself."""
        return None if self.publisher is None else self.publisher.key


class WebSocketSettings(Section, frozen=True, kw_only=True):
    """Limits and liveness of connections, those over SSE too."""

    heartbeat_interval: Annotated[
        Seconds, says("How often a connection gets a heartbeat (and a WebSocket a Ping).")
    ] = 30
    idle_timeout: Annotated[
        Seconds, says("A connection that was not heard for so long is closed with 4012.")
    ] = 120
    max_connections: Annotated[
        int, count("connections"), says("Connections at most, WebSocket and SSE together.")
    ] = 100_000
    max_connections_per_user: Annotated[
        int, count("connections"), says("Connections of one user.")
    ] = 20
    on_user_limit: Annotated[
        Literal["evict", "refuse"],
        says(
            "Beyond that: `evict` gives up the one heard from longest ago (4009), `refuse` turns "
            "the new one away."
        ),
    ] = "evict"
    max_subscriptions_per_connection: Annotated[
        int, count("channels"), says("Channels of one connection.")
    ] = 50
    max_message_bytes: Annotated[
        int,
        count("bytes", 1024, 16_777_216),
        says("A message from a client; a larger one closes with 1009."),
    ] = 65_536
    outbox_max_bytes: Annotated[
        int,
        count("bytes", 131_072),
        says("What may wait for one connection; beyond it, it is closed with 4008."),
    ] = 1_048_576
    outbox_max_messages: Annotated[
        int, count("messages"), says("The same, counted in messages.")
    ] = 1000
    outbox_total_bytes: Annotated[
        int,
        count("bytes", 1_048_576),
        says(
            "What may wait for all connections; beyond it the one with the most is closed with "
            "4008."
        ),
    ] = 1_073_741_824


class ChannelRule(Section, frozen=True, kw_only=True):
    """Who may subscribe to the channels of a pattern."""

    subscribe: Annotated[
        Literal["any", "claim", "none"],
        says(
            "`any` user, those whose token's `channels` claim covers it, or `none`; a token with "
            "that claim is held to it either way."
        ),
    ]


class ChannelSettings(Section, frozen=True, kw_only=True):
    """Rules of channels, by pattern."""

    rules: Annotated[
        dict[str, ChannelRule],
        says(
            "Pattern to rule: `*` stands for any run of characters, {user_id} and {tenant_id} for "
            "the subscriber's own; the longest pattern wins, and what matches none is refused. "
            "subscribe is `any`, `claim` (the token's `channels` claim must cover it) or `none`. "
            'Development without rules has "*" = any; production needs at least one.',
            example={"order:*": {"subscribe": "claim"}},
        ),
    ] = {}


class QueueSettings(Section, frozen=True, kw_only=True):
    """What is kept for users until they confirm it."""

    enabled: Annotated[
        bool, says("Whether notifications to users are kept until they are confirmed.")
    ] = True
    backend: Annotated[
        Backend,
        says(
            "Where: in the `memory` of this process, until it ends; in Redis; or in PostgreSQL. "
            "Templates and idempotency keys are kept there too."
        ),
    ] = "memory"
    mode: Annotated[
        Literal["offline", "always"],
        says(
            "`offline` stores what nobody took, and a crash loses what was sent and not yet "
            "confirmed; `always` stores before it sends, and sends nothing to a user while the "
            "store is down."
        ),
    ] = "offline"
    max_size_per_user: Annotated[
        int,
        count("notifications"),
        says("Kept for one user; beyond it the lowest priority, the oldest first, is given up."),
    ] = 1000
    max_messages: Annotated[
        int,
        count("notifications"),
        says("Kept in all, for all users together, where that is in memory."),
    ] = 1_000_000
    message_ttl_seconds: Annotated[
        Seconds, says("How long one is kept; a notification's own ttl may be shorter.")
    ] = 604_800
    cleanup_interval_seconds: Annotated[Seconds, says("How often expired ones are removed.")] = 300


class AckSettings(Section, frozen=True, kw_only=True):
    """The ledger of who was expected to confirm, and who has."""

    enabled: Annotated[bool, says("Whether acks are recorded.")] = True
    backend: Annotated[
        Backend,
        says("Where: in the `memory` of this process, until it ends; in Redis; or in PostgreSQL."),
    ] = "memory"
    timeout_seconds: Annotated[
        Seconds,
        says("An ack that did not come for so long counts as expired; a later one still settles."),
    ] = 30
    max_pending: Annotated[
        int,
        count("deliveries"),
        says(
            "Held until confirmed, at most; beyond it the oldest move to the queue. The ledger "
            "keeps as many notifications and recipients for an hour; beyond it the oldest are "
            "forgotten, and who had not confirmed counts as expired."
        ),
    ] = 200_000
    cleanup_interval_seconds: Annotated[Seconds, says("How often expired ones are counted.")] = 60


class IdempotencySettings(Section, frozen=True, kw_only=True):
    """Answers remembered, so that a repeated call delivers nothing twice."""

    window_seconds: Annotated[Seconds, says("How long a key is remembered.")] = 86_400
    max_keys: Annotated[
        int,
        count("keys"),
        says("How many recent keys are remembered in the memory of this process."),
    ] = 100_000


class RateLimitSettings(Section, frozen=True, kw_only=True):
    """How often one caller may call, connect and speak."""

    enabled: Annotated[bool, says("Whether there are any limits of this kind.")] = False
    backend: Annotated[
        Literal["local", "redis"],
        says(
            "Who counts: each node by itself (`local`), or all nodes together (`redis`), but for "
            "messages, which belong to one connection."
        ),
    ] = "local"
    http_requests_per_second: Annotated[
        int,
        count("requests", 1, 1_000_000),
        says(
            "Requests of one API key, unless it has a rate of its own, or of one address where "
            "there is no key. Health checks are not counted."
        ),
    ] = 100
    http_burst: Annotated[
        int, count("requests", 1, 1_000_000), says("So many at once, after a pause.")
    ] = 200
    ws_connections_per_minute: Annotated[
        int,
        count("connections", 1, 1_000_000),
        says("Handshakes from one address, WebSocket and SSE; so many at once, after a pause."),
    ] = 60
    ws_messages_per_second: Annotated[
        int,
        count("messages", 1, 1_000_000),
        says("Messages of one WebSocket, without acks of what was delivered to it."),
    ] = 50
    ws_messages_burst: Annotated[
        int, count("messages", 1, 1_000_000), says("So many at once, after a pause.")
    ] = 200


class TenantOverride(Section, frozen=True, kw_only=True):
    """Limits of one tenant; what is not given is as for the others."""

    max_connections: Annotated[
        Annotated[int, count("connections")] | None, says("Its connections.")
    ] = None
    max_connections_per_user: Annotated[
        Annotated[int, count("connections")] | None, says("Connections of one of its users.")
    ] = None
    max_subscriptions_per_connection: Annotated[
        Annotated[int, count("channels")] | None, says("Channels of one of its connections.")
    ] = None


class TenantSettings(Section, frozen=True, kw_only=True):
    """Tenants see nothing of one another; their limits stand in place of the websocket section's.

    While they are on, what tenants have in common is `websocket.max_connections`, for all of them
    together.
    """

    enabled: Annotated[bool, says("Whether there are tenants; off, there is `default` alone.")] = (
        False
    )
    auto_create: Annotated[
        bool,
        says(
            "Whether a tenant exists as soon as a token or an X-Tenant-ID names it; else only "
            "those do that are named in overrides, have an API key, or were given limits by PUT "
            "/api/v1/tenants/{id}/limits."
        ),
    ] = True
    max_connections: Annotated[
        int, count("connections"), says("Connections of one tenant at all nodes together.")
    ] = 1000
    max_connections_per_user: Annotated[
        int, count("connections"), says("Connections of one user at each node.")
    ] = 20
    max_subscriptions_per_connection: Annotated[
        int, count("channels"), says("Channels of one connection.")
    ] = 50
    overrides: Annotated[
        dict[str, TenantOverride],
        says(
            "Tenant to limits of its own, as [tenant.overrides.acme]; what was set at run time "
            "stands over them.",
            example={"acme": {"max_connections": 5000}},
        ),
    ] = {}


class RedisSettings(Section, frozen=True, kw_only=True):
    """Redis 6.2 or newer; used where a backend says so, and where notifications come from it."""

    url: Annotated[
        Text,
        ADDRESS,
        says(
            "Where it is: redis://[[user:]password@]host[:port][/database], rediss:// with TLS, "
            "unix:///path, or redis+sentinel://host:port,host:port/master[/database], with "
            "?sentinel_password= behind it where sentinels have one. The variable REDIS_URL is "
            "read where this is unset; with a password easiest as NOTIFYD_REDIS__URL_FILE."
        ),
    ] = "redis://localhost:6379"
    key_prefix: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")],
        says("What every key begins with: two servers with different ones share a Redis."),
    ] = "notifyd"
    command_timeout_seconds: Annotated[
        Seconds, says("An answer that takes longer is a failure.")
    ] = 2
    trigger_enabled: Annotated[
        bool,
        says(
            "Whether what services publish to Redis channels is sent as notifications. Who may "
            "publish there may send to anybody."
        ),
    ] = False
    trigger_patterns: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...],
        says(
            "Channels that are subscribed to, as PSUBSCRIBE takes them. Of those that end in "
            ":user:*, :channel:*, :broadcast, :users or :channels, the name says the type, and a "
            "single target."
        ),
    ] = ("notification:user:*", "notification:broadcast", "notification:channel:*")
    stream_key: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None,
        says(
            "A stream that is read too, and loses nothing: its consumer group is named "
            "after key_prefix, and what cannot be used goes to a stream of this name with :dead "
            "behind it.",
            example="notifications",
        ),
    ] = None

    @property
    def has_sources(self) -> bool:
        """Whether notifications come from there."""
        return self.trigger_enabled or self.stream_key is not None


class ClusterSettings(Section, frozen=True, kw_only=True):
    """Several nodes that are one server to their users."""

    enabled: Annotated[
        bool,
        says(
            "Whether this is one of several nodes, which find each other in Redis. The queue must "
            "be one that they share (redis or postgres), or switched off."
        ),
    ] = False
    node_id: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None,
        says("What this node is called; unset: by its machine and process.", example="notifyd-1"),
    ] = None
    presence_ttl_seconds: Annotated[
        Seconds,
        says(
            "How long the users of a node that disappeared without notice still count as "
            "connected; more than websocket.heartbeat_interval."
        ),
    ] = 60


class PostgresSettings(Section, frozen=True, kw_only=True):
    """PostgreSQL 13 or newer; used where a backend says so."""

    url: Annotated[
        Text | None,
        ADDRESS,
        says(
            "Where it is. The variable DATABASE_URL is read where this is unset; with a password "
            "easiest as NOTIFYD_POSTGRES__URL_FILE.",
            example="postgresql://notifyd@localhost:5432/notifyd",
        ),
    ] = None
    pool_min: Annotated[int, count("connections", 0, 1000), says("Connections kept open.")] = 1
    pool_max: Annotated[int, count("connections", 1, 1000), says("Connections at most.")] = 10
    command_timeout_seconds: Annotated[
        Seconds, says("A transaction that takes longer is a failure.")
    ] = 5
    statement_cache_size: Annotated[
        int,
        count("statements", 0, 10_000),
        says("Prepared statements kept on a connection; 0 behind a transaction pooler."),
    ] = 100
    migrate_on_start: Annotated[
        bool,
        says(
            "Whether a start brings the schema up to date; else it is refused until "
            "`notifyd migrate` was run."
        ),
    ] = True


class BreakerSettings(Section, frozen=True, kw_only=True):
    """When Redis or PostgreSQL counts as down, each by itself, and how often it is tried then."""

    failure_threshold: Annotated[
        int,
        count("failures"),
        says("Calls that must fail one after the other to open the breaker."),
    ] = 5
    success_threshold: Annotated[
        int, count("successes"), says("Probes that must succeed to close it again.")
    ] = 2
    reset_timeout_seconds: Annotated[Seconds, says("Upper limit of the pause between probes.")] = 30
    backoff_initial_ms: Annotated[
        int,
        count("milliseconds", 1, 3_600_000),
        says("The first pause before a probe, at most; each next one may be twice as long."),
    ] = 100
    backoff_max_ms: Annotated[
        int, count("milliseconds", 1, 3_600_000), says("Upper limit of the growth of that pause.")
    ] = 30_000


class CorsSettings(Section, frozen=True, kw_only=True):
    """Which pages may connect."""

    origins: Annotated[
        tuple[str, ...],
        says(
            "Origins of pages that may connect and call, exactly as browsers send them. "
            "Development also allows localhost on any port; production needs at least one.",
            example=["https://app.example.com"],
        ),
    ] = ()


class MetricsSettings(Section, frozen=True, kw_only=True):
    """Prometheus metrics."""

    enabled: Annotated[bool, says("Whether GET /metrics answers.")] = True
    public: Annotated[bool, says("Whether it answers without an API key in production.")] = False


class LogSettings(Section, frozen=True, kw_only=True):
    """The server's log."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        says("The least severe entries that are written."),
    ] = "info"
    format: Annotated[
        Literal["console", "json"],
        says("`console` for people, `json` (one object a line) for machines."),
    ] = "console"


DEVELOPMENT_CHANNELS = ChannelSettings(rules={"*": ChannelRule(subscribe="any")})


class Settings(Section, frozen=True, kw_only=True):
    """All of it. Development without channel rules gets one that lets anybody subscribe."""

    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    websocket: WebSocketSettings = WebSocketSettings()
    channels: ChannelSettings = ChannelSettings()
    queue: QueueSettings = QueueSettings()
    ack: AckSettings = AckSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    ratelimit: RateLimitSettings = RateLimitSettings()
    tenant: TenantSettings = TenantSettings()
    redis: RedisSettings = RedisSettings()
    breaker: BreakerSettings = BreakerSettings()
    postgres: PostgresSettings = PostgresSettings()
    cluster: ClusterSettings = ClusterSettings()
    cors: CorsSettings = CorsSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    def __post_init__(self) -> None:
        if not self.production and not self.channels.rules:
            msgspec.structs.force_setattr(self, "channels", DEVELOPMENT_CHANNELS)
        elif self.production and self.channels is DEVELOPMENT_CHANNELS:
            # Made from development settings by `replace`: production never inherits that rule.
            msgspec.structs.force_setattr(self, "channels", ChannelSettings())

    @property
    def production(self) -> bool:
        """Whether this is `server.mode = "production"`."""
        return self.server.mode == "production"

    @property
    def backends(self) -> frozenset[Backend]:
        """The backends that something is kept in, or comes from, or that nodes find each other
        by."""
        chosen: set[Backend] = set()
        if self.queue.enabled:
            chosen.add(self.queue.backend)
        if self.ack.enabled:
            chosen.add(self.ack.backend)
        limits_in_redis = self.ratelimit.enabled and self.ratelimit.backend == "redis"
        if limits_in_redis or self.redis.has_sources or self.cluster.enabled:
            chosen.add("redis")
        return frozenset(chosen)


class Metadata(msgspec.Struct, frozen=True):
    """What is said about a field beside its type."""

    meaning: str = ""
    example: object = None
    extra: dict[str, Any] = {}


class Option(msgspec.Struct, frozen=True):
    """One option as texts need it.

    `default` is a TOML value, None where it is unset; `example` stands for one that is unset or
    empty; `expects` says what it takes ("a whole number from 0 to 65535"). An `address` is a URL,
    in which there may be a password.
    """

    section: str
    key: str
    default: object
    unit: str | None
    meaning: str
    example: object
    expects: str
    secret: bool
    address: bool
    kind: inspect.Type
    annotation: object

    @property
    def name(self) -> str:
        """`section.key`, as errors call it."""
        return f"{self.section}.{self.key}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"NOTIFYD_{self.section}__{self.key}".upper()


def options() -> Iterator[Option]:
    """Every option, in the order of the sections."""
    for section, struct in sections().items():
        hints = get_type_hints(struct, include_extras=True)
        for field in fields(struct):
            said = metadata(field.type)
            yield Option(
                section=section,
                key=field.name,
                default=_default(field),
                unit=said.extra.get("unit"),
                meaning=said.meaning,
                example=said.example,
                expects=expectation(field.type, hints[field.name]),
                secret=bool(said.extra.get("secret")),
                address=bool(said.extra.get("address")),
                kind=field.type,
                annotation=hints[field.name],
            )


def sections() -> dict[str, type[Section]]:
    """The struct of each section, in the order of the documentation."""
    return get_type_hints(Settings)


def fields(struct: type[Section]) -> tuple[inspect.Field, ...]:
    """The fields of a section, with types that can be looked into."""
    kind = bare(inspect.type_info(struct))
    return kind.fields if isinstance(kind, inspect.StructType) else ()


def metadata(kind: inspect.Type) -> Metadata:
    """What a field's annotation says beside its type."""
    if not isinstance(kind, inspect.Metadata):
        return Metadata()
    schema = kind.extra_json_schema or {}
    examples = schema.get("examples") or [None]
    return Metadata(schema.get("description", ""), examples[0], kind.extra or {})


def bare(kind: inspect.Type) -> inspect.Type:
    """The type itself: without what is said about it, without `| None`."""
    if isinstance(kind, inspect.Metadata):
        return bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return bare(next(one for one in kind.types if not isinstance(one, inspect.NoneType)))
    return kind


def _default(field: inspect.Field) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return list(field.default) if isinstance(field.default, tuple) else field.default


def expectation(kind: inspect.Type, annotation: object = None) -> str:
    """What a value has to be, in words; the annotation gives choices their order."""
    match bare(kind):
        case inspect.IntType() as number:
            return f"a whole number {_bounds(number)}"
        case inspect.FloatType() as number:
            return f"a number {_bounds(number)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            choices = get_args(get_args(annotation)[0]) if annotation else values
            return " or ".join(f'"{choice}"' for choice in choices)
        case inspect.VarTupleType(min_length=least):
            return "a list that is not empty" if least else "a list"
        case inspect.DictType() | inspect.StructType():
            return "a table"
        case inspect.StrType(pattern=pattern) if pattern is not None:
            return f"a text that matches {pattern}"
        case inspect.DateTimeType():
            return "a date and time with its zone, as 2030-01-01T00:00:00Z"
        case _:
            return "a text that is not empty"


def _bounds(number: inspect.IntType | inspect.FloatType) -> str:
    most = "" if number.le is None else f"{number.le:.0f}"
    if number.gt is not None:
        return f"over {number.gt:.0f}, at most {most}"
    least = f"{number.ge:.0f}"
    return f"from {least} to {most}" if most else f"of at least {least}"
