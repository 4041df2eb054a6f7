"""Options for certificates: only for servers with TLS, and passed on to processes that are started."""

from pathlib import Path

import pytest

from surfw.cli.addresses import Mistake
from surfw.cli.options import TLS_SETTINGS, Configuration, hand_on, tls_for
from surfw.config import TlsFiles
from surfw.settings import Settings, trace_settings


def configuration(config: Path | None = None, **arguments: str) -> Configuration:
    found = trace_settings(config, arguments)
    values = {name: value for name, (value, _) in found.items()}
    return Configuration(Settings(**values), {name: origin for name, (_, origin) in found.items()})


def test_options_are_for_servers_with_tls(tmp_path: Path) -> None:
    given = configuration(ssl_ca_certs="ca.pem")
    assert tls_for(given, "wss://host:1") == TlsFiles(ca_certs="ca.pem")
    for url in ("ws://host:1", "s3://bucket/store", "./store"):
        with pytest.raises(Mistake, match=r"--ssl-ca-certs is for a server with TLS, and .* is none; expected wss://"):
            tls_for(given, url)
    file = tmp_path / "surfw.toml"
    file.write_text("[tool.surfw]\nssl_ca_certs = 'ca.pem'")
    assert tls_for(configuration(file), "wss://host:1") == TlsFiles(ca_certs="ca.pem")
    assert tls_for(configuration(file), "ws://host:1") is None, "a file serves all commands"
    assert tls_for(configuration(), "wss://host:1") is None


def test_settings_are_handed_on_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CA_CERTS", "SSL_CERTFILE", "SSL_KEYFILE"):
        monkeypatch.setenv(f"SURFW_{name}", "")  # so that they are restored
    given = configuration(ssl_certfile="mine.pem", ssl_ca_certs="ca.pem")
    hand_on(given, TLS_SETTINGS)
    assert Settings.load().tls_for("wss://host") == TlsFiles(certfile="mine.pem", ca_certs="ca.pem")
