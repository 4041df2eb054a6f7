"""The demo model on its whole way: chunked once, and served by a real server in a process of its own."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from surfw.checkpoint.demo import demo_checkpoint
from surfw.config import surfw_home
from surfw.errors import StorageError, SurfwError, WireError
from surfw.manifest import VERSION

CHECKPOINT = demo_checkpoint()


@contextlib.contextmanager
def serve_demo() -> Iterator[str]:
    """Serve the demo model on a free loopback port; yields the address.

    Raises:
        WireError: the server did not come up.
    """
    with _demo_store() as store:
        command = [sys.executable, "-m", "surfw", "serve", "--store", str(store), "--port", "0", "--no-live"]
        server = subprocess.Popen(
            [*command, "--announce", "--exit-with-stdin"],
            env={name: value for name, value in os.environ.items() if not name.startswith("SURFW_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends this process, and its end that one
        )
        assert server.stdin is not None, "a pipe was asked for"
        assert server.stdout is not None, "a pipe was asked for"
        try:
            line = server.stdout.readline()
            if not line:
                raise WireError(
                    f"the server of the demo model ended with exit code {server.wait()}; try 'surfw serve --port 0'"
                )
            yield str(json.loads(line)["url"])
        finally:
            server.stdin.close()  # it ends when nobody listens
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(5)
            server.kill()
            server.wait()
            server.stdout.close()


@contextlib.contextmanager
def _demo_store() -> Iterator[Path]:
    """The demo model's store, made on first use in `$SURFW_HOME`, or in a temporary folder if that is read-only."""
    whole = blake3(f"manifest {VERSION}".encode())
    for file in sorted(CHECKPOINT.iterdir()):
        whole.update(file.read_bytes())
    fingerprint = whole.hexdigest()[:16]
    store = surfw_home() / "demo" / fingerprint
    if (store / "models" / "demo.json").exists():
        yield store
        return
    try:
        _chunk_demo(store)
    except StorageError:
        with tempfile.TemporaryDirectory(prefix="surfw-demo-") as folder:
            _chunk_demo(Path(folder))
            yield Path(folder)
        return
    yield store


def _chunk_demo(store: Path) -> None:
    from surfw.chunking.chunker import prepare_model, write_model
    from surfw.storage import open_backend

    try:
        with prepare_model(str(CHECKPOINT), name="demo") as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
    except StorageError:
        raise
    except SurfwError as exc:
        raise SurfwError(f"the demo model that comes with surfw cannot be used: {exc}; install surfw again") from exc
