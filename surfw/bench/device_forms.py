"""The parts of `bench device` that make their own models: smaller forms, and a 70B shape."""

import asyncio
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surfw.bench.device_model import SHAPES, a_quarter, make_model, save_model
from surfw.bench.device_streaming import NEW_TOKENS, Measuring, Streaming, make_row
from surfw.config import GB, CodecChoice

_PACKED: Sequence[CodecChoice] = ("int8", "int4")

_LARGER: Mapping[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 12, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
"""A LLaMA of 70B with only some of its layers: all of them, in bfloat16, exceed the memory of most hosts."""

_LARGER_LAYERS = 80
_LARGER_BUDGET_BYTES = 16 * GB


def measure_forms(bench: Measuring) -> None:
    """Measure a part of the model in int8, int4 and lossless, against bfloat16, with the smallest device budget."""
    shape = a_quarter(SHAPES[bench.shape])
    plain, store = bench.folder / "part", bench.folder / "packed"
    start = time.perf_counter()
    _store_packed(shape, bench.device.torch_device, plain, store)
    note = f"{_size(plain) / GB:.2f} GB: {shape['num_hidden_layers']} layers, and as much less of the vocabulary"
    took = time.perf_counter() - start
    bench.say(make_row("a part of the model, made and stored as int8 and int4", took, "s", note=note))
    baseline = None
    forms: Sequence[tuple[str, Path, CodecChoice]] = [
        ("bf16", plain, "none"), *((codec, store, codec) for codec in _PACKED), ("lossless", plain, "auto"),
    ]  # fmt: skip
    for form, source, codec in forms:
        name = f"a part of the model in {form}"
        if form == "lossless" and bench.device.decoder is None:
            bench.say(make_row(f"{name}, streamed", 0, "", note="not offered: Triton is not installed"))
            continue
        streaming = Streaming(source, bench.name, bench.batch, codec=codec)
        try:
            streaming.generate(1)
            note = f"{shape['num_hidden_layers']} layers{_coded(streaming)}"
            found = bench.measure(f"{name}, streamed", streaming, baseline, note)
            bench.say_peak(f"{name}, streamed", streaming)
            seen = streaming.outcome(1, 8)
            streaming.relimit(None)
            equal = seen.equals(streaming.outcome(1, 8))
            bench.say(make_row(f"{name}, streamed: equal to all of it on the device", float(equal), "equal"))
            if form != "lossless":  # resident on the device, lossless is bf16
                whole = streaming.time(1, NEW_TOKENS).per_second
                note = f"streamed: {found / whole:.3f} of it"
                bench.say(make_row(f"{name}, on the device", whole, "tok/s", note=note))
        finally:
            streaming.close()
            gc.collect()
        baseline = baseline or found


def measure_larger(bench: Measuring) -> None:
    """Measure a few layers of a 70B shape in 16 GB of device memory, in bf16 and lossless; extrapolate to all."""
    is_tiny = bench.shape == "tiny"
    shape = a_quarter(SHAPES["tiny"]) if is_tiny else _LARGER
    place, start = bench.folder / "larger", time.perf_counter()
    save_model(make_model(shape, bench.device.torch_device), place)
    gc.collect()
    took = time.perf_counter() - start
    bench.say(make_row("a 70B shape, made and written", took, "s", note=f"{_size(place) / GB:.1f} GB"))
    baseline = None
    forms: Sequence[tuple[str, CodecChoice]] = [("bf16", "none"), ("lossless", "auto")]
    for form, codec in forms:
        if form == "lossless" and bench.device.decoder is None:
            continue
        streaming = Streaming(place, bench.name, 1, codec=codec)
        try:
            if is_tiny:
                streaming.relimit(0)
            else:
                streaming.limit(_LARGER_BUDGET_BYTES)
            streaming.generate(1)
            name = f"a 70B shape in {form}, in 16 GB"
            layers, kept = len(streaming.model.layers), streaming.kept_layers
            note = f"{layers} of its {_LARGER_LAYERS} layers{_coded(streaming)}"
            if copied := streaming.engine.copied_per_pass:
                of_all = bench.rate / copied * (layers - kept) / (_LARGER_LAYERS - kept)
                note += f"; of all, with host memory for them, copies allow {of_all:.2f} tok/s"
            found = bench.measure(name, streaming, baseline, note)
            baseline = baseline or found
            bench.say_peak(name, streaming)
        finally:
            streaming.close()
            gc.collect()


def _coded(streaming: Streaming) -> str:
    """The number of coded layers, as an addition to a note; empty if no layer is coded."""
    coded = set(streaming.engine.below.coded).intersection(streaming.model.layers)
    return f", {len(coded)} of them coded" if coded else ""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _store_packed(shape: dict[str, Any], device: torch.device, plain: Path, store: Path) -> None:
    """Make a model of a shape, write its checkpoint, and store it in packed forms."""
    from surfw.chunking import prepare_model, write_model
    from surfw.storage import open_backend

    save_model(make_model(shape, device), plain)
    with prepare_model(str(plain), name="part") as prepared:
        asyncio.run(write_model(prepared, open_backend(store), codecs=_PACKED))
