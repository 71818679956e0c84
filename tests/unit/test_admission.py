from __future__ import annotations

from typing import Any

import pytest

from notifyd.auth import Origins, TokenVerifier
from notifyd.connections.admission import MAX_USER_AGENT, Admission, Handshake
from notifyd.connections.connection import Transport
from notifyd.errors import BadRequest, Forbidden, TokenExpired, Unauthorized
from notifyd.identity import Identity
from notifyd.options import AuthSettings
from tests.unit.connected import SECRET, Clock

Headers = list[tuple[bytes, bytes]]


def handshake(
    query: bytes = b"", headers: Headers | None = None, transport: Transport = "websocket"
) -> Handshake:
    return Handshake(transport, query, headers or [], "192.0.2.1")


class TestToken:
    @pytest.mark.parametrize(
        ("query", "headers", "token"),
        [
            (b"", [], None),
            (b"token=a.b.c", [], "a.b.c"),
            (b"acks=1&token=a%2Eb&x=", [], "a.b"),
            (b"", [(b"authorization", b"Bearer h")], "h"),
            (b"", [(b"authorization", b"bEARER  h ")], "h"),
            (b"", [(b"authorization", b"Basic h")], None),
            (b"", [(b"sec-websocket-protocol", b"notifyd.v1, bearer.s")], "s"),
            (
                b"",
                [
                    (b"sec-websocket-protocol", b"notifyd.v1"),
                    (b"sec-websocket-protocol", b"bearer.s"),
                ],
                "s",
            ),
            (
                b"token=q",
                [(b"authorization", b"Bearer h"), (b"sec-websocket-protocol", b"bearer.s")],
                "q",
            ),
            (
                b"",
                [(b"sec-websocket-protocol", b"bearer.s"), (b"authorization", b"Bearer h")],
                "h",
            ),
            # Of two, neither one is believed.
            (
                b"",
                [(b"authorization", b"Bearer h"), (b"authorization", b"Bearer i")],
                "h,i",
            ),
            # An empty one is an invalid one, and not none at all.
            (b"token=", [(b"authorization", b"Bearer h")], ""),
        ],
    )
    def test_by_query_then_header_then_subprotocol(
        self, query: bytes, headers: Headers, token: str | None
    ) -> None:
        assert handshake(query, headers).token == token

    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [
            ([], None),
            ([b"notifyd.v1"], "notifyd.v1"),
            ([b"bearer.x, notifyd.v1"], "notifyd.v1"),
            ([b"bearer.x", b"notifyd.v1"], "notifyd.v1"),
            ([b"bearer.x"], "bearer.x"),
            ([b"graphql-ws,bearer.x"], "bearer.x"),
            ([b"graphql-ws"], None),
        ],
    )
    def test_which_subprotocol_is_answered(self, offered: list[bytes], chosen: str | None) -> None:
        headers = [(b"sec-websocket-protocol", each) for each in offered]
        assert handshake(b"", headers).chosen_subprotocol == chosen


class TestQuery:
    def test_acks(self) -> None:
        assert handshake(b"acks=1").acks is True
        assert handshake(b"acks=0").acks is False
        assert handshake().acks is False
        for wrong in (b"acks=", b"acks=true", b"acks=2"):
            fault = handshake(wrong).fault
            assert fault is not None
            assert fault.field == "acks"

    def test_channels_are_for_streams(self) -> None:
        query = b"channels=orders,alerts,,&channels=a%3Ab"
        assert handshake(query, transport="sse").channels == ("orders", "alerts", "a:b")
        assert handshake(query).channels == ()

    @pytest.mark.parametrize(
        "query", ["ä=1".encode(), b"channels=%ff", b"&".join([b"a=1"] * 33), b"x=%c3%28"]
    )
    def test_what_is_no_query(self, query: bytes) -> None:
        with pytest.raises(BadRequest):
            Gate().admission.identify(handshake(query, transport="sse"))

    def test_what_is_unknown_is_ignored(self) -> None:
        assert handshake(b"since=1&foo&=&v=2").token is None


class TestHeaders:
    def test_who_comes(self) -> None:
        met = handshake(
            b"",
            [
                (b"origin", b"https://app.example"),
                (b"user-agent", b"x" * 1000),
                (b"sec-fetch-site", b"same-origin"),
                (b"cookie", b"a=b"),
            ],
        )
        assert met.origin == "https://app.example"
        assert len(met.user_agent) == MAX_USER_AGENT
        assert met.same_origin
        assert (met.address, met.transport) == ("192.0.2.1", "websocket")
        plain = handshake()
        assert (plain.origin, plain.user_agent, plain.same_origin) == (None, "", False)
        assert not handshake(b"", [(b"sec-fetch-site", b"cross-site")]).same_origin


class Gate:
    """An admission with HS256 tokens, one origin and, if named, a cookie."""

    def __init__(self, cookie_name: str | None = None) -> None:
        self.clock = Clock()
        self.verifier = TokenVerifier(
            AuthSettings(jwt_secret=SECRET), production=True, clock=self.clock
        )
        origins = Origins(["https://app.example"], development=False)
        self.admission = Admission(self.verifier, origins, cookie_name=cookie_name)
        self.token = self.verifier.mint("u1", ttl=60, roles=["admin"])[0]

    def identify(
        self, query: bytes = b"", headers: Headers | None = None, transport: Transport = "websocket"
    ) -> Any:
        return self.admission.identify(handshake(query, headers, transport))


class TestIdentify:
    def test_a_token_says_who(self) -> None:
        gate = Gate()
        identity = gate.identify(b"token=" + gate.token.encode())
        assert isinstance(identity, Identity)
        assert (identity.user_id, identity.roles) == ("u1", ("admin",))

    def test_without_a_token_a_websocket_may_send_one(self) -> None:
        assert Gate().identify() is None

    def test_without_a_token_there_is_no_stream(self) -> None:
        with pytest.raises(Unauthorized) as caught:
            Gate().identify(transport="sse")
        assert caught.value.hint is not None

    @pytest.mark.parametrize("query", [b"token=", b"token=nonsense"])
    def test_a_bad_token_is_never_nobody(self, query: bytes) -> None:
        with pytest.raises(Unauthorized):
            Gate().identify(query)

    def test_an_expired_one(self) -> None:
        gate = Gate()
        gate.clock.now += 100
        with pytest.raises(TokenExpired):
            gate.identify(b"token=" + gate.token.encode())

    @pytest.mark.parametrize("origin", [b"https://evil.example", b"null", b""])
    def test_a_foreign_origin_is_refused_before_its_token_is_looked_at(self, origin: bytes) -> None:
        with pytest.raises(Forbidden) as caught:
            Gate().identify(b"token=nonsense", [(b"origin", origin)])
        assert caught.value.hint == f'add "{origin.decode()}" to cors.origins'

    def test_an_allowed_one(self) -> None:
        gate = Gate()
        headers = [(b"origin", b"https://app.example")]
        assert gate.identify(b"token=" + gate.token.encode(), headers).user_id == "u1"
        assert gate.admission.origin_allowed(handshake(b"", headers))
        assert gate.admission.origin_allowed(handshake())


class TestCookie:
    @pytest.mark.parametrize(
        "cookie",
        [
            "session={}",
            "a=b; session={}",
            'session="{}"; a=b',
            'prefs={{"a":[1,2]}}; session={}; x',
            "session={}; session=other",
            "a=b;session = {} ",
            "bad\x01key=1; session={}",
        ],
    )
    @pytest.mark.parametrize(
        "page", [(b"origin", b"https://app.example"), (b"sec-fetch-site", b"same-origin")]
    )
    def test_from_a_page_that_is_known(self, cookie: str, page: tuple[bytes, bytes]) -> None:
        gate = Gate("session")
        header = (b"cookie", cookie.format(gate.token).encode("latin-1"))
        assert gate.identify(b"", [header, page]).user_id == "u1"

    def test_in_several_headers(self) -> None:
        gate = Gate("session")
        headers = [
            (b"cookie", b"a=b"),
            (b"cookie", b"session=" + gate.token.encode()),
            (b"cookie", b"c=d"),
            (b"sec-fetch-site", b"same-origin"),
        ]
        assert gate.identify(b"", headers).user_id == "u1"

    @pytest.mark.parametrize("site", [None, b"none", b"cross-site", b"same-site"])
    def test_not_from_any_other(self, site: bytes | None) -> None:
        gate = Gate("session")
        headers = [(b"cookie", b"session=" + gate.token.encode())]
        if site is not None:
            headers.append((b"sec-fetch-site", site))
        with pytest.raises(Forbidden):
            gate.identify(b"", headers)

    def test_a_token_given_otherwise_comes_first(self) -> None:
        gate = Gate("session")
        headers = [(b"cookie", b"session=nonsense")]
        assert gate.identify(b"token=" + gate.token.encode(), headers).user_id == "u1"

    @pytest.mark.parametrize("cookie", [b"", b"other=x", b"session", b"xsession=x"])
    def test_without_it_there_is_no_token(self, cookie: bytes) -> None:
        assert Gate("session").identify(b"", [(b"cookie", cookie)]) is None

    def test_where_none_is_configured_none_counts(self) -> None:
        gate = Gate()
        headers = [(b"cookie", b"session=" + gate.token.encode())]
        assert gate.identify(b"", headers) is None
