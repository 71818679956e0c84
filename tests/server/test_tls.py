"""TLS by the server itself: both servers, every kind of client."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from notifyd.server.door import Timeouts
from tests.adversity.hosting import Hosted, hosted
from tests.adversity.raw import PATIENCE, RawClient, connected, request
from tests.conftest import StartServer
from tests.front_door import settings_of, user


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "notifyd test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = directory / "tls.crt", directory / "tls.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


async def test_everything_works_over_tls(start: StartServer, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    verify = ssl.create_default_context(cafile=str(certificate))
    host = await start(tls=verify, server={"tls_cert": str(certificate), "tls_key": str(key)})
    assert host.url.startswith("https://")
    websocket = await host.websocket("ada", ssl=verify)
    stream = await host.sse("ada")
    large = "x" * 60_000
    for n in range(20):
        assert (await host.publish(user("ada"), payload=[n, large]))["delivered_to"] == 2
    for listener in (websocket, stream):
        messages = await listener.notifications(20)
        assert [message["payload"] for message in messages] == [[n, large] for n in range(20)]
    await websocket.nothing_came()
    code = (await host.post("/api/v1/users/ada/disconnect", {})).status_code
    assert code == 200
    assert (await websocket.closed())[0] == 4003
    assert [message["code"] for message in await stream.rest()] == ["FORBIDDEN"]


@contextlib.asynccontextmanager
async def over_tls(port: int, verify: ssl.SSLContext) -> AsyncIterator[RawClient]:
    """A connection whose handshake is done."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=verify)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def served_at_last(server: Hosted, verify: ssl.SSLContext) -> None:
    """Wait until the server has seen that others left."""
    async with asyncio.timeout(PATIENCE):
        while not await is_served(server, verify):
            pass


async def is_served(server: Hosted, verify: ssl.SSLContext) -> bool:
    """Whether one more client gets in, and an answer."""
    try:
        async with over_tls(server.port, verify) as client:
            await client.send(request("GET", "/health"))
            return (await client.response()).status == 200
    except OSError:
        return False


HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


async def test_sockets_count_from_their_accept_and_not_from_their_handshake(
    tmp_path: Path,
) -> None:
    certificate, key = make_certificate(tmp_path)
    verify = ssl.create_default_context(cafile=str(certificate))
    settings = settings_of(
        server={"tls_cert": str(certificate), "tls_key": str(key), "max_sockets": 3},
        websocket={"max_connections": 3},
    )
    with hosted("sockets", settings) as server:
        async with (
            connected(server.port),
            connected(server.port),
            connected(server.port) as hesitant,
            connected(server.port) as too_many,
        ):
            await hesitant.send(HALF_A_HELLO)
            assert await too_many.rest() == b""
            assert not await is_served(server, verify)
        await served_at_last(server, verify)
        # What is no TLS ends the same way, and leaves room.
        for _ in range(5):
            async with connected(server.port) as client:
                await client.send(request("GET", "/health"))
                assert b"HTTP" not in await client.rest()
        await served_at_last(server, verify)
        assert server.failures == []


async def test_a_handshake_that_is_not_finished_ends_at_the_deadline(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    verify = ssl.create_default_context(cafile=str(certificate))
    settings = settings_of(server={"tls_cert": str(certificate), "tls_key": str(key)})
    timeouts = Timeouts(first_byte=0.3, close=0.3, sweep=0.05)
    with hosted("sockets", settings, timeouts) as server:
        async with (
            connected(server.port) as silent,
            connected(server.port) as hesitant,
            over_tls(server.port, verify) as secured,
        ):
            await hesitant.send(HALF_A_HELLO)
            for client in (silent, hesitant, secured):
                assert await client.rest() == b""
        assert await is_served(server, verify)
        assert server.failures == []


async def test_a_handshake_that_is_not_finished_keeps_no_server_from_stopping(
    tmp_path: Path,
) -> None:
    certificate, key = make_certificate(tmp_path)
    verify = ssl.create_default_context(cafile=str(certificate))
    settings = settings_of(server={"tls_cert": str(certificate), "tls_key": str(key)})
    with hosted("sockets", settings) as server:
        silent = socket.create_connection(("127.0.0.1", server.port))
        # Behind it in the line of those to be accepted.
        assert await is_served(server, verify)
        began = time.monotonic()
    with silent:
        silent.settimeout(PATIENCE)
        assert silent.recv(1) == b""
    assert time.monotonic() - began < 5
    assert server.failures == []
