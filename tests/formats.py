"""The kinds of checkpoints: each is made here and given to surfw. The guide's table of formats shows the outcomes.

This checks only what a user is told; other tests check the weights and answers. `test_formats.py` in `tests/chunking`
compares the table with the page; `python -m tests.regenerate` writes it.
"""

import asyncio
import functools
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from surfw.chunking import prepare_adapter, prepare_model, read_base, write_model
from surfw.chunking.in_place import build_manifest
from surfw.cli.wording import with_options
from surfw.errors import SurfwError
from surfw.storage import open_backend
from tests.adapters import change_settings, save_adapter
from tests.checkpoints import save_llama
from tests.chunking import test_dequantise as quantised
from tests.chunking import test_gguf as gguf_files
from tests.models import test_tokenizer_files as tokenizers

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
Make = Callable[[Path], object]


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        what: the kind of checkpoint.
        make: makes one in a folder, which already contains a small LLaMA.
        options: options of `surfw chunk`, by their Python names; `base` for an adapter.
        extra: the extra of surfw that is needed to read it.
    """

    what: str
    make: Make
    options: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""


def move(old: str, new: str) -> Make:
    def work(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)

    return work


def tensors(work: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Make:
    """Replace a checkpoint's tensors."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(work(load_file(file)), file, metadata={"format": "pt"})

    return change


def pickled(work: Callable[[dict[str, Any]], Any] = lambda tensors: tensors) -> Make:
    """Replace a safetensors file with a `.bin` file."""

    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(work(found), folder / "pytorch_model.bin")

    return change


def distributed(folder: Path) -> None:
    """Replace a safetensors file with the output of `torch.distributed.checkpoint`."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings(action="ignore"):  # this job has only one rank
        dcp.save({"model": found, "step": 3}, checkpoint_id=folder, no_dist=True)


def sharded(folder: Path, *, place: str = "", promised: str = "") -> None:
    """Split it into two shards with an index."""
    found = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for at, part in enumerate((found[:9], found[9:]), 1):
        name = f"{place}model-{at:05}-of-00002.safetensors"
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(dict(part), folder / name, metadata={"format": "pt"})
        index |= {key: name for key, _ in part}
    if promised:
        index[promised] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def settings(file: str, **more: Any) -> Make:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | more))

    return change


def tokenizer(kind: str, *, missing: str = "") -> Make:
    """Add a tokenizer of this class, made from the given files."""

    def change(folder: Path) -> None:
        class_name, save = tokenizers.KINDS[kind]
        (folder / "tokenizer.json").unlink()
        save(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
        if missing:
            (folder / missing).unlink()

    return change


def alone(work: Make) -> Make:
    """Make the checkpoint in an empty folder."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        work(folder)

    return change


def adapter(folder: Path, *, kind: str = "LORA", **more: Any) -> None:
    save_adapter(_llama(), folder, r=2, target_modules=["q_proj"])
    change_settings(folder, peft_type=kind, **more)


def marian(folder: Path) -> None:
    """A model with positions that transformers computes and does not save."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "pad_token_id": 0}
    config = transformers.MarianConfig(**sizes, **heads, decoder_start_token_id=0, eos_token_id=1)
    transformers.MarianMTModel(config).save_pretrained(folder)
    tensors(lambda found: {key: one for key, one in found.items() if "embed_positions" not in key})(folder)


def gguf(folder: Path) -> None:
    gguf_files.write(folder / "model.gguf", "llama", gguf_files.llama(), GGMLQuantizationType.Q4_0)


def quantised_as(method: str) -> Make:
    return settings("config.json", quantization_config={"quant_method": method})


DENSE = {"dequantize": "bfloat16"}
FORMATS = (
    Format("`model.safetensors`", lambda _: None),
    Format("shards with an index, also in folders", lambda folder: sharded(folder, place="weights/")),
    Format("`pytorch_model.bin`", pickled()),
    Format("only a variant, such as `model.fp16.safetensors`", move("model.safetensors", "model.fp16.safetensors")),
    Format("the same, named", move("model.safetensors", "model.fp16.safetensors"), {"variant": "fp16"}),
    Format("shards without their index", move("model.safetensors", "model-00001-of-00002.safetensors")),
    Format(
        "an index that names a tensor its shard lacks, which nobody needs", lambda folder: sharded(folder, promised="x")
    ),
    Format("a tensor that the model needs is nowhere", tensors(lambda found: dict(sorted(found.items())[1:]))),
    Format(
        "tensors of several precisions",
        tensors(lambda found: {key: one if "norm" in key else one.bfloat16() for key, one in found.items()}),
    ),
    Format(
        "tensors that the model has no place for, of any type",
        tensors(lambda found: found | {"scale": torch.ones(4).to(torch.float8_e8m0fnu)}),
    ),
    Format("weights that transformers computes, left out (Marian's positions)", alone(marian)),
    Format("the same, not copied", alone(marian), {"in_place": "yes"}),
    Format("names with a prefix", tensors(lambda found: {f"module.{key}": one for key, one in found.items()})),
    Format("`.bin` with tables within tables", pickled(lambda found: {"state_dict": found, "epoch": 3})),
    Format("`.bin` with more than tensors", pickled(lambda found: {"a": Fraction(1, 2)} | found)),
    Format("a folder that `torch.distributed.checkpoint` saved, and `config.json` in it", distributed),
    Format("the same, without", lambda folder: (distributed(folder), (folder / "config.json").unlink())),
    Format("Git LFS pointers", lambda folder: (folder / "model.safetensors").write_text(POINTER)),
    Format("a model type that transformers does not know", settings("config.json", model_type="mine")),
    Format("code that comes with a model (`auto_map`)", settings("config.json", auto_map={"AutoModel": "code.Mine"})),
    Format("a SentencePiece tokenizer alone (DeBERTa's `spm.model`)", tokenizer("deberta-v2"), extra="sentencepiece"),
    Format("a tokenizer of several files (Marian's)", tokenizer("marian"), extra="sentencepiece"),
    Format("extra chat templates", tokenizer("templates")),
    Format("a tokenizer without its vocabulary", tokenizer("rembert", missing="sentencepiece.model")),
    Format("no tokenizer", lambda folder: [file.unlink() for file in folder.glob("tokenizer*")]),
    Format("compressed-tensors", alone(quantised.KINDS["int4"][0]), DENSE, "compressed-tensors"),
    Format("FP8", alone(quantised.save_fp8), DENSE),
    Format("MXFP4", alone(quantised.save_mxfp4), DENSE),
    Format("these, without `--dequantize`", quantised_as("fp8")),
    *(Format(name, quantised_as(method), DENSE) for name, method in {
        "GPTQ": "gptq", "AWQ": "awq", "bitsandbytes, 4 and 8 bit": "bitsandbytes"}.items()),
    Format("GGUF", alone(gguf), {"file": "model.gguf"}, "gguf"),
    Format("a LoRA adapter in peft's format", alone(adapter), {"base": "base"}),
    Format("the same, without its base", alone(adapter)),
    Format("an adapter beside full weights", adapter),
    Format("DoRA", alone(lambda folder: adapter(folder, use_dora=True)), {"base": "base"}),
    Format("other adapters, such as IA3", alone(lambda folder: adapter(folder, kind="IA3")), {"base": "base"}),
    *(Format(name, move("model.safetensors", file)) for name, file in {
        "Flax": "flax_model.msgpack", "TensorFlow": "tf_model.h5", "ONNX": "model.onnx",
        "a publisher's own layout": "consolidated.00.pth", "a diffusion pipeline": "model_index.json"}.items()),
)  # fmt: skip


@functools.cache
def _llama() -> Path:
    """A small LLaMA with a tokenizer."""
    place = tempfile.TemporaryDirectory(prefix="surfw-formats-")
    _kept.append(place)
    return save_llama(Path(place.name) / "base", layers=1, hidden=32)


_kept: list[tempfile.TemporaryDirectory[str]] = []


_SHORTER = {
    r"\bmodel\.safetensors or .* or pytorch_model\.bin\.index\.json": "…",
    r"transformers [0-9][0-9.]*[0-9]": "transformers",
    r"; surfw never makes weights up\. .*": "; …",
}
"""Text that is the same in many rows, or that changes with releases."""


def outcome(one: Format, home: Path) -> str:
    """Return what `surfw chunk` makes of a checkpoint, in the table's words."""
    folder, options = home / "FOLDER", dict(one.options)
    shutil.copytree(_llama(), folder)
    one.make(folder)
    is_in_place, base, file = (options.pop(name, "") for name in ("in_place", "base", "file"))
    shown = ["--in-place"] * bool(is_in_place) + [f"--{name} {value}" for name, value in options.items()]
    shown += ["--base NAME"] * bool(base)
    backend = open_backend(home / "store")
    with _warnings() as said:
        try:
            if base:
                with prepare_model(str(_llama())) as prepared:
                    asyncio.run(write_model(prepared, backend))
                prepared = prepare_adapter(str(folder), asyncio.run(read_base(backend, base)), backend)
            else:
                prepared = prepare_model(str(folder / file), name="model", **options)
            with prepared:
                asyncio.run(build_manifest(prepared) if is_in_place else write_model(prepared, backend))
        except SurfwError as exc:
            text = f"refused: {exc}"
        else:
            text = "; ".join([f"`surfw chunk {' '.join(['FOLDER' + f'/{file}' * bool(file), *shown])}`", *said])
    for pattern, short in _SHORTER.items():
        text = re.sub(pattern, short, text)
    return with_options(text).replace(f"{home}/", "").replace("|", "\\|")


def table() -> str:
    """Return the guide's table."""
    rows = ["| what comes | needs | what surfw does, or says |", "|---|---|---|"]
    for one in FORMATS:
        with tempfile.TemporaryDirectory(prefix="surfw-format-") as home:
            rows.append(f"| {one.what} | {one.extra and f'`surfw[{one.extra}]`'} | {outcome(one, Path(home))} |")
    return "\n".join(rows)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect surfw's warnings in this context."""
    found: list[str] = []
    logger = logging.getLogger("surfw")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(f"warning: {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings of other libraries
            yield found
    finally:
        logger.removeHandler(handler)
