"""Measure cold starts over a link of 1 Gbit/s, and compare them with their bounds; no test, for an idle machine.

    python -m tests.bench.cold_start FOLDER     # first makes a checkpoint of 1.1B and its store: 4 GB, a minute

Needs root and iproute2 (`ip`, `tc`): a server of surfw and one of plain files run in a network namespace, behind a pair
of interfaces whose rate is limited in both directions. Each start is a new process, timed until its first token:

- cold: `surfw infer --disk-cache` with an empty cache, where no data waits for the imports;
- cold, nothing kept: the same without a cache;
- second run, and offline: from the cache that the cold run has filled;
- local store: from the same store without a network;
- download: the checkpoint's files over plain HTTP into a folder, and transformers from there;
- serverless: `examples/serverless/cold_start.py`, which times a container's start beside such a download.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surfw.bench.start import _time_to_first_byte
from surfw.config import MB
from surfw.storage import FilesystemBackend, Store
from tests.bench.together import save_random

SPACE, NEAR, FAR = "surfw-far", "10.78.0.2", "10.78.0.1"
RATE, BURST, LATENCY = "1gbit", "1mb", "50ms"
WEIGHTS_PORT, FILES_PORT, RAW_PORT = 8765, 8000, 9000
MOST_OF_ONE_PASS, LEAST_OF_DOWNLOAD = 1.1, 1.5
RAW_BYTES = 400 * MB
TOUCHED_BYTES = 4000 * MB
SERVERLESS = Path(__file__).parents[2] / "examples/serverless/cold_start.py"
PROMPT = "1,2,3,4,5,6,7,8"
SEND = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server, server.accept()[0] as peer:
    for _ in range(int(sys.argv[3]) >> 20):
        peer.sendall(bytes(1 << 20))
"""


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def link() -> Iterator[None]:
    """Make a namespace with the far end of a rate-limited link; both are removed afterwards."""
    run("ip", "netns", "add", SPACE)
    try:
        run("ip", "link", "add", "surfw0", "type", "veth", "peer", "name", "surfw1", "netns", SPACE)
        for name, address, inside in (("surfw0", NEAR, []), ("surfw1", FAR, ["-n", SPACE])):
            run("ip", *inside, "addr", "add", f"{address}/24", "dev", name)
            run("ip", *inside, "link", "set", name, "up")
            shape = ("root", "tbf", "rate", RATE, "burst", BURST, "latency", LATENCY)
            run("tc", *inside, "qdisc", "add", "dev", name, *shape)
        yield
    finally:
        run("ip", "netns", "del", SPACE)


@contextlib.contextmanager
def far(port: int, *command: str) -> Iterator[None]:
    """Run a server at the far end; it is ready when the context begins."""
    inside = ["ip", "netns", "exec", SPACE, *command]
    with subprocess.Popen(inside, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                listens = subprocess.run(
                    ["ip", "netns", "exec", SPACE, "cat", "/proc/net/tcp"], check=True, capture_output=True, text=True
                ).stdout
                if f":{port:04X} 00000000:0000 0A" in listens:
                    break
                time.sleep(0.1)
            else:
                raise SystemExit(f"{' '.join(command)} does not listen on port {port}")
            yield
        finally:
            server.terminate()


def touch_memory() -> None:
    """Touch free memory before each start: a virtual machine may have released it, and be slow to get it back."""
    fill = f"import mmap; mmap.mmap(-1, {TOUCHED_BYTES}, flags=34).madvise(23)"  # MADV_POPULATE_WRITE
    subprocess.run([sys.executable, "-c", fill], check=False)


def raw_rate() -> float:
    """Return the bytes per second over one plain TCP connection."""
    buffer, got = bytearray(1 << 20), 0
    with (
        far(RAW_PORT, sys.executable, "-c", SEND, FAR, str(RAW_PORT), str(RAW_BYTES)),
        socket.create_connection((FAR, RAW_PORT)) as peer,
    ):
        start = time.perf_counter()
        while read := peer.recv_into(buffer):
            got += read
        return got / (time.perf_counter() - start)


def main() -> None:
    """Measure, and print each figure and its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", help="the starts to measure; default: all")
    given = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("only root can make a shaped link")
    checkpoint, store = given.folder / "random", given.folder / "store"
    make(checkpoint, store)
    data = (store / "models" / "random.json").read_bytes()
    manifest = Store(FilesystemBackend(store)).parse_manifest("random", data)
    size = sum(min(form.stored_bytes for form in chunk.forms) for chunk in manifest.chunks)
    with tempfile.TemporaryDirectory(prefix="surfw-cold-", dir=given.folder) as cache, link():
        rate = raw_rate()
        one_pass = size / rate
        tell(f"the link: {rate / MB:.1f} MB/s; one pass: {size / MB:.0f} MB, {one_pass:.2f} s")
        seconds = measure(checkpoint, store, Path(cache) / "cache", given.only, one_pass)
    if "cold" in seconds:
        tell(f"cold: {seconds['cold'] / one_pass:.3f} of one pass; at most {MOST_OF_ONE_PASS}")
    if {"cold", "download"} <= seconds.keys():
        tell(f"download / cold: {seconds['download'] / seconds['cold']:.2f}; at least {LEAST_OF_DOWNLOAD}")


def make(checkpoint: Path, store: Path) -> None:
    """Make the checkpoint and its store if they are missing; keep all of it in memory, as the far side does."""
    if not (checkpoint / "tokenizer.json").exists():
        save_words(checkpoint, save_random(checkpoint).config.vocab_size)
    if not (store / "models" / "random.json").exists():
        run(sys.executable, "-m", "surfw", "chunk", str(checkpoint), "--store", str(store), "--codec", "none,lossless")
    os.sync()  # so that new files are not written to disk during a measurement
    for file in [*store.rglob("*"), *checkpoint.iterdir()]:
        if file.is_file():
            run("cp", str(file), "/dev/null")


def save_words(checkpoint: Path, count: int) -> None:
    """Save a tokenizer in which each id is a word, so that any token gives text."""
    tokenizer = Tokenizer(models.WordLevel({f"word{index}": index for index in range(count)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(checkpoint)


def measure(
    checkpoint: Path, store: Path, cache: Path, only: Collection[str] | None, one_pass: float
) -> dict[str, float]:
    """Return the seconds of each start."""
    infer = [sys.executable, "-m", "surfw", "infer", "--prompt-ids", PROMPT, "--max-new-tokens", "1", "--quiet"]
    served = [*infer, "--source", f"ws://{FAR}:{WEIGHTS_PORT}"]
    kept = [*served, "--disk-cache", "20GB", "--cache-dir", str(cache)]
    commands = {
        "cold": kept,
        "second run": kept,
        "offline": [*kept, "--offline"],
        "cold, nothing kept": served,
        "local store": [*infer, "--source", str(store)],
        "download": [sys.executable, "-m", "surfw.bench.peers.download", f"http://{FAR}:{FILES_PORT}/", PROMPT],
    }
    server = [sys.executable, "-m", "surfw", "serve", "--store", str(store), "--host", FAR, "--insecure", "--no-live"]
    files = [sys.executable, "-m", "http.server", str(FILES_PORT), "--bind", FAR, "--directory", str(checkpoint)]
    seconds = {}
    with far(WEIGHTS_PORT, *server), far(FILES_PORT, *files):
        for name in [name for name in commands if not only or name in only]:
            if name == "download":
                shutil.rmtree(cache, ignore_errors=True)  # it would need 2 GB more of the disk
            touch_memory()
            seconds[name] = _time_to_first_byte(name, commands[name])
            tell(f"{name}: {seconds[name]:.2f} s, {seconds[name] / one_pass:.2f} of one pass")
        if not only or "serverless" in only:
            shutil.rmtree(cache, ignore_errors=True)
            run(sys.executable, str(SERVERLESS), f"ws://{FAR}:{WEIGHTS_PORT}", f"http://{FAR}:{FILES_PORT}/")
    return seconds


if __name__ == "__main__":
    main()
