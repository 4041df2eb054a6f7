"""Two real servers of one model: if one of them fails, a run continues with the other, with exact results."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surfw import RetryPolicy
from surfw.config import BLOCK_BYTES, MIB
from surfw.manifest import Manifest
from surfw.models.client import WeightClient
from surfw.source import ChunkSource
from surfw.sources.failover import Failover
from surfw.testing import Fault, FaultProxy
from tests.servers import serve
from tests.services import warm
from tests.sources.counted import read_all
from tests.stores import make_store, payload

SIZES = [9 * MIB + 5] * 6
QUICK = RetryPolicy(attempts=3, first_delay_seconds=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A store with a model of 54 MiB."""
    store = tmp_path_factory.mktemp("two") / "store"
    return store, make_store(store, sizes=SIZES)


def read_while(
    servers: list[str], model: tuple[Path, Manifest], happens: Callable[[Failover], None], **options: Any
) -> Failover:
    """Read the model through its servers; do something once the first bytes have arrived. The result is checked."""
    store, made = model
    expected = {chunk.name: payload(store, chunk) for chunk in made.chunks}

    async def main(source: ChunkSource) -> Failover:
        assert isinstance(source, Failover)
        manifest = await source.manifest(made.name)
        reading = asyncio.create_task(read_all(source, manifest))
        while not any(one.seconds_per_byte for one in source.standings):  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0.001)
        happens(source)
        assert await reading == expected
        return source

    with WeightClient(servers, retry=QUICK, **options) as client:
        return client.run(main)


def test_a_killed_server_costs_no_more_than_one_range(model: tuple[Path, Manifest]) -> None:
    with (
        serve(model[0]) as one,
        serve(model[0]) as other,
        FaultProxy(one.url, keeps_sent=False) as way,
        FaultProxy(other.url, keeps_sent=False) as detour,
    ):
        source = read_while([way.url, detour.url], model, lambda _: one.process.kill())
        twice = way.passed_bytes + detour.passed_bytes - sum(SIZES)
    assert source.standings[0].why
    assert detour.passed_bytes > MIB
    assert twice <= 8 * MIB


def test_a_link_that_is_cut_for_a_while_is_gone_round(model: tuple[Path, Manifest]) -> None:
    with serve(model[0]) as one, FaultProxy(one.url) as way, FaultProxy(one.url) as detour:
        source = read_while([way.url, detour.url], model, lambda _: way.hold())
        way.release()
    assert source.hedged_ranges > 0


def test_a_suspended_server_is_overtaken(model: tuple[Path, Manifest]) -> None:
    with serve(model[0]) as one, serve(model[0]) as other:
        try:
            source = read_while([one.url, other.url], model, lambda _: one.process.send_signal(signal.SIGSTOP))
        finally:
            one.process.send_signal(signal.SIGCONT)
        assert source.failures > 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(store: Path, port: int) -> warm.Process:
    """Start a server on a port that is chosen before."""
    command = [sys.executable, "-m", "surfw", "serve", "--store", str(store), "--port", str(port)]
    process = warm.start(
        [*command, "--no-live", "--announce"], modules=warm.COMMANDS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    process.stdout.close()
    return process


def test_a_server_that_is_back_within_the_deadline_is_all_it_takes(model: tuple[Path, Manifest]) -> None:
    port = free_port()
    processes = [start(model[0], port)]

    def restart(_: object) -> None:
        processes[-1].kill()
        processes[-1].wait()
        processes.append(start(model[0], port))

    pause = [Fault("delay", at=20 * MIB, amount=3)]  # so that it is killed before it has sent everything
    try:
        with FaultProxy(f"ws://127.0.0.1:{port}", [pause, pause], keeps_sent=False) as way:
            source = read_while([way.url], model, restart, deadline=60)
    finally:
        processes[-1].terminate()
        processes[-1].wait(20)
    assert source.failures > 0


def test_a_rolling_restart_is_not_seen(model: tuple[Path, Manifest]) -> None:
    ports = [free_port(), free_port()]
    processes = [start(model[0], port) for port in ports]
    store, made = model
    expected = {chunk.name: payload(store, chunk) for chunk in made.chunks}

    async def main(source: ChunkSource) -> None:
        manifest = await source.manifest(made.name)
        for index in (0, 1):
            reading = asyncio.create_task(read_all(source, manifest))
            await asyncio.sleep(0.01)
            processes[index].terminate()
            assert await reading == expected
            await asyncio.to_thread(processes[index].wait, 20)
            processes[index] = await asyncio.to_thread(start, store, ports[index])
        assert await read_all(source, manifest) == expected

    try:
        with WeightClient([f"ws://127.0.0.1:{port}" for port in ports], retry=QUICK) as client:
            client.run(main)
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)


def test_a_damaged_disk_sets_its_server_aside(model: tuple[Path, Manifest], tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "store", sizes=SIZES)
    for chunk in damaged.chunks:
        location = chunk.forms[0].locations[0]
        with (tmp_path / "store" / location.object).open("r+b") as file:
            file.seek(location.start + 5 * BLOCK_BYTES + 7)
            file.write(b"?!")
    with serve(tmp_path / "store") as one, serve(model[0]) as other:
        store, made = model

        async def main(source: ChunkSource) -> Failover:
            assert isinstance(source, Failover)
            manifest = await source.manifest(made.name)
            assert await read_all(source, manifest) == {chunk.name: payload(store, chunk) for chunk in made.chunks}
            return source

        with WeightClient([one.url, other.url], retry=QUICK) as client:
            source = client.run(main)
    assert source.standings[0].aside
    assert "damaged" in source.standings[0].why
    assert source.refetched_blocks >= 2
