"""Whose address counts: the socket's, or the one that a trusted proxy tells."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

_MAPPED = "::ffff:"


class TrustedProxies:
    """The addresses and networks of `server.forwarded_allow_ips`; `*` trusts every peer."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._everybody = "*" in allowed
        self._networks = [_network(each) for each in allowed if each not in ("*", "")]

    def client_address(self, peer: str, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The client's address: of what X-Forwarded-For lists, the last that is no proxy of ours.

        A peer that is not trusted is the client itself, whatever it claims. Header names are in
        lower case.
        """
        if peer.startswith(_MAPPED):
            peer = _bare(peer) or peer
        hops: list[str] = []
        for name, value in headers:
            if name == b"x-forwarded-for":
                hops += value.decode("latin-1").split(",")
        if not hops or not self._trusts(peer):
            return peer
        client = peer
        for hop in reversed(hops):
            address = _bare(hop)
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def _trusts(self, address: str) -> bool:
        if self._everybody:
            return True
        try:
            parsed = _parsed(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Of IPv4, too, where it is written within IPv6."""
    network = ipaddress.ip_network(text, strict=False)
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address, of IPv4 where it is one of IPv4 within IPv6 (RFC 4291, section 2.5.5.2), as a
    socket of both has it. Raises ValueError."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed


def _bare(hop: str) -> str | None:
    """An address without its port and brackets, None where it is none."""
    text = hop.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(_parsed(text))
    except ValueError:
        return None
