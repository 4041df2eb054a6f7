"""The whole error tree. Every error surfw raises on purpose is one of these, and its text is one line.

    SurfwError
    ├── ConfigurationError          a setting or an argument cannot be used
    ├── StorageError                a storage could not do what was asked
    │   ├── NotFoundError           the object is not there
    │   ├── NotAStoreError          no surfw store lies at the place, or nothing at all
    │   └── StorageFullError        no space is left; nothing half-written stays
    ├── WireError                   something between client and server
    │   ├── ConnectionFailedError   no surfw server answers at the address, or it went away
    │   ├── LocalProtocolError      we broke the protocol: a bug in surfw
    │   ├── RemoteProtocolError     the peer broke the protocol
    │   └── RefusedError            the peer understood and refused; `code` says why
    ├── IntegrityError              bytes are not the bytes that their digest promises
    ├── RankError                   another process of a job that several run together failed, or is gone
    └── ModelError                  something about a model
        ├── ModelClosedError        the model, or the client it reads from, has been closed
        ├── CheckpointError         the source checkpoint is damaged or incomplete
        ├── UnsupportedModelError   surfw cannot run this kind of model or checkpoint
        ├── UnknownModelError       no model of that name; `known` lists the ones there are
        └── ManifestError           a manifest is malformed, or disagrees with its model

An error names the object, what was seen, what was expected and what to do next.
The command line turns any of them into one line on stderr and exit code 1.
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
    """The root of every error surfw raises on purpose."""


class ConfigurationError(SurfwError):
    """A setting or an argument cannot be used as it is."""


class StorageError(SurfwError):
    """A storage could not do what was asked of it."""


class NotFoundError(StorageError):
    """The object asked for is not in the storage."""


class NotAStoreError(StorageError):
    """No surfw store lies at the place, or nothing at all."""


class StorageFullError(StorageError):
    """The storage has no space left."""


class WireError(SurfwError):
    """Something went wrong between a client and a server."""


class ConnectionFailedError(WireError):
    """No surfw server answers at the address, or it went away.

    Attributes:
        transient: whether trying again may help: a connection that was refused or lost, a server with too many clients.
        absent: whether it is sure that no surfw server is there: nothing listens, or something else does.
    """

    def __init__(self, message: str, *, transient: bool = False, absent: bool = False) -> None:
        """Keep beside the text whether trying again may help, and whether anybody is there."""
        super().__init__(message)
        self.transient = transient
        self.absent = absent


class LocalProtocolError(WireError):
    """This side was about to break the protocol: a bug in surfw, not in the peer."""


class RemoteProtocolError(WireError):
    """The peer broke the protocol.

    Attributes:
        close_code: the WebSocket close code that tells the peer so.
    """

    def __init__(self, message: str, *, close_code: int = 1002) -> None:
        """Keep the close code beside the text; 1002 is 'protocol error'."""
        super().__init__(message)
        self.close_code = close_code


class RefusedError(WireError):
    """The peer understood the request and refused it.

    Attributes:
        code: the machine-readable reason, such as `unknown-model` or `unknown-chunk`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        """Keep the reason beside the text."""
        super().__init__(message)
        self.code = code


class IntegrityError(SurfwError):
    """Bytes are not the bytes that their digest promises."""


class RankError(SurfwError):
    """Another process of a job that several run together failed, is gone, or has something else than this one."""


class ModelError(SurfwError):
    """Something about a model prevents the work."""


class ModelClosedError(ModelError):
    """The model, or the client it reads from, has been closed: before this use, or while it ran."""


class CheckpointError(ModelError):
    """The source checkpoint is damaged or incomplete."""


class UnsupportedModelError(ModelError):
    """surfw cannot run this kind of model or checkpoint."""


class UnknownModelError(ModelError):
    """No model has the name that was asked for, or several have it as their last part.

    Attributes:
        known: the names there are, sorted.
    """

    def __init__(self, name: str | None, known: Sequence[str], *, where: str) -> None:
        """Say which names there are instead; `name` None means that none was given and several are there."""
        self.known = sorted(known)
        fitting = [one for one in self.known if one.rpartition("/")[2] == name]
        if not self.known:
            text = f"{where} holds no model yet; put one there with 'surfw chunk MODEL'"
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
    """Which of several models was probably meant, as a question, or nothing. A last part is enough to be like one."""
    full = {one.rpartition("/")[2]: one for one in known} | {one: one for one in known}
    near = get_close_matches(name[:80], full, 1) if len(known) > 1 else ()
    return f"; did you mean {full[near[0]]}?" if near else ""


def _some(names: Sequence[str]) -> str:
    """The names, or as many as a person reads."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


class ManifestError(ModelError):
    """A manifest is malformed, or disagrees with the model it describes.

    Attributes:
        complaint: what is wrong, without advice.
    """

    def __init__(self, complaint: str, *, advice: str = "") -> None:
        """Say what is wrong, and what to do about it."""
        super().__init__(f"{complaint}; {advice}" if advice else complaint)
        self.complaint = complaint


class UninitializedWeightsWarning(UserWarning):
    """A model has weights that its checkpoint does not have; `on_missing="uninitialized"` asked for it all the same."""
