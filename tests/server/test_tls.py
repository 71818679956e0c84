"""TLS by the server itself: both servers, every kind of client."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import StartServer
from tests.front_door import user


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
