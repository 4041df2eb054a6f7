"""A `redis-server` of the tests' own, which keeps everything in memory."""

from collections.abc import Iterator

import pytest

from tests.services.processes import answers, free_port, missing, running, wait_until


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server, for a cache of at most 64 MB; tests share it, so use keys or databases of your own."""
    from tests.conftest import require

    if missing("redis-server", "setpriv"):
        require("redis-server is not installed; apt-get install redis-server")
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    log = folder / "redis.log"
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "no", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu"]
    with running(command, log) as process:
        wait_until(lambda: answers(port, b"PING\r\n", b"+PONG"), process, log)
        yield f"redis://127.0.0.1:{port}/0"
