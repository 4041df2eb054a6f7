"""Reads certificate files for both sides of TLS.

Every error is one line that names the file. Keys with a passphrase are refused, because nobody could type it when the
file is reread.
"""

import ssl
from pathlib import Path

from surfw.config import TlsFiles
from surfw.errors import ConfigurationError
from surfw.files import expand_home, read_regular

_MOST_BYTES = 4 << 20
_CERTIFICATE, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"
_TRUSTED = "the certificates to trust"


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Create a client's SSL context from the files.

    Raises:
        ConfigurationError: a file cannot be read or used.
    """
    trusted = _read_trusted(files)
    try:
        context = ssl.create_default_context(cadata=trusted)
    except ssl.SSLError as exc:
        raise _not_trustworthy(files, _reason(exc)) from exc
    _show_certificate(files, context)
    return context


def fill_context(files: TlsFiles, context: ssl.SSLContext) -> None:
    """Load the files into a server's SSL context.

    Raises:
        ConfigurationError: a file cannot be read or used, or there is no certificate.
    """
    if files.certfile is None:
        raise ConfigurationError("a server with TLS has no certificate; name it with --ssl-certfile (certfile=)")
    _show_certificate(files, context)
    if (trusted := _read_trusted(files)) is not None:
        try:
            context.load_verify_locations(cadata=trusted)
        except ssl.SSLError as exc:
            raise _not_trustworthy(files, _reason(exc)) from exc
        context.verify_mode = ssl.CERT_REQUIRED


def read_files(files: TlsFiles) -> bytes:
    """Return the concatenated contents of all files, for detecting changes.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    paths = {"the certificate": files.certfile, "the private key": files.keyfile, _TRUSTED: files.ca_certs}
    return b"\0".join(_read(what, path) for what, path in paths.items() if path is not None)


def _show_certificate(files: TlsFiles, context: ssl.SSLContext) -> None:
    if files.certfile is None:
        return
    certificate, key_path = _read("the certificate", files.certfile), files.keyfile or files.certfile
    key = _read("the private key", key_path)
    if _CERTIFICATE not in certificate:
        raise ConfigurationError(
            f"{files.certfile} holds no certificate in PEM; name one that does with --ssl-certfile (certfile=)"
        )
    if _KEY not in key:
        raise ConfigurationError(
            f"{key_path} holds no private key in PEM; name the certificate's with --ssl-keyfile (keyfile=)"
        )

    def refuse_passphrase() -> str:
        raise ConfigurationError(
            f"the private key {key_path} has a passphrase, expected one without; "
            "'openssl pkey -in OLD -out NEW' writes it without"
        )

    try:
        context.load_cert_chain(expand_home(files.certfile), expand_home(key_path), refuse_passphrase)
    except OSError as exc:  # includes ssl.SSLError
        if getattr(exc, "reason", None) in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            why = "is not that of the certificate"
        else:
            why = f"cannot be used with the certificate ({_reason(exc)})"
        raise ConfigurationError(
            f"the private key {key_path} {why} {files.certfile}; name both, as they were issued"
        ) from exc


def _read_trusted(files: TlsFiles) -> str | None:
    """The text of `ca_certs`, or None. Refuses an empty file, with which `ssl` would trust the system's authorities."""
    if files.ca_certs is None:
        return None
    trusted = _read(_TRUSTED, files.ca_certs).decode("ascii", errors="ignore")  # non-ASCII is only in comments
    if not trusted:
        raise _not_trustworthy(files, "it is empty")
    return trusted


def _not_trustworthy(files: TlsFiles, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{files.ca_certs} holds no certificates to trust in PEM ({why}); "
        "name a file that does with --ssl-ca-certs (ca_certs=)"
    )


def _read(what: str, path: str | Path) -> bytes:
    try:
        return read_regular(expand_home(path), _MOST_BYTES)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise ConfigurationError(f"{what} {path} cannot be read: {reason}; name a file that can") from exc


def _reason(exc: OSError) -> str:
    """The SSL library's reason in plain words, such as `not enough data`."""
    said = getattr(exc, "reason", None) or exc.strerror or type(exc).__name__
    return str(said).lower().replace("_", " ")
