"""Check surfw with every small model type of transformers: `python -m tests.sweep --part 1/8 RESULTS`.

Run this by hand. For each type, it shrinks the default configuration, saves a model with random weights as transformers
does, chunks it, and opens it from the store. The outcomes are:

- *equal*: every stored tensor equals that of the model which transformers loads, and both give the same bits, if the
  model can be run with its main input alone;
- *refused*: surfw gives the reason in one line;
- *not buildable*: transformers cannot build the type from such a configuration;
- *crash*: anything else; the exit code is then 1.

Results are appended to RESULTS as lines of JSON; `python -m tests.sweep --table RESULTS` writes the guide's table.
"""

import argparse
import asyncio
import copy
import json
import logging
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from surfw.chunking import prepare_model, write_model
from surfw.errors import SurfwError
from surfw.manifest import split_name
from surfw.models import StreamingModel
from surfw.storage import open_backend
from surfw.storage.store_source import open_storage_source

PAGE = Path(__file__).parents[1] / "surfw/models/CHECKPOINTS.md"
BEGIN, END = "<!-- sweep -->\n", "<!-- /sweep -->\n"
TABLES = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "PRETRAINING",
    "IMAGE_CLASSIFICATION",
    "CTC",
)
"""Places to look for the class of a model type, before the base model."""

MOST_PARAMETERS = 40_000_000
SECONDS = 60
SIZES: list[tuple[str, Callable[[int], int]]] = [
    (r".*(experts_per_tok|top_?k_experts?|moe_topk|moe_k)", lambda v: min(v, 2)),
    (r".*(num|n)_(local_|routed_)?experts", lambda v: min(v, 4)),
    (r".*vocab_size.*", lambda v: min(v, 160)),
    (r".*(num|n)_.*groups?", lambda v: v),
    (r"((num|n)_.*layers?|.*_layers|layers|n_layer|.*num_blocks|depth|num_layers_.*)", lambda v: min(v, 2)),
    (r".*(key_value_heads|kv_heads|multi_query_group_num)", lambda v: min(v, 2)),
    (r".*(heads?|n_head)", lambda v: min(v, 4)),
    (r".*(head_dim|d_kv|qk_.*_dim|v_head_dim)", lambda v: min(v, 16)),
    (r".*(intermediate|ffn|inner|d_ff|mlp_hidden).*", lambda v: min(v, 64)),
    (r".*(max_position|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq).*", lambda v: min(v, 512)),
    (
        r".*hidden_size|.*hidden_dim|d_model|n_embd|.*embed_dim|.*embedding_size|dim|width|.*projection_dim|.*model_dim",
        lambda v: min(v, 64),
    ),
]  # fmt: skip
DERIVED = {"stage_names", "out_features", "out_indices"}
ONLY_DEPTH = SIZES[2:3] + SIZES[4:5]


def shrink(config: Any, rules: list[tuple[str, Callable[[int], int]]]) -> None:
    """Make a configuration and its inner configurations small."""
    lengths: dict[int, int] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value, rules)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            new = next((small(value) for pattern, small in rules if re.fullmatch(pattern, name)), value)
            if new != value and "layer" in name:
                lengths[value] = new
            assign(config, name, new)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) in lengths and "size" not in name:
            assign(config, name, value[: lengths[len(value)]])
        elif name == "depths" and isinstance(value, list):
            assign(config, name, [1] * len(value))
        elif isinstance(value, int) and re.fullmatch(r".*_token_(id|index)", name) and value >= 160:
            assign(config, name, 7)


def assign(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # noqa: BLE001 - some names are computed from others
        return


def model_types() -> Iterator[str]:
    yield from sorted(transformers.CONFIG_MAPPING.keys())


def class_of(model_type: str) -> Any:
    """The class of a model type: with the head that it generates or was trained with, else the base model."""
    for table in (*(f"MODEL_FOR_{name}_MAPPING_NAMES" for name in TABLES), "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, table).get(model_type)
        name = found[0] if isinstance(found, tuple) else found
        if name is not None and hasattr(transformers, name):
            return getattr(transformers, name)
    return None


def build(model_type: str) -> Any:
    """Build a small model, or return None and the reason."""
    cls, reason = class_of(model_type), "it has no model class of its own"
    for rules in (SIZES, ONLY_DEPTH, []) if cls is not None else ():
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
            shrink(config, rules)
            settings = {name: value for name, value in config.to_dict().items() if name not in DERIVED}
            config = type(config).from_dict(settings)  # checked as a whole below
            with torch.device("meta"):
                count = sum(one.numel() for one in cls(copy.deepcopy(config)).parameters())
            if count > MOST_PARAMETERS:
                reason = f"{count / 1e6:.0f} million parameters in its smallest form"
                continue
            torch.manual_seed(0)
            return cls(config).eval()
        except Exception as exc:  # noqa: BLE001 - configurations break in all ways
            reason = f"{type(exc).__name__}: {str(exc).splitlines()[0][:90] if str(exc) else ''}"
    return reason


def inputs_of(model: Any) -> dict[str, torch.Tensor] | None:
    """Return the main input of a model with random values; None if it is not simple."""
    name, config = model.main_input_name, model.config
    torch.manual_seed(1)
    if name == "input_ids":
        text = config.get_text_config()
        ids = torch.randint(8, min(getattr(text, "vocab_size", 100) or 100, 100), (1, 8))
        given = {"input_ids": ids}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = ids[:, :3]
        return given
    if name == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", 224)
        width, height = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3) or 3, width, height)}
    if name == "input_values":
        return {name: torch.randn(1, 4000)}
    return None


@torch.no_grad()
def run(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    output = model(**given, return_dict=True)
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)

    collect(dict(output))
    return found


def same(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(seen) == len(expected) and all(
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(seen, expected, strict=True)
    )


def check(model_type: str, folder: Path) -> tuple[str, str]:
    """Return the outcome for a model type, and the reason."""
    made = build(model_type)
    if isinstance(made, str):
        return "not buildable", made
    name = type(made).__name__
    try:
        made.save_pretrained(folder / "model")
        resident = copy.deepcopy(type(made).from_pretrained(folder / "model").eval())
    except Exception as exc:  # noqa: BLE001 - as above
        return "not buildable", f"{name} is not read as it was saved: {type(exc).__name__}: {str(exc)[:60]}"
    store = folder / "store"
    try:
        with prepare_model(str(folder / "model"), name="model") as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
        with StreamingModel.open(lambda: open_storage_source(open_backend(store)), cache_size=2) as streaming:
            state = resident.state_dict()
            if differ := [
                key for key, one in stored_tensors(streaming, store).items() if not same([one], [tensor_of(state, key)])
            ]:
                return "crash", f"{name}: {differ[0]} differs"
            given = inputs_of(resident)
            try:
                expected = None if given is None else run(resident, given)
            except Exception:  # noqa: BLE001 - its main input alone is not enough
                expected = None
            if given is None or expected is None:
                return "equal", f"{name}: all weights; it takes more than one input"
            return ("equal", name) if same(run(streaming, given), expected) else ("crash", f"{name}: other outputs")
    except SurfwError as exc:
        return "refused", f"{name}: {str(exc).replace(str(folder), '')[:160]}"


def tensor_of(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a model's tensor by its name in a store; an expert's name means a slice of a stack."""
    stack, index = split_name(name) or (name, None)
    return state[name] if index is None else state[stack][index]


def stored_tensors(streaming: StreamingModel, store: Path) -> dict[str, torch.Tensor]:
    """The tensors of a stored model, by name."""
    from surfw.skeleton.dtypes import torch_dtype

    found = {}
    for chunk in streaming.manifest.chunks:
        form = next(one for one in chunk.forms if one.codec == "none")
        payload = b"".join((store / at.object).read_bytes()[at.start : at.stop] for at in form.locations)
        for info in chunk.tensors:
            data = bytearray(payload[info.offset : info.offset + info.nbytes])
            flat = torch.frombuffer(data, dtype=torch_dtype(info.dtype)) if data else torch.empty(0)
            found[info.name] = flat.reshape(info.shape)
    return found


def sweep(types: list[str], results: Path) -> bool:
    crashed = False
    for model_type in types:
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(SECONDS)
            try:
                word, why = check(model_type, Path(folder))
            except Exception as exc:  # noqa: BLE001 - which is what is looked for
                word, why = "crash", f"{type(exc).__name__}: {str(exc)[:200]}"
            finally:
                signal.alarm(0)
        crashed |= word == "crash"
        print(f"{model_type}: {word}: {why}", flush=True)  # noqa: T201 - by hand
        with results.open("a") as file:
            file.write(json.dumps({"type": model_type, "word": word, "why": why}) + "\n")
    return crashed


def write_table(results: Path) -> None:
    """Write the last result of each type into the guide."""
    found = {one["type"]: one for one in map(json.loads, results.read_text().splitlines())}
    counts = Counter(one["word"] for one in found.values())
    equal = [f"`{one['type']}`" for one in found.values() if one["word"] == "equal" and "all weights" not in one["why"]]
    weights = [f"`{one['type']}`" for one in found.values() if one["word"] == "equal" and "all weights" in one["why"]]
    left = sorted(f"`{one['type']}`" for one in found.values() if one["word"] == "not buildable")
    summary = (
        f"Of {len(found)} model types of transformers {transformers.__version__}, {counts['equal']} could be built "
        f"small and are equal, {counts['refused']} are refused, {counts['not buildable']} could not be built, "
        f"{counts['crash']} failed."
    )
    rows = {
        f"the same bits as transformers' model, one class of each type ({len(equal)})": sorted(equal),
        f"the same weights; they take more than one input ({len(weights)})": sorted(weights),
        f"not built: transformers makes no small model of their default configuration ({len(left)})": left,
    }
    for word in ("refused", "crash"):
        rows |= {
            word: [f"`{one['type']}`: {one['why'].partition(';')[0]}" for one in found.values() if one["word"] == word]
        }
    lines = [summary, "", "| what | model types |", "|---|---|"]
    lines += [f"| {what} | {', '.join(types) or 'none'} |" for what, types in rows.items()]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--types")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        write_table(given.results)
        return 0
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    part, parts = map(int, given.part.split("/"))
    types = given.types.split(",") if given.types else list(model_types())[part - 1 :: parts]
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"longer than {SECONDS} s")))
    return int(sweep(types, given.results))


if __name__ == "__main__":
    sys.exit(main())
