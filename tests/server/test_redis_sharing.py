"""What servers share in a Redis: segments are read from the storage once, and Redis failures cause no error."""

import asyncio
import contextlib
import shutil
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

from surfw.client import open_wire_source
from surfw.config import MIB, PAGE_BYTES
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.server import AdvancedWeightServer, redis_tier
from surfw.server.fairness import Reader
from surfw.server.journal import Journal
from surfw.server.pages import MIN_CACHE_BYTES, PageCache
from surfw.server.redis_tier import Pace, RedisTier
from tests.certificates import make_certificate
from tests.peers import tcp_server, whole
from tests.server.backends import RecordingBackend
from tests.services.processes import free_port
from tests.services.redis import redis_cluster, redis_server, require_redis
from tests.stores import make_store, payload

SIZES = [PAGE_BYTES + MIB + 5, *[MIB] * 9]
"""The chunks' sizes: one of two segments, and small ones, so that all kinds of transfers are measured."""
SEGMENTS = 1 + len(SIZES)
LONG_SECONDS = 10


class SlowBackend(RecordingBackend):
    """A folder that takes 20 ms for each read, one after the other, although it claims parallel reads."""

    parallel_reads = 8
    delay = 0.02

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reading = asyncio.Lock()

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        async with self.reading:
            await asyncio.sleep(self.delay)
            await super().read_into(key, start, destination)


class Shared:
    """Caches for one storage, each with its own connection to Redis, as in separate servers."""

    def __init__(self, store: Path, manifest: Manifest, stack: AsyncExitStack) -> None:
        self.backend = SlowBackend(store)
        self.manifest = manifest
        self.right = {chunk.id: payload(store, chunk) for chunk in manifest.chunks}
        self.stack = stack
        self.journal = Journal()

    async def server(self, url: str) -> PageCache:
        """An empty cache."""
        pages, redis = PageCache(self.backend, MIN_CACHE_BYTES, Metrics()), RedisTier(url)
        pages.redis = redis
        self.stack.push_async_callback(pages.close)
        self.stack.push_async_callback(redis.close)
        await redis.open(self.journal)
        return pages

    async def read(self, *servers: PageCache) -> int:
        """Read the model from all of them concurrently, compare every byte, and return the storage's reads."""
        before = len(self.backend.asked)
        for pages in servers:
            pages.cache.clear()
        await asyncio.gather(*(self._read(pages, chunk.id) for pages in servers for chunk in self.manifest.chunks))
        return len(self.backend.asked) - before

    async def _read(self, pages: PageCache, identity: str) -> None:
        (form,) = self.manifest.by_id[identity].forms
        found = bytearray()
        reading = pages.read(form.locations, 0, form.stored_bytes, Reader(), form=form)
        async with contextlib.aclosing(reading) as pieces:
            async for piece in pieces:
                found += await piece.view(0, piece.size)
        assert found == self.right[identity]

    async def read_until(self, true: Callable[[], bool], pages: PageCache) -> None:
        """Read until a condition holds."""
        async with asyncio.timeout(LONG_SECONDS):
            while not true():
                await self.read(pages)

    def events(self) -> list[str]:
        """The recorded events of Redis."""
        return [event["text"] for event in self.journal.recent() if event["kind"] == "redis"]


def tier(pages: PageCache) -> RedisTier:
    assert pages.redis is not None
    return pages.redis


async def written(*servers: PageCache) -> None:
    """Wait for the writes in the background."""
    for pages in servers:
        await asyncio.gather(*(task for task in tier(pages)._tasks if "_write" in repr(task)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("store")
    return folder, make_store(folder, sizes=SIZES)


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty Redis whose settings a test may change."""
    require_redis()
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("own"), port):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture
def redis(own_redis: str) -> Iterator[Redis]:
    with Redis.from_url(own_redis) as client:
        yield client
        client.config_set("maxmemory", 0)
        client.flushall()


@contextlib.asynccontextmanager
async def sharing(store: tuple[Path, Manifest]) -> AsyncIterator[Shared]:
    async with AsyncExitStack() as stack:
        yield Shared(*store, stack)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_second_server_serves_what_the_first_one_read(tmp_path: Path, own_redis: str, redis: Redis) -> None:
    manifest = make_store(tmp_path / "store", sizes=[MIB + 7, 10])
    right = [payload(tmp_path / "store", chunk) for chunk in manifest.chunks]
    reads = [[whole(chunk) for chunk in manifest.chunks] for _ in range(2)]

    def get(server: AdvancedWeightServer, path: str) -> str:
        with urllib.request.urlopen(server.url.replace("ws", "http", 1) + path, timeout=10) as answer:
            return str(answer.read().decode())

    async def main() -> None:
        async with (
            AdvancedWeightServer(tmp_path / "store", own_redis, port=0) as first,
            AdvancedWeightServer(tmp_path / "store", own_redis, port=0) as second,
        ):
            for server, wanted in zip((first, second), reads, strict=True):
                async with await open_wire_source(server.url) as source:
                    await source.fetch(manifest, [read for read, _ in wanted])
                while first.stats()["redis"]["bytes_written"] < MIB + 17:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.01)
                shutil.rmtree(tmp_path / "store/blobs", ignore_errors=True)
            assert [server.stats()["bytes_read"] for server in (first, second)] == [MIB + 17, 0]
            facts = {"url": own_redis, "reachable": True, "hits": 2, "misses": 0, "bytes_read": MIB + 17}
            assert second.stats()["redis"] == facts | {"bytes_written": 0, "poisoned": 0}
            rows = (await asyncio.to_thread(get, second, "/metrics")).splitlines()
            assert {"surfw_redis_hits_total 2.0", "surfw_redis_bypassed_seconds 0.0"} <= set(rows)
            assert await asyncio.to_thread(get, second, "/readyz") == "ok\n"
        assert 0 < redis.pttl(f"surfw:1:{manifest.chunks[0].id}:0") <= 24 * 3600 * 1000  # type: ignore[operator]

    asyncio.run(main())
    assert [bytes(memory) for wanted in reads for _, memory in wanted] == right * 2


def test_one_of_the_servers_reads_the_storage_for_all(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            servers = [await shared.server(own_redis) for _ in range(3)]
            assert await shared.read(*servers) == SEGMENTS
            await written(*servers)
            assert sum(tier(pages).state["bytes_written"] for pages in servers) == sum(SIZES)
            assert redis.keys("*:lock") == []

    asyncio.run(main())


def test_who_does_not_get_what_another_one_is_to_write_reads_the_storage(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            lock = f"surfw:1:{shared.manifest.chunks[3].id}:0:lock"
            redis.set(lock, "of a server that was killed", px=60_000)
            assert await shared.read(pages) == SEGMENTS
            await written(pages)
            assert tier(pages).state["bytes_written"] == sum(SIZES) - MIB
            assert redis.get(lock) == b"of a server that was killed"

    asyncio.run(main())


def test_locks_that_nobody_gives_back_make_redis_slow(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_tier, "_WAIT_SECONDS", 0.2)

    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            for chunk in shared.manifest.chunks:
                for number in range(2):
                    redis.set(f"surfw:1:{chunk.id}:{number}:lock", "of a server that is stuck", px=60_000)
            await shared.read_until(lambda: "bypassed" in tier(pages).state, pages)
            assert tier(pages).state["bypassed"].startswith("slower than the storage")
            assert tier(pages).state["bytes_written"] == 0

    asyncio.run(main())


def test_wrong_values_are_deleted_and_the_storage_is_read(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            assert await shared.read(pages) == SEGMENTS
            await written(pages)
            two, *small = shared.manifest.chunks
            redis.setrange(f"surfw:1:{two.id}:0", PAGE_BYTES - 1, b"\0" if shared.right[two.id][-MIB - 6] else b"\1")
            redis.set(f"surfw:1:{small[0].id}:0", shared.right[small[0].id][:-1])
            redis.set(f"surfw:1:{small[1].id}:0", shared.right[small[2].id])
            redis.delete(f"surfw:1:{small[3].id}:0")
            redis.lpush(f"surfw:1:{small[3].id}:0", "a list")
            assert await shared.read(pages) == 4
            assert tier(pages).state["poisoned"] == 4
            await written(pages)
            assert await shared.read(pages) == 0
            assert "had a wrong value, which is deleted; the storage is read" in shared.events()[-1]

    asyncio.run(main())


def test_what_a_client_found_damaged_is_read_from_the_storage(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            (form,) = shared.manifest.chunks[1].forms
            for fresh, reads in ((False, 1), (True, 2)):
                async for piece in pages.read(form.locations, 0, MIB, Reader(fresh=fresh), form=form):
                    assert await piece.view(0, MIB) == shared.right[shared.manifest.chunks[1].id]
                assert len(shared.backend.asked) == reads
            await written(pages)

    asyncio.run(main())


def test_what_the_storage_has_damaged_is_not_written(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            one, other = (chunk.forms[0] for chunk in shared.manifest.chunks[1:3])
            wrong = replace(one, locations=other.locations)
            async for piece in pages.read(wrong.locations, 0, MIB, Reader(), form=wrong):
                await piece.view(0, MIB)
            await written(pages)
            assert redis.keys("*") == []

    asyncio.run(main())


def test_a_full_redis_is_only_read(store: tuple[Path, Manifest], own_redis: str, redis: Redis) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            pages = await shared.server(own_redis)
            redis.config_set("maxmemory", int(redis.info("memory")["used_memory"]) + 9 * MIB)  # type: ignore[index]
            assert await shared.read(pages) == SEGMENTS
            await written(pages)
            kept = len([key for key in redis.keys("*") if not key.endswith(b":lock")])  # type: ignore[union-attr]
            assert 0 < kept < SEGMENTS
            assert await shared.read(pages) == SEGMENTS - kept
            assert "bypassed" not in tier(pages).state
            assert shared.events()[-1].endswith("takes nothing at the moment, and is only read")

    asyncio.run(main())


def test_wrong_values_and_a_full_redis_while_many_read(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        async with sharing(store) as shared:
            servers = [await shared.server(own_redis) for _ in range(2)]
            _, wrong, missing, *_ = (f"surfw:1:{chunk.id}:0" for chunk in shared.manifest.chunks)
            right = shared.right[shared.manifest.chunks[1].id]
            is_over = asyncio.Event()

            async def read_on(pages: PageCache) -> None:
                while not is_over.is_set():
                    await shared.read(pages)  # it compares every byte

            async def until(true: Callable[[], bool]) -> None:
                async with asyncio.timeout(LONG_SECONDS):
                    while not true():
                        assert not any(reader.done() for reader in readers)
                        await asyncio.sleep(0.01)

            readers = [asyncio.create_task(read_on(pages)) for pages in servers * 3]
            await until(lambda: min(tier(pages).state["hits"] for pages in servers) >= SEGMENTS)
            redis.set(wrong, bytes(MIB))
            await until(lambda: sum(tier(pages).state["poisoned"] for pages in servers) > 0)
            await until(lambda: redis.get(wrong) == right)
            redis.config_set("maxmemory", 1)  # less than it has: it accepts no more data
            redis.delete(missing)
            await until(lambda: any(event.endswith("and is only read") for event in shared.events()))
            before = tier(servers[0]).state["hits"]
            await until(lambda: tier(servers[0]).state["hits"] > before)
            is_over.set()
            await asyncio.gather(*readers)
            assert not redis.exists(missing)
            assert redis.get(wrong) == right

    asyncio.run(main())


def test_a_user_with_few_rights_over_tls(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    require_redis()
    certificate = str(make_certificate(tmp_path))
    plain, port = free_port(), free_port()
    tls = ("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", certificate)
    rights = "on >pa55word ~surfw:1:* +getrange +get +set +del +exists +eval"
    url = f"rediss://few:pa55word@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"

    async def main() -> None:
        async with sharing(store) as shared:
            first, second = [await shared.server(url) for _ in range(2)]
            assert await shared.read(first) == SEGMENTS
            await written(first)
            assert await shared.read(second) == 0
            assert [event.partition("rediss://***@")[0] for event in shared.events()] == ["Redis at "] * 2

    with redis_server(
        tmp_path,
        plain,
        *tls,
        "--tls-cert-file",
        certificate,
        "--tls-key-file",
        certificate,
        "--user",
        "few",
        *rights.split(),
    ):
        asyncio.run(main())


def test_redis_is_killed_and_comes_back_while_it_is_used(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    require_redis()
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"

    async def main() -> None:
        async with sharing(store) as shared:
            with redis_server(tmp_path, port) as process:
                pages = await shared.server(url)
                await shared.read_until(lambda: tier(pages).state["hits"] >= 2 * SEGMENTS, pages)
                reading = asyncio.create_task(shared.read_until(lambda: "bypassed" in tier(pages).state, pages))
                process.kill()
                await reading
            assert await shared.read(pages) == SEGMENTS
            hits = tier(pages).state["hits"]
            with redis_server(tmp_path, port):
                await shared.read_until(lambda: tier(pages).state["hits"] > hits, pages)
                assert [event.partition(url)[2] for event in shared.events()] == [
                    " is reached",
                    " cannot be reached, and the server goes on without it",
                    " is reached",
                ]

    asyncio.run(main())


class Detour:
    """Forwards TCP connections with a delay."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.port = port

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(self.pass_on(reader, back), self.pass_on(there, writer))

    async def pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(MIB):
                if not sink.is_closing():
                    asyncio.get_running_loop().call_later(self.delay / 2, sink.write, data)
        sink.close()


def test_a_redis_that_is_slower_than_the_storage_is_bypassed_meanwhile(
    store: tuple[Path, Manifest], own_redis: str, redis: Redis
) -> None:
    async def main() -> None:
        detour = Detour(urlsplit(own_redis).port or 0)
        async with sharing(store) as shared, tcp_server(detour) as place:
            url = place.replace("ws://", "redis://")
            pages = await shared.server(url)
            assert await shared.read(pages) == SEGMENTS
            await written(pages)
            detour.delay = 0.2
            await shared.read_until(lambda: "bypassed" in tier(pages).state, pages)
            state = tier(pages).state
            assert state["reachable"]
            assert state["bypassed"].startswith("slower than the storage (")
            assert await shared.read(pages) == SEGMENTS
            detour.delay = 0
            await shared.read_until(lambda: "bypassed" not in tier(pages).state, pages)
            assert await shared.read(pages) == 0
            assert shared.events()[-1] == f"Redis at {url} is used again"

    asyncio.run(main())


def test_a_cluster_that_loses_a_node(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    require_redis()

    async def main() -> None:
        with redis_cluster(tmp_path) as nodes:
            async with sharing(store) as shared:
                url = f"redis+cluster://127.0.0.1:{next(iter(nodes))}"
                first, second = [await shared.server(url) for _ in range(2)]
                assert await shared.read(first) == SEGMENTS
                await written(first)
                assert await shared.read(second) == 0
                lost = next(iter(nodes.values()))
                lost.kill()
                await shared.read_until(lambda: "bypassed" in tier(second).state, second)
                hits = tier(second).state["hits"]
                await shared.read_until(lambda: tier(second).state["hits"] >= hits + SEGMENTS, second)
                await written(first, second)

    asyncio.run(main())


def test_a_pace_is_what_readers_wait_for_full_segments() -> None:
    pace = Pace()
    pace.note(0.01, MIB)
    pace.note(9, MIB - 1)
    assert (pace.seconds, pace.samples, str(pace)) == (0.04, 1, "40 ms")
    pace.note(0.08, PAGE_BYTES)
    assert pace.seconds == pytest.approx(0.052)
