"""Compare two cold starts: this folder's container, and downloading the checkpoint before loading it.

    python examples/serverless/cold_start.py ws://127.0.0.1:8765 https://host/my-model --rounds 3

The first argument is any source of `surfw infer`. The second is the URL of the folder with the files of the same
checkpoint; both should be behind the same link.

The weights are pulled once before, as for an image. Then each round times both ways until their first token, each in a
new process:

- The web service of `fastapi_app.py`, offline, with the pulled weights. It cannot write to its home or the cache, as in
  a container started with `--read-only`.
- transformers: all files are downloaded, several at a time, before `from_pretrained` loads them.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent
NO_HOME = "/dev/null/home"
"""A home in which not even root can create files."""


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the folder read-only in this context."""
    places = [folder, *folder.rglob("*")]
    for place in places:
        place.chmod(place.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        for place in places:
            place.chmod(place.stat().st_mode | 0o200)


def time_service(source: str, cache: Path) -> float:
    """Return the seconds until the web service has sent the first byte of an answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--app-dir", str(EXAMPLES), "--port", str(port)]
    places = {"SURFW_SOURCE": source, "SURFW_CACHE_DIR": str(cache), "SURFW_OFFLINE": "true", "HOME": NO_HOME}
    began = time.perf_counter()
    service = subprocess.Popen([*command, "--log-level", "warning"], env=os.environ | places)
    try:
        while service.poll() is None:
            try:
                url = f"http://127.0.0.1:{port}/generate?prompt=Weight&max_new_tokens=1"
                with urllib.request.urlopen(url, timeout=600) as answer:
                    if not answer.read(1):
                        raise SystemExit("the service answered with nothing")
                return time.perf_counter() - began
            except urllib.error.URLError as exc:  # its port is not open yet
                if not isinstance(exc.reason, ConnectionError):
                    raise
                time.sleep(0.01)
        raise SystemExit(f"the service ended with exit code {service.returncode}")
    finally:
        service.terminate()
        service.wait()


def time_download(url: str) -> float:
    """Return the seconds until transformers has a token, including the checkpoint's download."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "surfw.bench.peers.download", url, "1,2,3"]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - began


def main() -> None:
    """Parse the options, measure, and print the times."""
    parser = argparse.ArgumentParser(description="First tokens of cold starts.")
    parser.add_argument("source")
    parser.add_argument("download")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "weights"
        pull = [sys.executable, "-m", "surfw", "pull", "--source", given.source, "--cache-dir", str(cache), "--quiet"]
        subprocess.run(pull, check=True, stdout=sys.stderr)
        ours, theirs = [], []
        with read_only(cache):
            for _ in range(given.rounds):
                ours.append(time_service(given.source, cache))
                theirs.append(time_download(given.download))
    for what, seconds in (("warm disk cache, read-only home", ours), ("download, then transformers", theirs)):
        median = statistics.median(seconds)
        print(f"{what}: first token after {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"{statistics.median(theirs) / statistics.median(ours):.2f} times as fast")


if __name__ == "__main__":
    main()
