"""Parallel ranges from a real gateway, through a proxy that cuts or delays answers, and records requests."""

import asyncio
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from surfw.config import MIB
from surfw.errors import IntegrityError, NotFoundError, StorageError
from surfw.retry import RetryPolicy
from surfw.storage import S3Backend, fsspec_backend
from surfw.storage.ranges import ObjectRange
from tests.services.proxy import PASS, Proxy, proxy_to
from tests.services.s3 import S3Service
from tests.storage.test_s3 import connect

SIZE = 33 * MIB + 5
HALVES = [(0, 17 * MIB), (17 * MIB, SIZE)]
"""The ranges of a read of the whole object."""

ONE_BY_ONE = 1
"""Without concurrency, so that a test knows the next range."""

DATA = array("I", range(SIZE // 4 + 1)).tobytes()[:SIZE]


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=3, first_delay_seconds=0.01))


@pytest.fixture(scope="module")
def bucket(s3: S3Service) -> str:
    """A bucket that holds `x`."""
    name = s3.bucket()
    s3.client.put_object(Bucket=name, Key="x", Body=DATA)
    return name


@pytest.fixture
def proxy(s3: S3Service) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint) as running:
        yield running


@pytest.fixture
def backend(s3: S3Service, bucket: str, proxy: Proxy) -> Iterator[S3Backend]:
    made = connect(s3, bucket, endpoint_url=proxy.endpoint)
    yield made
    asyncio.run(made.close())


def read(backend: S3Backend, start: int = 0, stop: int = SIZE, **options: Any) -> bytearray:
    memory = bytearray(stop - start)
    asyncio.run(backend.read_into("x", start, memoryview(memory), **options))
    return memory


def ranges(proxy: Proxy) -> list[str]:
    """The ranges that were requested."""
    lines = [line for head in proxy.asked("GET ") for line in head.split("\r\n")]
    return sorted(line.partition("=")[2] for line in lines if line.lower().startswith("range:"))


def test_a_large_read_is_several_ranges_at_a_time(backend: S3Backend, proxy: Proxy) -> None:
    together = threading.Barrier(2)

    def judge(head: str) -> int:
        together.wait(30)  # each waits for the others, so sequential requests would never end
        return PASS

    proxy.judge = judge
    assert read(backend) == DATA
    assert ranges(proxy) == sorted(f"{start}-{stop - 1}" for start, stop in HALVES)
    assert proxy.most_at_once == 2


def test_any_part_of_an_object(backend: S3Backend) -> None:
    assert read(backend, 3, SIZE - 3) == DATA[3:-3]
    assert asyncio.run(backend.load("x")) == DATA
    assert asyncio.run(backend.load_range("x", SIZE - 4, SIZE)) == DATA[-4:]
    assert read(backend, 7, 7) == b""


@pytest.mark.parametrize("most", [0, 1, 70_000, 3 * MIB])
def test_an_answer_that_is_cut_off_is_asked_for_again(backend: S3Backend, proxy: Proxy, most: int) -> None:
    assert read(backend, 0, 1) == DATA[:1]
    cut = iter([most, most])
    proxy.judge = lambda head: next(cut, PASS)
    assert read(backend) == DATA
    assert len(ranges(proxy)) == 1 + len(HALVES) + 2
    assert set(ranges(proxy)[1:]) == {f"{start}-{stop - 1}" for start, stop in HALVES}, "nothing was verified"


def test_what_was_verified_before_a_cut_is_not_asked_for_again(backend: S3Backend, proxy: Proxy) -> None:
    assert read(backend, 0, 1) == DATA[:1]
    start, stop, found = 9, 9 + 5 * MIB, list[tuple[int, bytes]]()
    cut, memory = iter([3 * MIB + MIB // 2, MIB // 2]), bytearray(stop - start)
    proxy.judge = lambda head: next(cut, PASS)

    def check(at: int, piece: memoryview) -> None:
        found.append((at, bytes(piece)))

    asyncio.run(backend.read_range(ObjectRange("x", start, len(memory)), memoryview(memory), check))
    assert memory == DATA[start:stop]
    again = start + 3 * MIB
    assert ranges(proxy) == sorted(["0-0", f"{start}-{stop - 1}", *[f"{again}-{stop - 1}"] * 2])
    assert b"".join(piece for _, piece in sorted(found)) == memory, "every byte is verified once"


def test_a_gateway_that_never_answers_whole_is_one_clear_error(backend: S3Backend, proxy: Proxy) -> None:
    proxy.judge = lambda head: 5
    for tries in (2, 2 + 1 + 3):  # 2 for a storage that was never reached; then one is answered, and 3 more fail
        with pytest.raises(StorageError, match=rf"^{backend.url}: {proxy.endpoint} cannot be reached \(ConnectionClos"):
            read(backend, 0, 100)
        assert len(ranges(proxy)) == tries
        proxy.judge = lambda head: PASS if len(ranges(proxy)) == 3 else 5
        if tries == 2:
            assert read(backend, 0, 100) == DATA[:100]


def replaced_meanwhile(s3: S3Service, proxy: Proxy) -> str:
    """A bucket whose object `x` is replaced when its second range is requested."""
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="x", Body=DATA)

    def judge(head: str) -> int:
        if len(ranges(proxy)) == 2:
            s3.client.put_object(Bucket=bucket, Key="x", Body=DATA[::-1])
        return PASS

    proxy.judge = judge
    return bucket


def test_an_object_that_is_replaced_meanwhile_is_an_error(s3: S3Service, proxy: Proxy) -> None:
    bucket = replaced_meanwhile(s3, proxy)
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint, max_concurrency=ONE_BY_ONE)
    with pytest.raises(StorageError, match=rf"^x in {backend.url} was changed: its revision is .* expected \"[0-9a-f]"):
        read(backend)
    assert len(ranges(proxy)) == 2, "it is not tried again"
    proxy.judge = lambda head: PASS
    assert read(backend) == DATA[::-1]


def test_a_load_begins_anew_when_the_object_is_replaced(s3: S3Service, proxy: Proxy) -> None:
    bucket = replaced_meanwhile(s3, proxy)
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint, max_concurrency=ONE_BY_ONE)
    assert asyncio.run(backend.load("x")) == DATA[::-1]


def test_a_pinned_revision_is_asked_for(backend: S3Backend, proxy: Proxy) -> None:
    pinned = asyncio.run(backend.revision("x"))
    assert pinned is not None
    assert read(backend, 0, 9, revision=pinned) == DATA[:9]
    assert pinned in proxy.asked("GET ", "If-Match")[0]
    with pytest.raises(StorageError, match=r"^x in .* was changed: its revision is another now, expected \"other\""):
        read(backend, 0, 9, revision='"other"')
    assert len(proxy.asked("GET ")) == 2


def test_what_will_not_pass_is_not_tried_again(s3: S3Service, proxy: Proxy, backend: S3Backend, bucket: str) -> None:
    with pytest.raises(NotFoundError, match=r"^y in .*: not found"):
        asyncio.run(backend.load("y"))
    account = s3.stranger
    keys = {"aws_access_key_id": account.key, "aws_secret_access_key": account.secret}
    with pytest.raises(StorageError, match="permission denied"):
        read(connect(s3, bucket, endpoint_url=proxy.endpoint, **keys), 0, 9)
    assert len(proxy.asked("GET ")) == 2


def test_nothing_is_written_after_a_cancellation(backend: S3Backend, proxy: Proxy) -> None:
    held, asked = threading.Event(), threading.Event()

    def judge(head: str) -> int:
        asked.set()
        held.wait(30)
        return PASS

    proxy.judge = judge
    memory = bytearray(SIZE)

    async def cancel() -> None:
        task = asyncio.create_task(backend.read_into("x", 0, memoryview(memory)))
        assert await asyncio.to_thread(asked.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    held.set()
    deadline = time.monotonic() + 30
    while proxy.at_once and time.monotonic() < deadline:
        time.sleep(0.01)
    assert memory == bytes(SIZE)


def test_a_cancellation_in_the_middle_of_an_answer_does_not_wait_for_the_rest(
    s3: S3Service, bucket: str, proxy: Proxy
) -> None:
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint, config_kwargs={"read_timeout": 3600})
    memory, proxy.judge, arrived = bytearray(2 * MIB), lambda head: 3 * MIB // 2, threading.Event()
    proxy.may_cut.clear()

    async def cancel() -> None:
        part = ObjectRange("x", 0, len(memory))
        task = asyncio.create_task(backend.read_range(part, memoryview(memory), lambda at, piece: arrived.set()))
        await asyncio.to_thread(arrived.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(cancel())
        left = bytes(memory)
    finally:
        proxy.may_cut.set()
    asyncio.run(backend.close())
    assert left == memory


def read_verified(backend: S3Backend, size: int, check: Callable[[int, memoryview], None]) -> bytearray:
    memory = bytearray(size)
    asyncio.run(backend.read_range(ObjectRange("x", 0, size), memoryview(memory), check))
    return memory


def test_a_block_that_is_wrong_after_a_cut_is_told_by_its_place_and_not_asked_for_again(
    backend: S3Backend, proxy: Proxy
) -> None:
    cut = iter([3 * MIB])
    proxy.judge = lambda head: next(cut, PASS)

    def check(at: int, piece: memoryview) -> None:
        if at >= 4 * MIB:
            raise IntegrityError(f"the block at {at} is wrong")
        assert piece == DATA[at : at + len(piece)]

    with pytest.raises(IntegrityError, match=f"^the block at {4 * MIB} is wrong"):
        read_verified(backend, 6 * MIB, check)
    assert len(ranges(proxy)) == 2


def test_an_object_that_is_replaced_at_a_cut_is_an_error(s3: S3Service, proxy: Proxy) -> None:
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="x", Body=DATA)
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint)

    def judge(head: str) -> int:
        if len(ranges(proxy)) == 1:
            return 3 * MIB
        s3.client.put_object(Bucket=bucket, Key="x", Body=DATA[::-1])
        return PASS

    proxy.judge = judge
    with pytest.raises(StorageError, match=r"^x in .* was changed: its revision is another now"):
        read_verified(backend, 6 * MIB, lambda at, piece: None)
    assert len(ranges(proxy)) == 2


def test_an_upload_goes_in_parts_few_at_a_time(s3: S3Service, proxy: Proxy, tmp_path: Path) -> None:
    bucket, file = s3.bucket(), tmp_path / "whole"
    file.write_bytes(DATA * 3)
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint)
    together, first = threading.Barrier(4), itertools.count()

    def judge(head: str) -> int:
        if "partNumber" in head and next(first) < 4:
            together.wait(30)  # sequential requests would never end
        return PASS

    proxy.judge = judge
    asyncio.run(backend.adopt("x", file))
    parts = proxy.asked("PUT ", "partNumber")
    lengths = [int(line.partition(":")[2]) for head in parts for line in head.split("\r\n") if "Content-Length" in line]
    assert sorted(lengths)[-6:] == [16 * MIB] * 6
    assert (len(parts), max(lengths), proxy.most_at_once) == (7, 16 * MIB, 4)
    assert s3.client.get_object(Bucket=bucket, Key="x")["Body"].read() == DATA * 3


def test_an_upload_that_fails_leaves_nothing(s3: S3Service, proxy: Proxy, tmp_path: Path) -> None:
    bucket, file = s3.bucket(), tmp_path / "whole"
    file.write_bytes(DATA)
    proxy.judge = lambda head: 0 if "partNumber=2" in head else PASS
    backend = connect(s3, bucket, endpoint_url=proxy.endpoint)
    with pytest.raises(StorageError, match="cannot be reached"):
        asyncio.run(backend.adopt("x", file))
    assert s3.client.list_objects_v2(Bucket=bucket).get("Contents") is None
    assert s3.client.list_multipart_uploads(Bucket=bucket).get("Uploads") is None
    assert file.exists()
