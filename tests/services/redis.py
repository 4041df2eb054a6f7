"""A `redis-server` for the tests, which keeps everything in memory, or six of them as a cluster."""

import contextlib
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.services.processes import answers, free_port, missing, running, wait_until

NODES = 6
"""Three nodes with the keys, and a replica of each."""


@contextlib.contextmanager
def redis_server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Redis on a local port; yields when it answers."""
    log = folder / f"redis-{port}.log"
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    with running([*command, "--appendonly", "no", *options], log) as process:
        wait_until(lambda: answers(port, b"PING\r\n", b"+PONG"), process, log)
        yield process


def require_redis() -> None:
    """Skip the test, or fail it, if Redis is not installed."""
    from tests.conftest import require

    if missing("redis-server", "redis-cli", "setpriv"):
        require("redis-server is not installed; apt-get install redis-server")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis with at most 64 MB, which tests share: use separate keys or databases."""
    require_redis()
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    with redis_server(folder, port, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu"):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def redis_cluster(folder: Path) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """The ports of a cluster's nodes, those with the keys first; a lost node is replaced within a second."""
    ports = [free_port() for _ in range(NODES)]
    with contextlib.ExitStack() as stack:
        nodes = {}
        for port in ports:
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500")
            options += ("--cluster-config-file", f"nodes-{port}.conf", "--cluster-port", str(free_port()))
            options += ("--repl-diskless-sync-delay", "0")  # only a synchronised replica can replace a node
            nodes[port] = stack.enter_context(redis_server(folder, port, *options))
        places = [f"127.0.0.1:{port}" for port in ports]
        create = ["redis-cli", "--cluster", "create", *places, "--cluster-replicas", "1", "--cluster-yes"]
        subprocess.run(create, check=True, capture_output=True, timeout=60)
        for port, node in nodes.items():
            log = folder / f"redis-{port}.log"
            wait_until(partial(answers, port, b"CLUSTER INFO\r\n", b"cluster_state:ok"), node, log)
            is_filled = b"role:master" if port in ports[: NODES // 2] else b"master_link_status:up"
            wait_until(partial(answers, port, b"INFO replication\r\n", is_filled), node, log)
        yield nodes
