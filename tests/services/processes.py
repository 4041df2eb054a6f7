"""Processes of services: in the foreground, on free ports, with a log, and ended with the tests."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PATIENCE_SECONDS = 60
_POLL_SECONDS = 0.05


class ServiceError(Exception):
    """An installed service did not start."""


def missing(*programs: str) -> list[str]:
    """The programs that are not installed."""
    return [program for program in programs if shutil.which(program) is None]


def environment(**more: str) -> dict[str, str]:
    """Variables for system programs, without those of the Python that runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more


def free_port() -> int:
    """A TCP port of the loopback interface that is unused now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; it is killed and waited for at the end, also if the tests are killed."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env or environment(),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a service answers.

    Raises:
        ServiceError: its process ended, or it does not answer.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            state = "does not answer" if ended is None else f"ended with exit code {ended}"
            raise ServiceError(f"{log.stem} {state}; its log ends: {log.read_text(errors='replace')[-1000:]}")
        time.sleep(_POLL_SECONDS)


def answers(port: int, question: bytes, answer: bytes) -> bool:
    """Whether the answer from a local port starts with this."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(question)
        return answer in connection.recv(1024)
    return False
