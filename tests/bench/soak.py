"""Run a server under load for a long time, beside idle connections; no test, for an idle machine.

    python -m tests.bench.soak STORE --minutes 10 --clients 32 --idle 1000

It is `surfw bench clients` with more rounds. Meanwhile, it prints the servers' memory as the system reports it: it must
stay below the ceiling in the result, and must not grow from minute to minute.
"""

import argparse
import sys
import threading
import time
from contextlib import suppress

import psutil

from surfw.bench.clients import ClientsWork, bench_clients
from surfw.config import MB


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_memory(over: threading.Event, seconds: float) -> None:
    """Print the memory and connections of each listening process at intervals."""
    started = time.monotonic()
    while not over.wait(seconds):
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                sockets = process.net_connections()
                if any(one.status == psutil.CONN_LISTEN for one in sockets) and len(sockets) > 1:
                    used = process.memory_full_info()
                    say(
                        f"{time.monotonic() - started:5.0f} s: {process.pid} has {used.rss / MB:.0f} MB, "
                        f"{used.uss / MB:.0f} of them its own; {len(sockets) - 1} sockets, {process.num_fds()} files"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--every", type=float, default=10, help="seconds between lines")
    asked = parser.parse_args()
    work = ClientsWork(store=asked.store, clients=asked.clients, idle=asked.idle, rounds=1, seconds=60 * asked.minutes)
    over = threading.Event()
    printing = threading.Thread(target=print_memory, args=(over, asked.every))
    printing.start()
    try:
        found = bench_clients(work, on_progress=say)
    finally:
        over.set()
        printing.join()
    for row in found.rows:
        ceiling = "" if row.ceiling is None else f" of {row.ceiling:.2f}"
        say(f"{row.name}: {row.value:.2f}{ceiling} {row.unit}")


if __name__ == "__main__":
    main()
