"""The server's side of TLS, from files that may be replaced while it serves.

Each handshake takes the certificates that were read last: a new context takes the place of the one before as a whole,
so that no handshake sees half of a change. Whoever shows no valid client certificate is told so by TLS's own alert.
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

    asyncio would end the connection at once, and drop the alert that says why. Here the failure waits, as if more were
    to come, until the client has hung up or the time for the handshake is over; the alert goes out meanwhile.
    """

    context: "_Context"
    incoming: ssl.MemoryBIO
    _has_failed = False

    def do_handshake(self) -> None:
        """Go on with the handshake."""
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
        self.incoming.read()  # or it would pile up
        raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the client is being told")


class _Context(ssl.SSLContext):
    """A server's context whose handshakes tell why they fail; `refused` hears of it."""

    sslobject_class = _Handshake
    refused: Callable[[ssl.SSLError], None]

    def wrap_bio(self, incoming: ssl.MemoryBIO, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """Make a session, whose input the handshake can throw away."""
        made = super().wrap_bio(incoming, *arguments, **options)
        assert isinstance(made, _Handshake), "which the class says"
        made.incoming = incoming
        return made


class ServerTls(FromFiles):
    """Certificates from files.

    Attributes:
        context: for the listening socket, as long as the server runs; it hands each handshake on to the latest one.
    """

    shown = "the certificate"

    def __init__(self, files: TlsFiles, refusals: Sparse) -> None:
        """Nothing is read yet; `refusals` are of clients whose certificates are missing or bad."""
        self._files = files
        self._refusals = refusals
        self.context = self._latest = self._make()
        self.context.sni_callback = self._switch
        if files.ca_certs is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED  # which a handshake keeps from the first context

    def _make(self) -> _Context:
        context = _Context(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # whose alerts say what is wrong with a client's certificate
        context.num_tickets = 0  # a session that is resumed would not show its certificate again
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
        """Read them into a context."""
        context = self._make()
        fill_context(self._files, context)

        def put_in_force() -> str:
            self._latest = context
            return "new connections see it"

        return put_in_force
