"""Which source `infer` takes when none is named.

In order: the setting `source`; a surfw server at the setting `port` of 127.0.0.1; the setting `store`, if it is a
folder with models; the demo model. A server that is there and does not let us in is an error: going on to the store
without a word might run other weights than those that were meant.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surfw.cli.demo import serve_demo
from surfw.cli.options import Configuration
from surfw.config import DEFAULT_HOST, is_server_url
from surfw.errors import ConfigurationError, SurfwError

DEMO = "demo"


@dataclass(frozen=True)
class ChosenSource:
    """Where the weights come from, and why."""

    url: str
    reason: str

    @property
    def is_server(self) -> bool:
        """Whether a server is there, and not a store."""
        return is_server_url(self.url)

    def look(self) -> None:
        """Look whether there is a model's folder, if it is one: that can be said before torch is imported.

        Raises:
            NotAStoreError: no store lies there, and no checkpoint.
        """
        from surfw.storage import open_backend
        from surfw.storage.origins import is_local_url
        from surfw.storage.places import is_checkpoint

        if is_local_url(self.url):
            asyncio.run(is_checkpoint(open_backend(self.url)))


@contextlib.contextmanager
def choose_source(configuration: Configuration) -> Iterator[ChosenSource]:
    """The source to take; the demo's server runs as long as the context."""
    settings, origin = configuration.settings, configuration.origins["source"]
    if settings.source is not None and (settings.model != DEMO or origin.kind == "argument"):
        how = {"argument": "with --source", "variable": f"by {origin.name}"}.get(origin.kind, f"in {origin.name}")
        yield ChosenSource(settings.source, f"named {how}")
        return
    if settings.model != DEMO:
        local = f"ws://{DEFAULT_HOST}:{settings.port}"
        if _is_served(local, configuration):
            yield ChosenSource(local, "the server on this machine")
            return
        is_default = configuration.origins["store"].kind == "default"
        if not is_default or any((Path(settings.store).expanduser() / "models").rglob("*.json")):
            yield ChosenSource(settings.store, "the default store" if is_default else "the store that is set")
            return
        if settings.model is not None:
            raise ConfigurationError(
                f"there is no model {settings.model[:80]!a}: no server answers at {local}, and {settings.store} holds "
                "no models; name the source with --source, or chunk the model first"
            )
    with serve_demo() as url:
        yield ChosenSource(url, "the demo model that comes with surfw, through a server of its own")


def _is_served(url: str, configuration: Configuration) -> bool:
    """Whether a surfw server is at the address, and lets us in.

    Raises:
        ConfigurationError: it does not, or nobody says what is there.
    """
    from surfw.client import probe

    settings, token = configuration.settings, configuration.settings.token
    try:
        return asyncio.run(probe(url, settings.connect_timeout, token=token))
    except SurfwError as exc:
        raise ConfigurationError(
            f"{exc}; to run without the server on this machine, name a source with --source, such as {settings.store}"
        ) from exc
