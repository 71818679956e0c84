from __future__ import annotations

import pytest

from notifyd.forwarded import TrustedProxies

PROXY, OTHER_PROXY = "198.51.100.1", "198.51.100.2"


def client(allowed: list[str], peer: str, *forwarded: str) -> str:
    headers = [(b"host", b"example"), *((b"x-forwarded-for", each.encode()) for each in forwarded)]
    return TrustedProxies(allowed).client_address(peer, headers)


class TestClientAddress:
    def test_without_trust_it_is_the_peer_whatever_it_claims(self) -> None:
        assert client([], "203.0.113.9", "192.0.2.1") == "203.0.113.9"
        assert client([PROXY], "203.0.113.9", "192.0.2.1") == "203.0.113.9"
        assert client([PROXY], "", "192.0.2.1") == ""

    @pytest.mark.parametrize("allowed", [[PROXY], ["198.51.100.0/24"], ["198.51.100.7/24"], ["*"]])
    def test_what_a_trusted_peer_says(self, allowed: list[str]) -> None:
        assert client(allowed, PROXY, "192.0.2.1") == "192.0.2.1"
        assert client(allowed, PROXY) == PROXY

    def test_the_last_that_is_no_proxy_of_ours(self) -> None:
        claimed = f"10.0.0.1, 192.0.2.1, {OTHER_PROXY}"
        assert client([PROXY, OTHER_PROXY], PROXY, claimed) == "192.0.2.1"
        # Only the nearest hop can be believed where nobody vouches for the one before.
        assert client([PROXY], PROXY, claimed) == OTHER_PROXY

    def test_in_several_headers(self) -> None:
        assert client([PROXY, OTHER_PROXY], PROXY, "192.0.2.1", OTHER_PROXY) == "192.0.2.1"

    def test_where_all_are_trusted_it_is_the_first(self) -> None:
        assert client(["*"], PROXY, "192.0.2.1, 192.0.2.2") == "192.0.2.1"

    @pytest.mark.parametrize(
        ("hop", "address"),
        [
            (" 192.0.2.1 ", "192.0.2.1"),
            ("192.0.2.1:4711", "192.0.2.1"),
            ("2001:DB8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:443", "2001:db8::1"),
            ("nonsense", PROXY),
            ("", PROXY),
            ("unknown", PROXY),
            ("192.0.2.1\x00", PROXY),
        ],
    )
    def test_forms_of_an_address(self, hop: str, address: str) -> None:
        assert client([PROXY], PROXY, hop) == address

    def test_what_stands_before_nonsense_is_not_believed(self) -> None:
        assert client([PROXY, OTHER_PROXY], PROXY, f"192.0.2.1, nonsense, {OTHER_PROXY}") == (
            OTHER_PROXY
        )

    def test_an_ipv6_network(self) -> None:
        assert client(["2001:db8::/32"], "2001:db8::5", "192.0.2.1") == "192.0.2.1"

    def test_ipv4_within_ipv6_is_ipv4(self) -> None:
        """As a server that listens on :: has the peers that come by IPv4."""
        assert client([PROXY], f"::ffff:{PROXY}", "192.0.2.1") == "192.0.2.1"
        assert client(["198.51.100.0/24"], f"::ffff:{PROXY}", "::FFFF:192.0.2.1") == "192.0.2.1"
        for allowed in ("::ffff:198.51.100.0/120", f"::ffff:{PROXY}"):
            assert client([allowed], f"::ffff:{PROXY}", "192.0.2.1") == "192.0.2.1"
            assert client([allowed], PROXY, "192.0.2.1") == "192.0.2.1"
            assert client([allowed], "203.0.113.9", "192.0.2.1") == "203.0.113.9"
        assert client([PROXY], "::ffff:203.0.113.9", "192.0.2.1") == "203.0.113.9"
        assert client([], "::ffff:203.0.113.9") == "203.0.113.9"
        assert client([PROXY], "::ffff:nonsense", "192.0.2.1") == "::ffff:nonsense"
        assert client([PROXY, OTHER_PROXY], PROXY, f"192.0.2.1, ::ffff:{OTHER_PROXY}") == (
            "192.0.2.1"
        )

    def test_an_empty_entry_trusts_nobody(self) -> None:
        assert client([""], "203.0.113.9", "192.0.2.1") == "203.0.113.9"
