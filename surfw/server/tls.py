"""The server's side of TLS, from files that may be replaced while it runs.

Each handshake uses the certificates that were read last: a new context replaces the previous one as a whole, so that no
handshake sees half of a change. A client without a valid certificate receives TLS's own alert.
"""

import ssl
from collections.abc import Callable
from typing import Any

from surfw.config import TlsFiles
from surfw.server.journal import Sparse
from surfw.server.reloading import FromFiles
from surfw.tls import fill_context, read_files

_NO_CERTIFICATE = "PEER_DID_NOT_RETURN_A_CERTIFICATE"


class _Handshake(ssl.SSLObject):
    """A session whose handshake may fail because of the client's certificate.

    asyncio would end the connection at once, and drop the alert with the reason. Here the failed handshake pretends to
    wait for more input, until the client hangs up or the handshake times out; meanwhile the alert is sent.
    """

    context: "_Context"
    incoming: ssl.MemoryBIO
    _has_failed = False

    def do_handshake(self) -> None:
        """Continue the handshake."""
        if not self._has_failed:
            try:
                super().do_handshake()
            except ssl.SSLError as exc:
                if not isinstance(exc, ssl.SSLCertVerificationError) and exc.reason != _NO_CERTIFICATE:
                    raise
                self._has_failed = True
                self.context.refused(exc)
            else:
                return
        self.incoming.read()  # discard input, which would pile up
        raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the client is being told")


class _Context(ssl.SSLContext):
    """A server's context whose handshakes report failures to clients and to `refused`."""

    sslobject_class = _Handshake
    refused: Callable[[ssl.SSLError], None]

    def wrap_bio(self, incoming: ssl.MemoryBIO, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """Create a session whose handshake can discard its input."""
        made = super().wrap_bio(incoming, *arguments, **options)
        assert isinstance(made, _Handshake), "which the class says"
        made.incoming = incoming
        return made


class ServerTls(FromFiles):
    """Certificates from files.

    Attributes:
        context: for the listening socket, as long as the server runs; its handshakes switch to the latest context.
    """

    shown = "the certificate"

    def __init__(self, files: TlsFiles, refusals: Sparse) -> None:
        """Start without reading anything; `refusals` are of clients whose certificates are missing or invalid."""
        self._files = files
        self._refusals = refusals
        self.context = self._latest = self._make()
        self.context.sni_callback = self._switch
        if files.ca_certs is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED  # a handshake takes this from the first context

    def _make(self) -> _Context:
        context = _Context(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # its alerts say what is wrong with a client's certificate
        context.num_tickets = 0  # a resumed session would not present its certificate again
        context.refused = self._note_refusal
        return context

    def _switch(self, session: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        session.context = self._latest

    def _note_refusal(self, exc: ssl.SSLError) -> None:
        why = "it shows no certificate"
        if isinstance(exc, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted: {exc.verify_message}"
        self._refusals.note(f"a client is refused: {why}")

    def contents(self) -> bytes:
        """Read the files."""
        return read_files(self._files)

    def load(self, _: bytes) -> Callable[[], str]:
        """Load them into a new context."""
        context = self._make()
        fill_context(self._files, context)

        def put_in_force() -> str:
            self._latest = context
            return "new connections see it"

        return put_in_force
