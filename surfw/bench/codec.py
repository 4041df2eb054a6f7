"""Encoding and decoding the form `lossless`, against Blosc's own functions on the same frames.

The payload resembles weights: normally distributed numbers in bfloat16. Each round runs everything three times in
alternation, so that other load on the machine affects all of it alike, and keeps the medians. Decoding in threads is
compared with Blosc in as many threads, which other processes slow down equally; its ceiling is the rate of one thread
times the number of threads.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numcodecs import blosc

from surfw.bench.result import Result, Row, Spread, describe_machine, rate_row, summarise_rates
from surfw.codec.lossless import DECODERS, FRAME_BYTES, FrameDecoder, decode_frame, encode_frame
from surfw.config import MB, MIB

SIZE = 64 * MIB
_ITEM_BYTES, _LEVEL = 2, 1
_TURNS = 3

Decode = Callable[[bytes, memoryview], object]
"""Decodes a frame into memory."""


def bench_codec(*, rounds: int = 15, size: int = SIZE) -> Result:
    """Run the benchmark.

    Args:
        rounds: number of rounds; medians are reported.
        size: bytes of the payload; about three times as much memory is used.
    """
    payload = memoryview(_weights(size))
    frames = [payload[start : start + FRAME_BYTES] for start in range(0, size, FRAME_BYTES)]
    coded = [bytes(encode_frame(frame, _ITEM_BYTES)) for frame in frames]
    into = memoryview(bytearray(size))
    places = [into[start : start + FRAME_BYTES] for start in range(0, size, FRAME_BYTES)]
    joined = memoryview(b"".join(coded))
    sizes = [len(one) for one in coded]
    parts = [[frames[first::DECODERS] for first in range(DECODERS)] for frames in (coded, places)]
    with ThreadPoolExecutor(DECODERS) as threads:
        list(threads.map(int, range(DECODERS)))
        ways: dict[str, Callable[[], object]] = {
            "copy": lambda: into.__setitem__(slice(None), payload),
            "blosc encode": lambda: [_blosc_encode(frame) for frame in frames],
            "encode": lambda: [encode_frame(frame, _ITEM_BYTES) for frame in frames],
            "blosc decode": lambda: _decode_all(blosc.decompress, coded, places),
            "decode": lambda: _decode_all(decode_frame, coded, places),
            "blosc threads": lambda: list(threads.map(partial(_decode_all, blosc.decompress), *parts)),
            "threads": lambda: _decode_in_threads(threads, FrameDecoder(joined, into, sizes), len(joined)),
        }
        rates = {name: summarise_rates(size, taken) for name, taken in _measure(ways, rounds).items()}
    if into != payload:
        raise RuntimeError("what was decoded is not what was encoded; nothing was measured")
    return Result(benchmark="codec", machine=describe_machine("numcodecs"), rows=_rows(rates, len(joined) / size, size))


def _weights(size: int) -> bytes:
    """Normally distributed numbers in bfloat16: the upper halves of float32."""
    numbers = np.random.default_rng(0).normal(0, 0.02, size // _ITEM_BYTES).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _blosc_encode(frame: memoryview) -> bytes:
    coded: bytes = blosc.compress(frame, b"zstd", _LEVEL, blosc.SHUFFLE, len(frame), typesize=_ITEM_BYTES)
    return coded


def _decode_all(decode: Decode, coded: Sequence[bytes], places: Sequence[memoryview]) -> None:
    for one, place in zip(coded, places, strict=True):
        decode(one, place)


def _decode_in_threads(threads: ThreadPoolExecutor, decoder: FrameDecoder, arrived: int) -> None:
    for work in [threads.submit(decoder.decode, arrived) for _ in range(DECODERS)]:
        work.result()


def _measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each way's median turn in each round, after one untimed run of each."""
    for work in ways.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        turns: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_TURNS):
            for name, work in ways.items():
                start = time.perf_counter()
                work()
                turns[name].append(time.perf_counter() - start)
        for name, taken in turns.items():
            seconds[name].append(statistics.median(taken))
    return seconds


def _rows(rates: dict[str, Spread], share: float, size: int) -> tuple[Row, ...]:
    alone = rates["blosc decode"].value
    return (
        rate_row("copying the payload", rates["copy"]),
        rate_row("Blosc alone, encoding", rates["blosc encode"]),
        rate_row("encode", rates["encode"], rates["blosc encode"]),
        rate_row("Blosc alone, decoding", rates["blosc decode"]),
        rate_row("decode", rates["decode"], rates["blosc decode"], ceiling=alone, verified=True),
        rate_row(f"Blosc alone, decoding, {DECODERS} threads", rates["blosc threads"]),
        rate_row(
            f"decode, {DECODERS} threads", rates["threads"], rates["blosc threads"], ceiling=alone * DECODERS,
            verified=True,
        ),
        Row(name="coded bytes", value=share * size / MB, unit="MB", baseline=size / MB, ratio=share),
    )  # fmt: skip
