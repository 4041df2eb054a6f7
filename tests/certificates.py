"""A self-signed certificate for 127.0.0.1, and what both sides of TLS make of it."""

import shutil
import ssl
import subprocess
from pathlib import Path

from tests.conftest import require


def make_certificate(folder: Path) -> Path:
    """A key and a certificate, in one file."""
    if shutil.which("openssl") is None:
        require("openssl, which makes the certificate, is not there")
    key, found, both = folder / "key.pem", folder / "cert.pem", folder / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(found)],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + found.read_bytes())
    return both


def for_server(certificate: Path) -> ssl.SSLContext:
    """A context that shows the certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def for_client(certificate: Path) -> ssl.SSLContext:
    """A context that trusts the certificate, and no other."""
    return ssl.create_default_context(cafile=str(certificate))
