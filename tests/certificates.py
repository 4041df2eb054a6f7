"""Certificates for 127.0.0.1, self-signed or by an authority, and TLS contexts for both sides."""

import shutil
import ssl
import subprocess
from pathlib import Path

from surfw.config import TlsFiles
from tests.conftest import require


def make_certificate(folder: Path) -> Path:
    """Return a key and a certificate in one file."""
    key, found, both = folder / "key.pem", folder / "cert.pem", folder / "both.pem"
    _openssl(folder, "req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=127.0.0.1",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key.name, "-out", found.name)  # fmt: skip
    both.write_bytes(key.read_bytes() + found.read_bytes())
    return both


def for_server(certificate: Path) -> ssl.SSLContext:
    """Return a server's context with the certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def for_client(certificate: Path) -> ssl.SSLContext:
    """Return a client's context that trusts only this certificate."""
    return ssl.create_default_context(cafile=str(certificate))


class Authority:
    """An authority that signs certificates, in a folder; `pem` is its own certificate, which clients trust."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, name
        self.pem = folder / f"{name}.pem"
        _openssl(folder, "req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}",
                 "-keyout", f"{name}.key", "-out", self.pem.name)  # fmt: skip

    def issue(self, name: str, *, days: int = 2) -> TlsFiles:
        """Make a key and a certificate for 127.0.0.1, signed by this authority; with zero days, it has expired."""
        found = TlsFiles(certfile=self._folder / f"{name}.pem", keyfile=self._folder / f"{name}.key", ca_certs=self.pem)
        _openssl(self._folder, "req", *_NEW_KEY, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
                 "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        _openssl(self._folder, "x509", "-req", "-in", f"{name}.csr", "-copy_extensions", "copy", "-days", str(days),
                 "-CA", self.pem.name, "-CAkey", f"{self._name}.key", "-out", f"{name}.pem")  # fmt: skip
        return found


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(folder: Path, *arguments: str) -> None:
    if shutil.which("openssl") is None:
        require("openssl, which makes the certificate, is not there")
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)
