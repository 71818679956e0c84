from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyd.errors import ConfigurationError
from notifyd.options import shown_address
from notifyd.settings import (
    AckSettings,
    ApiKeySettings,
    AuthSettings,
    ChannelRule,
    PostgresSettings,
    QueueSettings,
    RateLimitSettings,
    RedisSettings,
    ServerSettings,
    Settings,
    default_config,
    load_settings,
    options,
    problems,
)

CONFIG = Path(__file__).parents[2] / "config"
PRODUCTION = {
    "NOTIFYD_SERVER__MODE": "production",
    "NOTIFYD_AUTH__JWT_SECRET": "s" * 32,
    "NOTIFYD_AUTH__API_KEY": "k" * 16,
    "NOTIFYD_CORS__ORIGINS": '["https://app.example.com"]',
    "NOTIFYD_CHANNELS__RULES": '{"news": {"subscribe": "any"}}',
}
PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nMC\n-----END PUBLIC KEY-----"

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a settings file and says where it is."""

    def write(text: str) -> str:
        path = tmp_path / "notifyd.toml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def refusal(environ: dict[str, str], path: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(path, environ)
    return str(caught.value)


class TestSources:
    def test_development_needs_nothing(self) -> None:
        settings = load_settings(None, {})
        assert settings == Settings()
        assert not settings.production
        assert settings.server.host == "127.0.0.1"
        assert settings.channels.rules == {"*": ChannelRule(subscribe="any")}

    def test_a_file_named_on_the_command_line_wins_over_the_variable(self, write: Write) -> None:
        path = write("[server]\nport = 9000")
        assert load_settings(path, {"NOTIFYD_CONFIG": "/nowhere.toml"}).server.port == 9000
        assert load_settings(None, {"NOTIFYD_CONFIG": path}).server.port == 9000

    def test_the_environment_wins_over_the_file(self, write: Write) -> None:
        path = write("[server]\nport = 9000\nhost = '127.0.0.2'")
        settings = load_settings(path, {"NOTIFYD_SERVER__PORT": "9001"})
        assert settings.server.port == 9001
        assert settings.server.host == "127.0.0.2"

    def test_the_command_line_wins_over_the_environment(self) -> None:
        settings = load_settings(
            None, {"NOTIFYD_SERVER__PORT": "9001"}, overrides={"server.port": "9002"}
        )
        assert settings.server.port == 9002

    def test_a_wrong_flag_is_called_by_its_name(self) -> None:
        with pytest.raises(ConfigurationError, match=r"server\.port.*from --port"):
            load_settings(None, {}, overrides={"server.port": "no"})

    def test_an_empty_variable_counts_as_unset(self) -> None:
        environ = {"NOTIFYD_AUTH__JWT_ISSUER": "", "NOTIFYD_AUTH__JWT_SECRET_FILE": ""}
        assert load_settings(None, environ) == Settings()

    def test_texts_numbers_and_booleans(self) -> None:
        settings = load_settings(
            None,
            {
                "NOTIFYD_WEBSOCKET__HEARTBEAT_INTERVAL": "0.5",
                "NOTIFYD_WEBSOCKET__MAX_CONNECTIONS_PER_USER": "3",
                "NOTIFYD_METRICS__PUBLIC": "true",
                "NOTIFYD_QUEUE__ENABLED": "0",
                "NOTIFYD_AUTH__JWT_ISSUER": "123",
            },
        )
        assert settings.websocket.heartbeat_interval == 0.5
        assert settings.websocket.max_connections_per_user == 3
        assert settings.metrics.public is True
        assert settings.queue.enabled is False
        assert settings.auth.jwt_issuer == "123"

    def test_lists_and_tables_are_json(self) -> None:
        settings = load_settings(
            None,
            {
                "NOTIFYD_CORS__ORIGINS": '["https://a.example.com", "https://b.example.com:8443"]',
                "NOTIFYD_CHANNELS__RULES": '{"order:*": {"subscribe": "claim"}}',
                "NOTIFYD_AUTH__CLAIMS": '{"tenant": "app_metadata.org_id"}',
                "NOTIFYD_AUTH__API_KEYS": json.dumps(
                    [
                        {
                            "name": "shop",
                            "sha256": "0" * 64,
                            "scopes": ["publish", "read"],
                            "expires_at": "2030-01-01T00:00:00Z",
                        }
                    ]
                ),
            },
        )
        assert settings.cors.origins == ("https://a.example.com", "https://b.example.com:8443")
        assert settings.channels.rules == {"order:*": ChannelRule(subscribe="claim")}
        assert settings.auth.claims == {"tenant": "app_metadata.org_id"}
        assert settings.auth.api_keys == (
            ApiKeySettings(
                name="shop",
                sha256="0" * 64,
                scopes=("publish", "read"),
                expires_at=datetime(2030, 1, 1, tzinfo=UTC),
            ),
        )

    def test_tables_in_the_file(self, write: Write) -> None:
        settings = load_settings(
            write(
                """
                [[auth.api_keys]]
                name = "shop"
                key = "a-key-of-the-shop"
                expires_at = 2030-01-01T00:00:00Z

                [channels.rules."inbox:{user_id}"]
                subscribe = "any"
                """
            ),
            {},
        )
        assert settings.auth.api_keys[0].key == "a-key-of-the-shop"
        assert settings.auth.api_keys[0].expires_at == datetime(2030, 1, 1, tzinfo=UTC)
        assert settings.channels.rules == {"inbox:{user_id}": ChannelRule(subscribe="any")}

    @pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
    def test_a_value_from_a_file(self, tmp_path: Path, ending: str) -> None:
        (tmp_path / "secret").write_bytes(b"s" * 32 + ending.encode())
        settings = load_settings(None, {"NOTIFYD_AUTH__JWT_SECRET_FILE": str(tmp_path / "secret")})
        assert settings.auth.jwt_secrets == ("s" * 32,)

    def test_only_one_trailing_newline_is_stripped(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text(f"{PUBLIC_KEY}\n\n", "utf-8")
        settings = load_settings(
            None,
            {
                "NOTIFYD_AUTH__JWT_PUBLIC_KEY_FILE": str(tmp_path / "key"),
                "NOTIFYD_AUTH__JWT_ALGORITHMS": '["EdDSA"]',
            },
        )
        assert settings.auth.jwt_public_key == f"{PUBLIC_KEY}\n"

    @given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5))
    def test_variables_of_others_change_nothing(self, environ: dict[str, str]) -> None:
        ours = ("NOTIFYD_", "REDIS_URL", "DATABASE_URL")
        theirs = {name: text for name, text in environ.items() if not name.startswith(ours)}
        assert load_settings(None, theirs) == Settings()


class TestRefusals:
    def test_an_unknown_variable_is_named_with_the_nearest_known_one(self) -> None:
        message = refusal({"NOTIFYD_SERVER__PROT": "1"})
        assert "NOTIFYD_SERVER__PROT" in message
        assert "NOTIFYD_SERVER__PORT (server.port)" in message

    @pytest.mark.parametrize(
        "variable",
        [
            "NOTIFYD__SERVER__PORT",
            "NOTIFYD_CHANNELS__RULES__NEWS",
        ],
    )
    def test_what_does_not_exist_yet_is_unknown(self, variable: str) -> None:
        assert f"{variable}: unknown variable" in refusal({variable: "1"})

    @pytest.mark.parametrize(
        ("text", "named", "nearest"),
        [
            ("[server]\nprot = 1", "server.prot", "server.port"),
            ("[servers]\nport = 1", "servers", "[server]"),
            ("port = 1", "port", "server.port"),
            ("[websocket]\nport = 1", "websocket.port", "server.port"),
            ("[queue]\nmood = 'always'", "queue.mood", "queue.mode"),
            ("[[auth.api_keys]]\nname='a'\nkay='b'", "auth.api_keys[0].kay", "key"),
            (
                "[channels.rules.news]\nsubcribe = 'any'",
                'channels.rules."news".subcribe',
                "subscribe",
            ),
        ],
    )
    def test_an_unknown_key_is_named_with_the_nearest_known_one(
        self, write: Write, text: str, named: str, nearest: str
    ) -> None:
        path = write(text)
        message = refusal({}, path)
        assert message.startswith(f"{named}: unknown")
        assert f"nearest known one is {nearest}" in message
        assert path in message

    def test_a_section_that_is_no_table(self, write: Write) -> None:
        assert "write [server]" in refusal({}, write("server = 1"))

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            ({"NOTIFYD_SERVER__PORT": "abc"}, "a whole number from 0 to 65535, got 'abc'"),
            ({"NOTIFYD_SERVER__PORT": "65536"}, "a whole number from 0 to 65535, got '65536'"),
            ({"NOTIFYD_LOG__LEVEL": "loud"}, '"debug" or "info" or "warning" or "error"'),
            ({"NOTIFYD_METRICS__PUBLIC": "perhaps"}, "expected true or false"),
            ({"NOTIFYD_WEBSOCKET__IDLE_TIMEOUT": "0"}, "a number over 0"),
            ({"NOTIFYD_WEBSOCKET__IDLE_TIMEOUT": "inf"}, "a number over 0"),
            ({"NOTIFYD_WEBSOCKET__IDLE_TIMEOUT": "nan"}, "a number over 0"),
            (
                {"NOTIFYD_QUEUE__BACKEND": "mysql"},
                'expected "memory" or "redis" or "postgres", got \'mysql\'',
            ),
            ({"NOTIFYD_QUEUE__MODE": "never"}, 'expected "offline" or "always", got \'never\''),
            (
                {"NOTIFYD_REDIS__KEY_PREFIX": "{a}"},
                "redis.key_prefix: expected a text that matches",
            ),
            ({"NOTIFYD_BREAKER__FAILURE_THRESHOLD": "0"}, "a whole number of at least 1, got '0'"),
            ({"NOTIFYD_CORS__ORIGINS": "https://a.example.com"}, 'JSON, such as ["…"]'),
            ({"NOTIFYD_CHANNELS__RULES": "news"}, "JSON, such as {…}"),
            ({"NOTIFYD_CORS__ORIGINS": "{}"}, "cors.origins: expected a list"),
            ({"NOTIFYD_CORS__ORIGINS": "[1]"}, "cors.origins[0]: expected a text"),
            ({"NOTIFYD_AUTH__JWT_ALGORITHMS": "[]"}, "expected a list that is not empty"),
            ({"NOTIFYD_AUTH__CLAIMS": '{"x": "y"}'}, "auth.claims: expected as keys "),
            ({"NOTIFYD_AUTH__CLAIMS": '{"roles": ""}'}, "auth.claims: expected a text"),
            ({"NOTIFYD_CHANNELS__RULES": '{"news": 1}'}, "channels.rules: expected a table"),
            ({"NOTIFYD_AUTH__COOKIE_NAME": "a b"}, "auth.cookie_name: expected a text"),
        ],
    )
    def test_a_wrong_value_is_named_with_what_is_expected(
        self, environ: dict[str, str], message: str
    ) -> None:
        found = refusal(environ)
        assert message in found
        assert f"from {next(iter(environ))}" in found

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[server]\nport = '8081'", "server.port: expected a whole number"),
            ("[server]\nport = true", "server.port: expected a whole number"),
            ("[websocket]\nidle_timeout = inf", "websocket.idle_timeout: expected a number"),
            ("[[auth.api_keys]]\nkey = 'k'", "auth.api_keys[0]: object missing required field"),
            (
                "[[auth.api_keys]]\nname = 'a'\nscopes = ['write']",
                'auth.api_keys[0].scopes[0]: expected "admin" or "publish" or "read"',
            ),
            (
                "[[auth.api_keys]]\nname = 'a'\nkey = 'k'\nexpires_at = 2030-01-01T00:00:00",
                "auth.api_keys[0].expires_at: expected a date and time with its zone",
            ),
            (
                "[channels.rules.news]\nsubscribe = 'all'",
                'channels.rules.subscribe: expected "any" or "claim" or "none"',
            ),
        ],
    )
    def test_a_wrong_value_in_the_file(self, write: Write, text: str, message: str) -> None:
        path = write(text)
        found = refusal({}, path)
        assert found.lower().startswith(message.lower())
        assert path in found

    def test_everything_wrong_is_said_at_once(self, write: Write) -> None:
        found = refusal(
            {"NOTIFYD_SERVER__PROT": "1", "NOTIFYD_LOG__LEVEL": "loud", **PRODUCTION}
            | {"NOTIFYD_CORS__ORIGINS": "[]"},
            write("[queue]\nsize = 1\nmax_messages = 1"),
        )
        assert [line.split(":")[0] for line in found.splitlines()] == [
            "queue.size",
            "log.level",
            "NOTIFYD_SERVER__PROT",
            "queue.max_messages",
            "cors.origins",
        ]

    def test_a_refused_value_is_not_also_called_missing(self) -> None:
        found = refusal(PRODUCTION | {"NOTIFYD_CORS__ORIGINS": "https://app.example.com"})
        assert found.count("cors.origins") == 1

    def test_a_file_that_is_not_there(self) -> None:
        assert "/nowhere.toml: the settings file cannot be read" in refusal({}, "/nowhere.toml")

    def test_a_file_that_is_not_toml(self, write: Write) -> None:
        assert "not valid TOML" in refusal({}, write("[server"))

    def test_a_file_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "latin.toml").write_bytes(b"# \xe9")
        assert "not valid TOML" in refusal({}, str(tmp_path / "latin.toml"))

    def test_a_named_file_that_is_not_there(self) -> None:
        found = refusal({"NOTIFYD_AUTH__JWT_SECRET_FILE": "/nowhere/secret"})
        assert "auth.jwt_secret: /nowhere/secret cannot be read: No such file" in found
        assert "NOTIFYD_AUTH__JWT_SECRET_FILE" in found

    def test_a_named_file_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"\xff" * 32)
        found = refusal({"NOTIFYD_AUTH__JWT_SECRET_FILE": str(tmp_path / "secret")})
        assert "auth.jwt_secret" in found
        assert "it is not UTF-8" in found

    def test_a_value_and_its_file_together(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("s" * 32, "utf-8")
        found = refusal(
            {
                "NOTIFYD_AUTH__JWT_SECRET": "t" * 32,
                "NOTIFYD_AUTH__JWT_SECRET_FILE": str(tmp_path / "secret"),
            }
        )
        assert "auth.jwt_secret: both" in found


class TestWarnings:
    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("NOTIFYD_SERVER_PORT", "NOTIFYD_SERVER__PORT"),
            ("NOTIFYD_AUTH_JWT_SECRET_FILE", "NOTIFYD_AUTH__JWT_SECRET_FILE"),
            ("NOTIFYD_WEBSOCKETIDLETIMEOUT", "NOTIFYD_WEBSOCKET__IDLE_TIMEOUT"),
        ],
    )
    def test_an_option_but_for_its_underscores(self, variable: str, meant: str) -> None:
        warnings: list[str] = []
        assert load_settings(None, {variable: "1"}, warn=warnings.append) == Settings()
        assert len(warnings) == 1
        assert variable in warnings[0]
        assert meant in warnings[0]

    @pytest.mark.parametrize(
        "variable", ["NOTIFYD_PORT", "NOTIFYD_PORT_8081_TCP", "NOTIFYD_CONFIG"]
    )
    def test_what_kubernetes_injects_is_ignored_in_silence(
        self, write: Write, variable: str
    ) -> None:
        warnings: list[str] = []
        assert load_settings(write(""), {variable: "tcp://x"}, warn=warnings.append) == Settings()
        assert warnings == []

    def test_without_anybody_to_warn(self) -> None:
        assert load_settings(None, {"NOTIFYD_SERVER_PORT": "1"}) == Settings()


class TestCrossChecks:
    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            ({"NOTIFYD_WEBSOCKET__IDLE_TIMEOUT": "30"}, "websocket.idle_timeout: 30 s must be"),
            ({"NOTIFYD_SERVER__MAX_SOCKETS": "10"}, "server.max_sockets: 10 must be at least"),
            (
                {
                    "NOTIFYD_WEBSOCKET__OUTBOX_TOTAL_BYTES": "1048576",
                    "NOTIFYD_WEBSOCKET__OUTBOX_MAX_BYTES": "1048577",
                },
                "websocket.outbox_total_bytes: 1048576 must be at least",
            ),
            ({"NOTIFYD_QUEUE__MAX_MESSAGES": "999"}, "queue.max_messages: 999 must be at least"),
            ({"NOTIFYD_SERVER__TLS_CERT": __file__}, "server.tls_key: TLS needs both"),
            ({"NOTIFYD_SERVER__TLS_KEY": __file__}, "server.tls_cert: TLS needs both"),
            (
                {"NOTIFYD_SERVER__TLS_KEY": "/no/key", "NOTIFYD_SERVER__TLS_CERT": __file__},
                "server.tls_key: /no/key cannot be read",
            ),
            (
                {"NOTIFYD_SERVER__FORWARDED_ALLOW_IPS": '["*", "::1", "192.0.2.0/24", "proxy"]'},
                'server.forwarded_allow_ips: "proxy" is no address',
            ),
            ({"NOTIFYD_SERVER__HOST": "0.0.0.0"}, "server.host: development listens on loopback"),
            ({"NOTIFYD_SERVER__HOST": "web"}, "server.host: development listens on loopback"),
            ({"NOTIFYD_AUTH__JWT_SECRET": "short"}, "auth.jwt_secret: 5 bytes are too few"),
            (
                {"NOTIFYD_AUTH__JWT_SECRETS": json.dumps(["s" * 32, "short"])},
                "auth.jwt_secrets[1]: 5 bytes are too few, HS256 needs 32",
            ),
            (
                {
                    "NOTIFYD_AUTH__JWT_SECRET": "s" * 47,
                    "NOTIFYD_AUTH__JWT_ALGORITHMS": '["HS256", "HS384"]',
                },
                "HS384 needs 48",
            ),
            (
                {
                    "NOTIFYD_AUTH__JWT_SECRET": "s" * 63,
                    "NOTIFYD_AUTH__JWT_ALGORITHMS": '["HS512"]',
                },
                "HS512 needs 64",
            ),
            ({"NOTIFYD_AUTH__JWT_ALGORITHMS": '["RS256"]'}, "RS256 needs a key"),
            (
                {
                    "NOTIFYD_AUTH__JWT_SECRET": "s" * 32,
                    "NOTIFYD_AUTH__JWT_ALGORITHMS": '["ES256"]',
                    "NOTIFYD_AUTH__JWT_PUBLIC_KEY": PUBLIC_KEY,
                },
                "auth.jwt_secret: no algorithm uses it",
            ),
            (
                {"NOTIFYD_AUTH__JWT_PUBLIC_KEY": PUBLIC_KEY},
                "auth.jwt_algorithms: the algorithm of auth.jwt_public_key is not among them",
            ),
            (
                {
                    "NOTIFYD_AUTH__JWT_PUBLIC_KEY": PUBLIC_KEY.replace("PUBLIC", "PRIVATE"),
                    "NOTIFYD_AUTH__JWT_ALGORITHMS": '["ES256"]',
                },
                "auth.jwt_public_key: this is a private key",
            ),
            (
                {
                    "NOTIFYD_AUTH__JWT_PUBLIC_KEY": "/run/key.pem",
                    "NOTIFYD_AUTH__JWT_ALGORITHMS": '["ES256"]',
                },
                "NOTIFYD_AUTH__JWT_PUBLIC_KEY_FILE",
            ),
            (
                {
                    "NOTIFYD_AUTH__JWT_PUBLIC_KEY": PUBLIC_KEY,
                    "NOTIFYD_AUTH__JWKS_URL": "https://issuer.example.com/keys",
                },
                "auth.jwt_public_key: auth.jwks_url is set too",
            ),
            ({"NOTIFYD_AUTH__JWKS_URL": "issuer"}, 'auth.jwks_url: "issuer" is no address'),
            ({"NOTIFYD_AUTH__JWKS_URL": "file://h/k"}, "is no address of keys"),
            (
                {"NOTIFYD_AUTH__API_KEYS": '[{"name": "a"}]'},
                'auth.api_keys[0] ("a"): give either key or sha256',
            ),
            (
                {
                    "NOTIFYD_AUTH__API_KEYS": json.dumps(
                        [{"name": "a", "key": "k", "sha256": "0" * 64}]
                    )
                },
                "give either key or sha256",
            ),
            (
                {
                    "NOTIFYD_AUTH__API_KEYS": json.dumps(
                        [{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]
                    )
                },
                'auth.api_keys[1] ("a"): another key has this name',
            ),
            (
                {"NOTIFYD_AUTH__API_KEYS": '[{"name": "a", "key": "k", "rate": "9/day"}]'},
                'auth.api_keys[0] ("a"): rate "9/day" holds only where limits are on',
            ),
            (
                {
                    "NOTIFYD_AUTH__API_KEYS": '[{"name": "a", "key": "k", "rate": "9/week"}]',
                    "NOTIFYD_RATELIMIT__ENABLED": "true",
                },
                "auth.api_keys[0].rate: expected a text that matches ^[1-9]",
            ),
            (
                {
                    "NOTIFYD_RATELIMIT__ENABLED": "true",
                    "NOTIFYD_RATELIMIT__BACKEND": "redis",
                    "NOTIFYD_REDIS__URL": "http://localhost",
                },
                "redis.url: ",
            ),
            (
                {"NOTIFYD_AUTH__API_KEYS": '[{"name": "a", "key": "k", "tenant_id": "acme"}]'},
                'tenant_id "acme" is refused',
            ),
            ({"NOTIFYD_CHANNELS__RULES": '{"a b": {"subscribe": "any"}}'}, '"a b" matches no'),
            ({"NOTIFYD_CHANNELS__RULES": '{"{role}": {"subscribe": "any"}}'}, "matches no"),
        ],
    )
    def test_names_the_option_and_where_it_came_from(
        self, environ: dict[str, str], message: str
    ) -> None:
        found = refusal(environ)
        assert message in found
        if message.split(":", maxsplit=1)[0].replace(".", "__").upper() in " ".join(environ):
            assert any(f"(from {variable})" in found for variable in environ)

    @pytest.mark.parametrize(
        ("origin", "sent"),
        [
            ("https://app.example.com/", "https://app.example.com"),
            ("https://App.example.com", "https://app.example.com"),
            ("https://app.example.com:443", "https://app.example.com"),
            ("http://app.example.com:80/path?q", "http://app.example.com"),
            ("http://[::1]:8000/", "http://[::1]:8000"),
        ],
    )
    def test_an_origin_is_what_a_browser_sends(self, origin: str, sent: str) -> None:
        found = refusal({"NOTIFYD_CORS__ORIGINS": json.dumps([origin])})
        assert f'"{origin}" is not what a browser sends; write "{sent}"' in found
        load_settings(None, {"NOTIFYD_CORS__ORIGINS": json.dumps([sent])})

    @pytest.mark.parametrize("origin", ["null", "app.example.com", "https://[", "", "http://a:x"])
    def test_what_is_no_origin(self, origin: str) -> None:
        found = refusal({"NOTIFYD_CORS__ORIGINS": json.dumps([origin])})
        assert "is no origin; write scheme and host" in found

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
    def test_development_on_loopback(self, host: str) -> None:
        assert load_settings(None, {"NOTIFYD_SERVER__HOST": host}).server.host == host

    def test_the_default_tenant_may_be_named(self) -> None:
        keys = '[{"name": "a", "key": "k", "tenant_id": "default"}]'
        settings = load_settings(None, {"NOTIFYD_AUTH__API_KEYS": keys})
        assert settings.auth.api_keys[0].tenant_id == "default"


class TestProduction:
    def test_starts_when_everything_is_there(self) -> None:
        settings = load_settings(None, PRODUCTION | {"NOTIFYD_SERVER__HOST": "0.0.0.0"})
        assert settings.production
        assert settings.channels.rules == {"news": ChannelRule(subscribe="any")}

    @pytest.mark.parametrize(
        ("variable", "option"),
        [
            ("NOTIFYD_AUTH__JWT_SECRET", "auth.jwt_secret"),
            ("NOTIFYD_AUTH__API_KEY", "auth.api_key"),
            ("NOTIFYD_CORS__ORIGINS", "cors.origins"),
            ("NOTIFYD_CHANNELS__RULES", "channels.rules"),
        ],
    )
    def test_refuses_to_start_half_configured(self, variable: str, option: str) -> None:
        rest = {name: text for name, text in PRODUCTION.items() if name != variable}
        assert refusal(rest).startswith(f"{option}: production needs")

    def test_inherits_no_rule_of_development(self) -> None:
        production = ServerSettings(mode="production")
        assert msgspec.structs.replace(Settings(), server=production).channels.rules == {}

    def test_says_all_that_is_missing(self) -> None:
        assert len(refusal({"NOTIFYD_SERVER__MODE": "production"}).splitlines()) == 4

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            ({"NOTIFYD_AUTH__API_KEY": "k" * 15}, "auth.api_key: 15 characters are too few"),
            (
                {"NOTIFYD_AUTH__API_KEYS": '[{"name": "a", "key": "short"}]'},
                "auth.api_keys[0].key: 5 characters are too few",
            ),
            ({"NOTIFYD_CORS__ORIGINS": '["*"]'}, 'cors.origins: production refuses "*"'),
            (
                {"NOTIFYD_AUTH__JWKS_URL": "http://issuer.example.com/keys"},
                "is refused in production; use https",
            ),
        ],
    )
    def test_refuses_what_is_unsafe(self, environ: dict[str, str], message: str) -> None:
        assert message in refusal(PRODUCTION | environ)
        if "API_KEY" not in next(iter(environ)):
            load_settings(None, environ)

    @pytest.mark.parametrize(
        "environ",
        [
            {
                "NOTIFYD_AUTH__JWT_PUBLIC_KEY": PUBLIC_KEY,
                "NOTIFYD_AUTH__JWT_ALGORITHMS": '["ES256"]',
            },
            {"NOTIFYD_AUTH__JWKS_URL": "https://issuer.example.com/keys"},
        ],
    )
    def test_other_keys_stand_in_for_the_secret(self, environ: dict[str, str]) -> None:
        rest = {name: text for name, text in PRODUCTION.items() if "SECRET" not in name}
        assert load_settings(None, rest | environ).auth.jwt_secrets == ()


class TestFolding:
    def test_the_single_secret_is_the_newest(self) -> None:
        auth = AuthSettings(jwt_secret="new", jwt_secrets=("old", "older"))
        assert auth.jwt_secrets == ("new", "old", "older")
        assert AuthSettings(jwt_secret="old", jwt_secrets=("old",)).jwt_secrets == ("old",)

    def test_the_single_key_covers_everything(self) -> None:
        shop = ApiKeySettings(name="shop", key="one")
        auth = AuthSettings(api_key="two", api_keys=(shop,))
        assert auth.api_keys == (shop, ApiKeySettings(name="default", key="two"))
        assert msgspec.structs.replace(auth) == auth

    def test_a_jwks_url_implies_its_algorithms(self) -> None:
        url = "https://issuer.example.com/keys"
        assert AuthSettings(jwks_url=url).jwt_algorithms == ("HS256", "RS256", "ES256")
        named = AuthSettings(jwks_url=url, jwt_algorithms=("EdDSA",))
        assert named.jwt_algorithms == ("EdDSA",)


class TestSecretsStaySecret:
    def test_in_texts_of_the_settings(self) -> None:
        settings = Settings(
            auth=AuthSettings(
                jwt_secret="hush-1",
                jwt_secrets=("hush-2",),
                api_key="hush-3",
                api_keys=(ApiKeySettings(name="shop", key="hush-4"),),
            )
        )
        for text in (repr(settings), str(settings), repr(settings.auth), f"{settings.auth}"):
            assert "hush" not in text
            assert "jwt_secret=***" in text
            assert "name='shop'" in text

    @pytest.mark.parametrize(
        "environ",
        [
            {"NOTIFYD_AUTH__JWT_SECRET": "hush"},
            {"NOTIFYD_AUTH__JWT_SECRETS": '"hush"'},
            {"NOTIFYD_AUTH__JWT_SECRETS": "hush"},
            {"NOTIFYD_AUTH__API_KEYS": '"hush"'},
            {"NOTIFYD_AUTH__API_KEYS": '[{"name": 1, "key": "hush"}]'},
            {"NOTIFYD_AUTH__JWT_PUBLIC_KEY": "hush"},
        ],
    )
    def test_in_errors(self, environ: dict[str, str]) -> None:
        assert "hush" not in refusal(environ)


class TestDocumentation:
    def test_the_file_of_defaults_is_the_printed_one(self) -> None:
        assert (CONFIG / "default.toml").read_text("utf-8") == default_config()

    def test_it_holds_the_defaults(self) -> None:
        assert load_settings(str(CONFIG / "default.toml"), {}) == Settings()

    def test_it_names_every_option(self) -> None:
        lines = default_config().splitlines()
        for option in options():
            assert any(line.removeprefix("# ").startswith(f"{option.key} = ") for line in lines)

    def test_examples_are_valid(self) -> None:
        for option in options():
            if option.example is not None:
                msgspec.convert(option.example, type=option.annotation)

    def test_every_option_says_what_it_means(self) -> None:
        for option in options():
            assert option.meaning.endswith("."), option.name
            assert (
                not isinstance(option.default, int)
                or isinstance(option.default, bool)
                or (option.unit or option.key == "port")
            ), option.name

    def test_development_example(self) -> None:
        assert not load_settings(str(CONFIG / "development.toml"), {}).production

    def test_production_example(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("s" * 32 + "\n", "utf-8")
        (tmp_path / "key").write_text("k" * 16 + "\n", "utf-8")
        path = str(CONFIG / "production.toml")
        settings = load_settings(
            path,
            {
                "NOTIFYD_AUTH__JWT_SECRET_FILE": str(tmp_path / "secret"),
                "NOTIFYD_AUTH__API_KEY_FILE": str(tmp_path / "key"),
            },
        )
        assert settings.production
        assert settings.auth.api_keys[0].key == "k" * 16
        assert [line.split(":")[0] for line in refusal({}, path).splitlines()] == [
            "auth.jwt_secret",
            "auth.api_key",
        ]


def test_an_embedding_application_can_ask_for_the_problems() -> None:
    assert problems(Settings()) == []
    assert len(problems(Settings(server=ServerSettings(mode="production")))) == 4


class TestStores:
    def test_nothing_is_kept_in_one_unless_it_is_chosen(self) -> None:
        assert Settings().backends == {"memory"}
        settings = Settings(
            queue=QueueSettings(backend="redis"), ack=AckSettings(backend="postgres", enabled=False)
        )
        assert settings.backends == {"redis"}
        settings = Settings(
            queue=QueueSettings(backend="redis"), ack=AckSettings(backend="postgres")
        )
        assert settings.backends == {"redis", "postgres"}
        neither = Settings(queue=QueueSettings(enabled=False), ack=AckSettings(enabled=False))
        assert neither.backends == frozenset()

    def test_what_platforms_call_it(self) -> None:
        environ = {"REDIS_URL": "redis://r:7000/2", "DATABASE_URL": "postgres://p/db"}
        settings = load_settings(None, environ)
        assert (settings.redis.url, settings.postgres.url) == tuple(environ.values())

    def test_ours_win_over_it(self, write: Write) -> None:
        environ = {"REDIS_URL": "redis://theirs", "DATABASE_URL": "postgres://theirs/db"}
        path = write("[redis]\nurl = 'redis://ours'")
        settings = load_settings(path, environ | {"NOTIFYD_POSTGRES__URL": "postgresql://ours/db"})
        assert settings.redis.url == "redis://ours"
        assert settings.postgres.url == "postgresql://ours/db"

    def test_empty_it_counts_as_unset(self) -> None:
        assert load_settings(None, {"REDIS_URL": "", "DATABASE_URL": ""}) == Settings()

    def test_somebody_elses_database_is_no_matter_of_ours(self) -> None:
        settings = load_settings(None, {"DATABASE_URL": "mysql://app@db/app", "REDIS_URL": "?"})
        assert settings.backends == {"memory"}

    def test_a_database_that_is_chosen_must_be_named(self) -> None:
        found = refusal({"NOTIFYD_ACK__BACKEND": "postgres"})
        assert found.startswith('postgres.url: ack.backend is "postgres"')
        both = {"NOTIFYD_QUEUE__BACKEND": "postgres", "NOTIFYD_ACK__BACKEND": "postgres"}
        assert refusal(both).count("postgres.url") == 1
        load_settings(None, both | {"DATABASE_URL": "postgresql:///db?host=/run/pg"})

    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://localhost:6379/0",
            "redis://:secret@10.0.0.1:6379/15",
            "rediss://user:secret@redis.example.com/0?ssl_ca_certs=/etc/ca.pem",
            "unix:///run/redis.sock?db=1",
            "redis://[::1]:6379/",
        ],
    )
    def test_urls_of_a_redis(self, url: str) -> None:
        environ = {"NOTIFYD_QUEUE__BACKEND": "redis", "NOTIFYD_REDIS__URL": url}
        assert load_settings(None, environ).redis.url == url

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:6379",
            "http://:s3cret@localhost",
            "redis://:s3cret@",
            "redis://:s3cret@localhost:port",
            "redis://:s3cret@localhost:99999",
            "redis://:s3cret@localhost/zero",
            "redis://:s3cret@[::1",
            "unix://:s3cret@",
            "redis:s3cret",
        ],
    )
    def test_what_is_none_is_refused_without_its_password(self, url: str) -> None:
        found = refusal({"NOTIFYD_QUEUE__BACKEND": "redis", "REDIS_URL": url})
        assert found.startswith("redis.url: ")
        assert "write it as" in found
        assert "from REDIS_URL" in found
        assert "s3cret" not in found

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://notifyd@localhost:5432/notifyd",
            "postgres://notifyd:secret@db/notifyd?sslmode=require",
            "postgresql://u@one:5432,two:5433/db",
            "postgresql:///db?host=/run/postgresql",
        ],
    )
    def test_urls_of_a_database(self, url: str) -> None:
        environ = {"NOTIFYD_ACK__BACKEND": "postgres", "NOTIFYD_POSTGRES__URL": url}
        assert load_settings(None, environ).postgres.url == url

    @pytest.mark.parametrize(
        "url",
        [
            "localhost/db",
            "postgresql+asyncpg://u:s3cret@db/app",
            "mysql://u:s3cret@db/app",
            "postgresql://u:s3cret@db:port/app",
            "postgresql://u:s3cret@[::1/app",
        ],
    )
    def test_another_is_refused_without_its_password(self, url: str) -> None:
        found = refusal({"NOTIFYD_ACK__BACKEND": "postgres", "DATABASE_URL": url})
        assert found.startswith("postgres.url: ")
        assert "write it as postgresql://" in found
        assert "s3cret" not in found

    def test_a_url_of_the_wrong_type_is_not_quoted(self, write: Write) -> None:
        found = refusal({}, write("[redis]\nurl = ['redis://:s3cret@localhost']"))
        assert found.startswith("redis.url: expected a text that is not empty")
        assert "s3cret" not in found

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost:6379/0", "redis://localhost:6379/0"),
            ("redis://:s3cret@host:7000", "redis://***@host:7000"),
            ("redis://user:s3cret@t@host", "***"),
            ("postgresql://u:s3cret@one:1,two:2/db", "postgresql://***@one:1,two:2/db"),
            ("postgresql:///db?host=/run&password=s3cret", "postgresql:///db?***"),
            ("unix://:s3cret@/run/redis.sock", "unix://***@/run/redis.sock"),
            ("redis:s3cret", "***"),
            ("s3cret", "***"),
            ("redis://:s3cret@[::1", "***"),
            ("redis://user:s3cret", "***"),
            ("redis://:/s3cret@host", "***"),
            ("redis://:?s3cret@host", "***"),
            ("rediss://:s3cret@[::1]:6379/", "rediss://***@[::1]:6379/"),
        ],
    )
    def test_a_url_is_shown_without_its_password(self, url: str, shown: str) -> None:
        assert shown_address(url) == shown
        assert repr(RedisSettings(url=url)).startswith(
            f"RedisSettings(url='{shown}', key_prefix='notifyd', command_timeout_seconds=2, "
        )
        settings = Settings(postgres=PostgresSettings(url=url))
        assert "s3cret" not in repr(settings)
        assert f"url='{shown}'" in repr(settings)

    def test_notifications_may_come_from_redis(self) -> None:
        settings = load_settings(
            None,
            {
                "REDIS_URL": "redis://host:1/2",
                "NOTIFYD_REDIS__TRIGGER_ENABLED": "true",
                "NOTIFYD_REDIS__TRIGGER_PATTERNS": '["shop:user:*"]',
            },
        )
        assert settings.redis.trigger_patterns == ("shop:user:*",)
        assert settings.backends == {"memory", "redis"}
        assert problems(settings) == []
        streamed = Settings(redis=RedisSettings(stream_key="s"))
        assert (streamed.redis.has_sources, "redis" in streamed.backends) == (True, True)
        assert not RedisSettings().has_sources

    def test_a_trigger_without_patterns_hears_nothing(self) -> None:
        redis = RedisSettings(trigger_enabled=True, trigger_patterns=())
        (problem,) = problems(Settings(redis=redis))
        assert problem.startswith("redis.trigger_patterns: ")
        assert problems(Settings(redis=RedisSettings(stream_key="s", url="http://x")))

    @given(st.text(), st.text(), st.text())
    def test_no_password_is_ever_shown(self, user: str, before: str, behind: str) -> None:
        for url in (
            f"redis://{user}:{before}s3cret{behind}@localhost/0",
            f"postgresql://{user}@localhost/db?password={before}s3cret{behind}",
        ):
            assert "s3cret" not in shown_address(url)

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            (
                {"NOTIFYD_BREAKER__BACKOFF_MAX_MS": "99"},
                "breaker.backoff_initial_ms: 100 must be at most breaker.backoff_max_ms (99)",
            ),
            (
                {"NOTIFYD_POSTGRES__POOL_MIN": "11"},
                "postgres.pool_min: 11 must be at most postgres.pool_max (10)",
            ),
            (
                {"NOTIFYD_QUEUE__MODE": "always", "NOTIFYD_QUEUE__ENABLED": "false"},
                'queue.mode: "always" stores everything, and the queue is switched off',
            ),
        ],
    )
    def test_what_does_not_go_together(self, environ: dict[str, str], message: str) -> None:
        assert refusal(environ).startswith(message)

    def test_the_bound_of_memory_is_for_memory(self) -> None:
        environ = {"NOTIFYD_QUEUE__MAX_MESSAGES": "10"}
        assert refusal(environ).startswith("queue.max_messages")
        load_settings(None, environ | {"NOTIFYD_QUEUE__BACKEND": "redis"})


def test_a_rate_that_is_given_in_code() -> None:
    keys = (ApiKeySettings(name="a", key="k", rate="often"),)
    limited = Settings(
        auth=AuthSettings(jwt_secret="s" * 32, api_keys=keys),
        ratelimit=RateLimitSettings(enabled=True),
    )
    assert problems(limited) == [
        'auth.api_keys[0] ("a"): rate "often" is no rate; write it as "1000/hour"'
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_limits_in_redis_are_a_use_of_it_where_they_are_on(enabled: bool) -> None:
    ratelimit = RateLimitSettings(enabled=enabled, backend="redis")
    assert ("redis" in Settings(ratelimit=ratelimit).backends) == enabled


ENABLED = {"NOTIFYD_CLUSTER__ENABLED": "true"}
SHARED = {**ENABLED, "NOTIFYD_QUEUE__BACKEND": "redis"}


class TestCluster:
    def test_a_cluster_uses_redis_wherever_its_queue_is(self) -> None:
        environ = {
            **ENABLED,
            "NOTIFYD_QUEUE__BACKEND": "postgres",
            "DATABASE_URL": "postgresql://notifyd@localhost/notifyd",
        }
        assert load_settings(None, environ).backends == {"redis", "postgres", "memory"}
        without_queue = {**ENABLED, "NOTIFYD_QUEUE__ENABLED": "false"}
        assert "redis" in load_settings(None, without_queue).backends

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            (ENABLED, 'queue.backend: "memory" is not shared'),
            (
                {**SHARED, "NOTIFYD_CLUSTER__PRESENCE_TTL_SECONDS": "30"},
                "cluster.presence_ttl_seconds: 30 s must be more than websocket.heartbeat_interval",
            ),
            (
                {"NOTIFYD_SERVER__WORKERS": "2"},
                "server.workers: 2 processes are nodes of a cluster",
            ),
            ({**SHARED, "NOTIFYD_CLUSTER__NODE_ID": "a:b"}, "cluster.node_id: expected a text"),
            ({**SHARED, "NOTIFYD_SERVER__WORKERS": "0"}, "server.workers: expected a whole number"),
        ],
    )
    def test_what_does_not_go_together(self, environ: dict[str, str], message: str) -> None:
        assert refusal(environ).startswith(message)

    def test_workers_of_a_cluster(self) -> None:
        settings = load_settings(None, {**SHARED, "NOTIFYD_SERVER__WORKERS": "4"})
        assert settings.server.workers == 4
