"""The undocumented parts of other libraries that surfw uses: a complete list, with the reason for each.

A new release may change any of these without notice. Then this file fails before other tests do, and says where to
look. `.ci/releases.py` runs it with the lowest and the newest releases that `pyproject.toml` allows. Nothing else may
be used: the second test finds private names, and imports from modules that are not public.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import surfw

PACKAGE = Path(surfw.__file__).parent


@dataclass(frozen=True)
class Inside:
    """A part of a library that its documentation does not promise.

    Attributes:
        module: the module that defines it.
        name: the name in that module, with dots for an attribute.
        used_in: the module of surfw that uses it.
        why: its purpose, and the public alternative.
        takes: parameters that surfw passes by name.
    """

    module: str
    name: str
    used_in: str
    why: str
    takes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


RECOMPUTED = "running a unit again in the backward pass; the public checkpoint() does not say when it has done so"
LOADER = "the loader's own renaming and conversion of weights; there is no public way to ask what it would load"
GGUF = "what transformers makes of a GGUF file, one weight at a time; from_pretrained makes all of them at once"
DEQUANTISED = "what the loader makes of quantised weights, one at a time; from_pretrained makes all of them at once"
META = "building a model without weights, as from_pretrained does; the public ways allocate or initialise them"
RECEIVE = "frames are received where they belong, without a copy: the public recv() gives each message as new bytes"
TURNS = "input is read in small portions, in turn with other clients; the library takes in all that has arrived"
TOGETHER = (
    "continuous batching, a pass at a time in the model's own thread; the public ways run in a thread of their own"
)
CONTINUED = "which caches can go on with several tokens at once, and be cropped; is_croppable says it of others too"
REGISTRY = "placing a tensor without torch's checks and hooks, 10 times a layer and token; setattr takes microseconds"
PACKED = (
    "products with quantised weights, 4 times as fast for one row as unpacking; used where it gives the same results"
)

INSIDES = [
    Inside("torch.utils._pytree", "tree_flatten", "runtime/recompute.py", RECOMPUTED),
    Inside("torch.utils._pytree", "tree_unflatten", "runtime/recompute.py", RECOMPUTED),
    Inside("torch.utils.checkpoint", "get_device_states", "runtime/recompute.py", RECOMPUTED),
    Inside("torch.utils.checkpoint", "set_device_states", "runtime/recompute.py", RECOMPUTED),
    Inside(
        "transformers.pytorch_utils",
        "Conv1D",
        "skeleton/lora.py",
        "GPT-2's linear modules, which adapters change as others",
    ),
    Inside("transformers.integrations.gguf.gguf_config_mapping", "GGUF_CONFIG_ARCHS", "skeleton/gguf.py", GGUF),
    Inside("transformers.modeling_gguf_pytorch_utils", "TENSOR_PROCESSORS", "skeleton/gguf.py", GGUF),
    Inside(
        "transformers.modeling_gguf_pytorch_utils",
        "TensorProcessor.process",
        "skeleton/gguf.py",
        GGUF,
    ),
    Inside("transformers.modeling_gguf_pytorch_utils", "get_gguf_hf_weights_map", "skeleton/gguf.py", GGUF),
    Inside("transformers.quantizers.auto", "AutoHfQuantizer.from_config", "skeleton/dequantise.py", DEQUANTISED),
    Inside("transformers.quantizers.auto", "AutoQuantizationConfig.from_dict", "skeleton/dequantise.py", DEQUANTISED),
    Inside("transformers.quantizers.base", "HfQuantizer.get_new_dtype", "skeleton/dequantise.py", DEQUANTISED),
    Inside("transformers.conversion_mapping", "get_model_conversion_mapping", "skeleton/loading.py", LOADER),
    Inside("transformers.core_model_loading", "WeightRenaming", "skeleton/loading.py", LOADER),
    Inside("transformers.core_model_loading", "WeightConverter.add_tensor", "skeleton/loading.py", LOADER),
    Inside(
        "transformers.core_model_loading", "WeightConverter.convert", "skeleton/loading.py", LOADER, ("model", "config")
    ),
    Inside("transformers.core_model_loading", "Concatenate", "skeleton/loading.py", LOADER),
    Inside("transformers.core_model_loading", "MergeModulelist", "skeleton/loading.py", LOADER),
    Inside("transformers.core_model_loading", "build_glob_alternation", "skeleton/loading.py", LOADER),
    Inside("transformers.core_model_loading", "dot_natural_key", "skeleton/loading.py", LOADER),
    Inside(
        "transformers.core_model_loading",
        "rename_source_key",
        "skeleton/loading.py",
        LOADER,
        ("base_model_prefix", "meta_state_dict"),
    ),
    Inside("transformers", "PreTrainedModel._get_dtype_plan", "skeleton/loading.py", "what stays in float32"),
    Inside("transformers", "PreTrainedModel._from_config", "skeleton/build.py", META),
    Inside(
        "transformers", "PreTrainedModel.tie_weights", "skeleton/guards.py", "transformers replaces it while it builds"
    ),
    Inside(
        "transformers.initialization",
        "no_tie_weights",
        "skeleton/guards.py",
        "what replaces it: an import in the middle of that has to wait",
    ),
    Inside(
        "transformers", "PreTrainedModel.all_tied_weights_keys", "skeleton/loading.py", "the ties that a class declares"
    ),
    Inside(
        "transformers", "PreTrainedModel.initialize_weights", "skeleton/build.py", "values of what no checkpoint holds"
    ),
    Inside(
        "transformers", "PreTrainedModel._is_hf_initialized", "skeleton/build.py", "what initialisation leaves alone"
    ),
    Inside(
        "transformers", "PreTrainedConfig.per_layer_config", "runtime/kv_cache.py", "layers that differ in their heads"
    ),
    Inside("transformers.cache_utils", "DynamicSlidingWindowLayer", "models/conversation.py", CONTINUED),
    Inside("transformers.cache_utils", "DummyLayer", "models/conversation.py", CONTINUED),
    Inside(
        "transformers.generation.streamers", "BaseStreamer", "models/inference.py", "sees tokens, not only their text"
    ),
    Inside(
        "transformers.generation.candidate_generator",
        "CandidateGenerator.get_candidates",
        "models/speculation.py",
        "stands before transformers' own generators of guesses, to measure them and to have a pass without",
        ("input_ids",),
    ),
    Inside(
        "transformers.generation.candidate_generator",
        "CandidateGenerator.update_candidate_strategy",
        "models/speculation.py",
        "hears how many guesses were right",
        ("input_ids", "scores", "num_matches"),
    ),
    Inside(
        "transformers",
        "GenerationMixin._get_candidate_generator",
        "models/speculation.py",
        "where it is put before them; generate() has no argument for a generator of one's own",
    ),
    Inside(
        "transformers.generation.continuous_batching.continuous_api",
        "ContinuousBatchingManager._create_batch_processor",
        "models/many.py",
        TOGETHER,
    ),
    Inside(
        "transformers.generation.continuous_batching.continuous_api",
        "ContinuousBatchProcessor._generation_step",
        "models/many.py",
        TOGETHER,
        ("model",),
    ),
    Inside(
        "transformers",
        "GenerationMixin._get_logits_processor",
        "models/many.py",
        "what its settings ask for is applied",
    ),
    Inside(
        "huggingface_hub.constants",
        "HF_HUB_OFFLINE",
        "skeleton/guards.py",
        "nothing is fetched in one thread; the public switch is the environment of the process",
    ),
    Inside("transformers", "PreTrainedConfig._attn_implementation", "skeleton/build.py", "the kernel that was chosen"),
    Inside(
        "transformers", "PreTrainedConfig._experts_implementation", "skeleton/build.py", "the kernel that was chosen"
    ),
    Inside(
        "transformers.models.auto.modeling_auto",
        "MODEL_MAPPING._extra_content",
        "skeleton/build.py",
        "the classes that users registered; there is no public list of them",
    ),
    Inside(
        "transformers",
        "MarianMTModel._keys_to_ignore_on_load_missing",
        "skeleton/computed.py",
        "the parameters that need not be in a checkpoint",
    ),
    Inside(
        "torch.nn.utils.parametrize",
        "ParametrizationList",
        "skeleton/units.py",
        "a list of modules whose items are steps of one weight, not layers",
    ),
    Inside(
        "transformers",
        "PreTrainedModel._init_weights",
        "skeleton/computed.py",
        "what from_pretrained makes them with",
    ),
    Inside(
        "transformers.models.auto.tokenization_auto",
        "TOKENIZER_MAPPING._extra_content",
        "skeleton/tokenizers.py",
        "the tokenizer classes that users registered; there is no public list of them",
    ),
    Inside(
        "transformers.models.auto.tokenization_auto",
        "REGISTERED_TOKENIZER_CLASSES",
        "skeleton/tokenizers.py",
        "the same, by name",
    ),
    Inside(
        "transformers.utils.chat_template_utils",
        "render_jinja_template",
        "models/chat_renderer.py",
        "chat templates, as transformers renders them, in a process of their own",
    ),
    Inside(
        "torch", "Tensor._make_subclass", "runtime/absent.py", "a parameter without values, made as torch makes its own"
    ),
    Inside("torch", "_C.DisableTorchFunctionSubclass", "runtime/absent.py", "as torch.overrides documents"),
    Inside(
        "transformers.distributed.tensor_parallel",
        "apply_tensor_parallelism",
        "distributed/place.py",
        "placing a model before its weights are there; from_pretrained does it while it loads them itself",
    ),
    Inside(
        "transformers.distributed.parallel_utils",
        "ALL_PARALLEL_STYLES",
        "distributed/place.py",
        "which styles there are",
    ),
    Inside(
        "pickle", "_Unpickler", "checkpoint/plain_pickle.py", "Python's unpickler with fewer operations; none is public"
    ),
    Inside("torch", "_weight_int8pack_mm", "runtime/matrices.py", PACKED),
    Inside("torch", "_weight_int4pack_mm_for_cpu", "runtime/matrices.py", PACKED),
    Inside("torch.nn", "Module._parameters", "skeleton/units.py", REGISTRY),
    Inside("torch.nn", "Module._buffers", "skeleton/units.py", REGISTRY),
    Inside("torch.nn", "Module._non_persistent_buffers_set", "skeleton/units.py", "buffers that no checkpoint holds"),
    Inside(
        "torch.nn.modules.module",
        "register_module_parameter_registration_hook",
        "skeleton/guards.py",
        "stops a configuration that asks for endless modules while it is being built",
    ),
    Inside("torch.nn.modules.module", "register_module_module_registration_hook", "skeleton/guards.py", "as above"),
    Inside("huggingface_hub.utils.tqdm", "tqdm", "checkpoint/hub.py", "progress bars on stderr, only where wanted"),
    Inside("typer.core", "TyperCommand", "cli/options.py", "usage lines, and errors of options that were given late"),
    Inside("typer.core", "TyperGroup.format_commands", "cli/options.py", "commands in two groups, without rich"),
    Inside("typer.core", "TyperGroup.resolve_command", "cli/options.py", "other words for commands"),
    Inside("websockets.client", "ClientProtocol", "client/link.py", RECEIVE),
    Inside("websockets.protocol", "Protocol.data_to_send", "server/reception.py", TURNS),
    Inside("websockets.streams", "StreamReader", "client/connection.py", RECEIVE),
    Inside("websockets.frames", "Frame", "client/connection.py", RECEIVE),
    Inside("websockets.asyncio.server", "ServerConnection.data_received", "server/reception.py", TURNS),
    Inside("websockets.asyncio.server", "ServerConnection.process_event", "server/reception.py", TURNS),
    Inside("websockets.asyncio.server", "ServerConnection.send_data", "server/reception.py", TURNS),
    Inside(
        "s3fs", "S3FileSystem._call_s3", "storage/s3.py", "why S3 refuses: an answer to HEAD has no body that says it"
    ),
    Inside(
        "s3fs.errors",
        "translate_boto_error",
        "storage/s3_ranges.py",
        "the errors that s3fs raises, for what botocore says",
    ),
    Inside(
        "fsspec.asyn",
        "AsyncFileSystem._cat_file",
        "storage/fsspec_backend.py",
        "ranges, as fsspec's own systems ask for them",
    ),
]


@pytest.mark.parametrize("inside", INSIDES, ids=str)
def test_it_is_there_and_used(inside: Inside) -> None:
    found: Any = importlib.import_module(inside.module)
    for name in inside.name.split("."):
        found = getattr(found, name, None) if not inspect.isclass(found) else find_in_class(found, name)
        assert found is not None, f"{inside} is gone: {inside.used_in} uses it for this: {inside.why}"
    if inside.takes:
        missing = set(inside.takes) - set(inspect.signature(found).parameters)
        assert not missing, f"{inside} does not take {missing} any more"
    leaf = inside.name.rpartition(".")[2]
    assert leaf in (PACKAGE / inside.used_in).read_text(), f"{inside.used_in} does not use {inside} any more"


def find_in_class(found: type, name: str) -> Any:
    """Find a method, or an attribute that the source of the class sets or annotates."""
    if hasattr(found, name):
        return getattr(found, name)
    bases = [one for one in found.__mro__ if one is not object]
    return any(name in inspect.getsource(one) for one in bases) or None


PUBLIC = {
    "aiohttp", "botocore", "botocore.config", "botocore.session", "fsspec", "fsspec.asyn", "huggingface_hub", "s3fs",
    "torch", "torch.distributed.device_mesh", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.nn.functional", "torch.overrides", "torch.utils.hooks", "transformers", "typer", "urllib3",
    "websockets.asyncio.client", "websockets.asyncio.server", "websockets.client", "websockets.datastructures",
    "websockets.exceptions", "websockets.frames", "websockets.http11", "websockets.protocol", "websockets.typing",
    "websockets.uri", "yarl",
}  # fmt: skip
"""Modules of these libraries whose names are documented."""

WATCHED = {name.partition(".")[0] for name in PUBLIC}


def foreign_names() -> Iterator[tuple[str, str]]:
    """The names that surfw imports from non-public modules of these libraries, each with the file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] in WATCHED and module not in PUBLIC:
                yield from ((f"{module}.{one.name}", str(path.relative_to(PACKAGE))) for one in node.names)


def test_no_other_name_is_imported() -> None:
    listed = {f"{inside.module}.{inside.name.partition('.')[0]}" for inside in INSIDES}
    listed |= {inside.module for inside in INSIDES}
    strange = sorted({f"{name} in {path}" for name, path in foreign_names() if name not in listed})
    assert not strange


def foreign_private_names() -> Iterator[tuple[str, str]]:
    """The private attributes of other libraries in surfw, with the file: those exempted from the linter."""
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                continue
            if any("SLF001" in line for line in lines[node.lineno - 1 : node.end_lineno]):
                yield node.attr, str(path.relative_to(PACKAGE))


def test_no_other_private_name_is_used() -> None:
    listed = {part for inside in INSIDES for part in inside.name.split(".")}
    listed |= {"_surfw_load", "_surfw_apply", "_surfw_device", "_surfw_expert", "_engine", "_open_here"}  # surfw's own
    strange = sorted({f"{name} in {path}" for name, path in foreign_private_names() if name not in listed})
    assert not strange
