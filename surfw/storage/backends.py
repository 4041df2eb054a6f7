"""Open the backend for an address, selected by its scheme. Also contains the backend of the Hugging Face hub.

Schemes are tried in this order: a local path or `file://`; `s3://`; a scheme that an installed package offers as an
entry point of the group `surfw.storage`; a dotted path, such as `my_package.backends.MyBackend://place`; anything else
goes to fsspec. An entry point or dotted path is called with the whole URL and the options, and returns a
`StorageBackend`.

Schemes are case-insensitive (RFC 3986). An address without `://` is a folder. If it looks like a URL or a server and no
such folder exists, it is refused; with `./` in front it is always a folder. Messages never show a possible password.
"""

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from surfw.config import DEFAULT_SILENCE_SECONDS, display_text, display_url, is_server_url
from surfw.errors import ConfigurationError, StorageError, SurfwError
from surfw.files import describe_file, expand_home
from surfw.storage.base import StorageBackend
from surfw.storage.filesystem import FilesystemBackend
from surfw.storage.fsspec_backend import FsspecBackend
from surfw.storage.s3 import S3Backend
from surfw.storage_options import s3_arguments

ENTRY_POINTS = "surfw.storage"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]*")
"""A scheme that is lower-cased. A scheme with dots is a Python path, which is case-sensitive."""

_ALMOST = re.compile(r"([A-Za-z][A-Za-z0-9+-]*)(:/?)(?!/)(.+)")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}(/.*)?")
_USUAL = {"file", "hf", "http", "https", "s3", "ws", "wss"}

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", re.ASCII)


def open_backend(
    url: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
) -> StorageBackend:
    """Return the backend for a local path or a storage URL. Nothing is created or contacted yet.

    Args:
        url: the address.
        options: storage options for the backend; folders ignore them.
        silence_timeout: seconds without progress after which a read of a remote storage fails; an option of the same
            name overrides it. Backends of other packages set their own timeouts.

    Raises:
        ConfigurationError: no storage supports this scheme, its package is missing, an option cannot be used, or the
            address looks like a mistyped URL.
    """
    text, given = read_address(str(url)), dict(options or {})
    scheme, _, rest = text.partition("://")
    if (path := _local_path(text)) is not None:
        folder = FilesystemBackend(path, create=False)
        folder.silence_timeout = silence_timeout  # for the origins of its manifests
        return folder
    patience = {"silence_timeout": silence_timeout}
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Backend(bucket, prefix, **patience | s3_arguments(given))
    if offered := entry_points(group=ENTRY_POINTS, name=scheme):
        entry = next(iter(offered))
        with _opening(text, f"the entry point {entry.name} = {entry.value} fails with ", "; install its package again"):
            found = entry.load()
        return _call(found, text, given)
    if is_server_url(text):
        raise ConfigurationError(
            f"{display_url(text)} is the address of a server, and not a storage; give it to surfw infer --source, or "
            "name a folder, or a URL such as s3://bucket/prefix"
        )
    if _DOTTED.fullmatch(scheme):
        module, _, name = scheme.rpartition(".")
        with _opening(text, f"{scheme} cannot be imported (", "); install its package, or correct the path"):
            found = getattr(importlib.import_module(module), name)
        return _call(found, text, given)
    if "url" in given:
        raise ConfigurationError("storage option url is the address itself; leave it out")
    kind = HubBackend if scheme == "hf" else FsspecBackend
    return kind(text, **patience | given)


def refuse_file(url: str | Path) -> None:
    """Refuse the address of a store or checkpoint if it is a file, and suggest the right folder.

    Raises:
        ConfigurationError: it is a file, or looks like a mistyped URL.
    """
    path = _local_path(read_address(str(url)))
    full = None if path is None else expand_home(path).absolute()
    if full and os.path.isfile(full):  # noqa: PTH113 - it is False for an impossible path, which fails where it is used
        raise ConfigurationError(describe_file(full))


def _local_path(address: str) -> str | None:
    """The local path of an address; None for a remote one."""
    scheme, mark, rest = address.partition("://")
    return address if not mark else rest if scheme == "file" else None


@contextmanager
def _opening(url: str, before: str, after: str) -> Iterator[None]:
    """Raise any failure as a ConfigurationError, with its text between `before` and `after`."""
    try:
        yield
    except SurfwError:
        raise
    except Exception as exc:
        said = f"{type(exc).__name__}: {display_text(' '.join(str(exc).split()))[:200]}"
        raise ConfigurationError(f"storage {display_url(url)} cannot be opened: {before}{said}{after}") from exc


def _call(opener: Callable[..., Any], url: str, options: Mapping[str, Any]) -> StorageBackend:
    shown = display_url(url)
    if not callable(opener):
        raise ConfigurationError(
            f"storage {shown} cannot be opened: its scheme names {type(opener).__name__} object, expected a class or a "
            "function that takes the URL"
        )
    call = f"{getattr(opener, '__name__', 'it')}(url, **options)"
    how = f"; it is called with the URL and the storage options, as in {call}"
    with _opening(url, "its backend fails with ", how):
        backend = opener(url, **options)
    if not isinstance(backend, StorageBackend):
        raise ConfigurationError(
            f"storage {shown} cannot be opened: its scheme gives {type(backend).__name__} object, expected a "
            "StorageBackend; name a class that is one, or a function that makes one"
        )
    return backend


def read_address(text: str) -> str:
    """Return the address with its scheme in lower case.

    Raises:
        ConfigurationError: it looks like a mistyped URL, or like a server's address without a scheme.
    """
    scheme, mark, rest = text.partition("://")
    if mark:
        return f"{scheme.lower()}://{rest}" if _SCHEME.fullmatch(scheme) else text
    if (meant := _meant(text)) and not os.path.lexists(text):
        shown = display_url(meant)
        meant_so = f"if a {'server' if is_server_url(meant) else 'URL'} is meant, write {shown}"
        if shown != meant:
            raise ConfigurationError(f"the address is that of no folder here; {meant_so}")
        raise ConfigurationError(f"{text} is no folder here; {meant_so}; for a folder write ./{text}")
    return text


def _meant(text: str) -> str | None:
    """The URL that was probably meant, if the text looks like one."""
    if _HOST.fullmatch(text):
        return f"ws://{text}"
    if (almost := _ALMOST.fullmatch(text)) and (almost[2] == ":/" or almost[1].lower() in _USUAL):
        return f"{almost[1].lower()}://{almost[3]}"
    return None


class HubBackend(FsspecBackend):
    """Files of a model on the Hugging Face hub, under `hf://org/name`, read through fsspec."""

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        """Translate all errors. An answer of the hub is an `OSError`; anything else means that it did not answer."""
        with super()._translate(what):
            try:
                yield
            except (SurfwError, OSError, NotImplementedError):
                raise
            except Exception as exc:
                said = display_text(" ".join(f"{type(exc).__name__}: {exc}".split()))[:200]
                raise StorageError(
                    f"{self.url}: the hub at {display_url(self.fs.endpoint)} cannot be reached ({said}); check the "
                    "network, or name another hub in HF_ENDPOINT"
                ) from exc
