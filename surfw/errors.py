"""The exception hierarchy. Every error that surfw raises on purpose is one of these, with a one-line message.

    SurfwError
    ├── ConfigurationError          a setting or an argument cannot be used
    ├── StorageError                a storage operation failed
    │   ├── NotFoundError           the object does not exist
    │   ├── NotAStoreError          the place is not a surfw store, or does not exist
    │   └── StorageFullError        no space is left; no partial object remains
    ├── WireError                   a failure between client and server
    │   ├── ConnectionFailedError   no surfw server answers at the address, or the connection was lost
    │   ├── LocalProtocolError      this side violated the protocol: a bug in surfw
    │   ├── RemoteProtocolError     the peer violated the protocol
    │   └── RefusedError            the peer refused the request; `code` is the reason
    ├── IntegrityError              bytes do not match their digest
    ├── RankError                   another process of a distributed job failed, or is gone
    └── ModelError                  a problem with a model
        ├── ModelClosedError        the model, or the client it reads from, has been closed
        ├── CheckpointError         the source checkpoint is damaged or incomplete
        ├── UnsupportedModelError   surfw cannot run this kind of model or checkpoint
        ├── UnknownModelError       no model has that name; `known` lists the existing ones
        └── ManifestError           a manifest is malformed, or disagrees with its model

A message names the object, what was seen, what was expected and what to do next.
The command line prints it as one line on stderr and exits with code 1.
"""

from collections.abc import Sequence
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConnectionFailedError",
    "IntegrityError",
    "LocalProtocolError",
    "ManifestError",
    "ModelClosedError",
    "ModelError",
    "NotAStoreError",
    "NotFoundError",
    "RankError",
    "RefusedError",
    "RemoteProtocolError",
    "StorageError",
    "StorageFullError",
    "SurfwError",
    "UninitializedWeightsWarning",
    "UnknownModelError",
    "UnsupportedModelError",
    "WireError",
]

_NAMES_SHOWN = 50


class SurfwError(Exception):
    """The base class of every error that surfw raises on purpose."""


class ConfigurationError(SurfwError):
    """A setting or an argument cannot be used."""


class StorageError(SurfwError):
    """A storage operation failed."""


class NotFoundError(StorageError):
    """The requested object does not exist in the storage."""


class NotAStoreError(StorageError):
    """The place is not a surfw store, or does not exist."""


class StorageFullError(StorageError):
    """The storage has no space left."""


class WireError(SurfwError):
    """A failure between a client and a server."""


class ConnectionFailedError(WireError):
    """No surfw server answers at the address, or the connection was lost.

    Attributes:
        transient: whether a retry may help, as after a refused or lost connection, or if a server has too many clients.
        absent: whether there is certainly no surfw server: nothing listens at the address, or something else does.
    """

    def __init__(self, message: str, *, transient: bool = False, absent: bool = False) -> None:
        super().__init__(message)
        self.transient = transient
        self.absent = absent


class LocalProtocolError(WireError):
    """This side was about to violate the protocol: a bug in surfw, not in the peer."""


class RemoteProtocolError(WireError):
    """The peer violated the protocol.

    Attributes:
        close_code: the WebSocket close code to send to the peer.
    """

    def __init__(self, message: str, *, close_code: int = 1002) -> None:
        """Store the close code; 1002 means protocol error."""
        super().__init__(message)
        self.close_code = close_code


class RefusedError(WireError):
    """The peer understood the request and refused it.

    Attributes:
        code: the machine-readable reason, such as `unknown-model` or `unknown-chunk`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class IntegrityError(SurfwError):
    """Bytes do not match their digest."""


class RankError(SurfwError):
    """Another process of a distributed job failed, is gone, or has another model than this one."""


class ModelError(SurfwError):
    """A problem with a model."""


class ModelClosedError(ModelError):
    """The model, or the client it reads from, has been closed, before this call or during it."""


class CheckpointError(ModelError):
    """The source checkpoint is damaged or incomplete."""


class UnsupportedModelError(ModelError):
    """surfw cannot run this kind of model or checkpoint."""


class UnknownModelError(ModelError):
    """No model has the requested name, or it is the last part of several names.

    Attributes:
        known: the existing names, sorted.
    """

    def __init__(self, name: str | None, known: Sequence[str], *, where: str) -> None:
        """Build the message; `name` is None if no name was given and there are several models, or none."""
        self.known = sorted(known)
        fitting = [one for one in self.known if one.rpartition("/")[2] == name]
        if not self.known:
            or_none = ", or none that the token may read" if where.startswith(("ws://", "wss://")) else ""
            text = f"{where} holds no model yet{or_none}; put one there with 'surfw chunk MODEL'"
        elif name is None:
            text = f"{where} holds {len(self.known)} models; choose one with --model (model=): {_some(self.known)}"
        elif len(fitting) > 1:
            text = f"{where} has {len(fitting)} models {name[:80]!r}; give the name in full: {_some(fitting)}"
        else:
            path = (
                " (a model's name is wanted here, no path)" if name.startswith((".", "/", "~")) or "://" in name else ""
            )
            meant = "" if path else _suggest(name, self.known)
            text = f"{where} has no model {name[:80]!r}{path}; it has: {_some(self.known)}{meant}"
        super().__init__(text)


def _suggest(name: str, known: Sequence[str]) -> str:
    """Ask whether a similar name was meant, by full name or last part; empty if none is similar."""
    full = {one.rpartition("/")[2]: one for one in known} | {one: one for one in known}
    near = get_close_matches(name[:80], full, 1) if len(known) > 1 else ()
    return f"; did you mean {full[near[0]]}?" if near else ""


def _some(names: Sequence[str]) -> str:
    """Join the names, shortened to the first `_NAMES_SHOWN`."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


class ManifestError(ModelError):
    """A manifest is malformed, or disagrees with the model it describes.

    Attributes:
        complaint: what is wrong, without advice.
    """

    def __init__(self, complaint: str, *, advice: str = "") -> None:
        super().__init__(f"{complaint}; {advice}" if advice else complaint)
        self.complaint = complaint


class UninitializedWeightsWarning(UserWarning):
    """A model has weights that its checkpoint lacks, and `on_missing="uninitialized"` allowed that."""
