"""Models of the Hugging Face hub as a storage, as fsspec has it; what its HTTP client raises names the hub."""

from collections.abc import Iterator
from contextlib import contextmanager

from surfw.config import display_text, display_url
from surfw.errors import StorageError, SurfwError
from surfw.storage.fsspec_backend import FsspecBackend


class HubBackend(FsspecBackend):
    """Files under `hf://org/name`."""

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        """As in other storages; an answer of the hub is an `OSError`, so anything else says that there was none."""
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
