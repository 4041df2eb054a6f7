"""Run jobs of several ranks for tests: `python -m tests.distributed.job JOBS CHECKPOINTS OUT`.

Torch is imported once, and each rank is a fork: a job of four ranks takes 0.1 s of a CPU instead of 20 s.

Each job has `ranks` and `cases`; each rank writes its results to `OUT/JOB-RANK.json`, one object per case.
"""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from surfw import InferenceRequest, StorageBackend, WeightClient
from surfw.distributed import StageModel, build_model, load_sharded
from surfw.distributed.place import place_model
from surfw.distributed.stages import plan_stages
from surfw.skeleton.units import find_units
from tests.checkpoints import resident

IDS = torch.arange(1, 13).view(1, 12)


def run_jobs(
    jobs: Sequence[Mapping[str, Any]], folder: Path, out: Path, *, with_killed: int | None = None
) -> list[list[list[dict[str, Any]]]]:
    """Return the results of the ranks of each job, case by case; a rank that was killed has none."""
    command = [sys.executable, "-m", "tests.distributed.job", json.dumps(jobs), str(folder), str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = []
    for at, job in enumerate(jobs):
        files = [out / f"{at}-{rank}.json" for rank in range(job["ranks"])]
        ranks = [json.loads(file.read_text()) for file in files if file.exists()]
        assert len(ranks) == job["ranks"] - (at == with_killed), done.stderr[-4000:]
        found.append([list(case) for case in zip(*ranks, strict=True)])
    return found


def logits(model: Any) -> torch.Tensor:
    """A model's logits for a prompt."""
    decoder = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False, **decoder).logits
    return found


def tensor_parallel_t5(model: Any, mesh: Any) -> None:
    """Split heads and inner columns with torch's own styles; the position bias has a column for each head."""
    styles: dict[str, Any] = {}
    for stack in ("encoder", "decoder"):
        attentions = ["layer.0.SelfAttention"] + ["layer.1.EncDecAttention"] * (stack == "decoder")
        for attention in attentions:
            at = f"{stack}.block.*.{attention}"
            styles |= {f"{at}.{name}": ColwiseParallel() for name in "qkv"} | {f"{at}.o": RowwiseParallel()}
        styles[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"] = ColwiseParallel()
        forward = f"{stack}.block.*.layer.{len(attentions)}.DenseReluDense"
        styles |= {f"{forward}.wi": ColwiseParallel(), f"{forward}.wo": RowwiseParallel()}
    parallelize_module(model, mesh, styles)
    for module in model.modules():
        if hasattr(module, "n_heads"):
            module.n_heads //= mesh.size()  # it is asked for where there is no bias of positions


def tensor_parallel_gpt2(model: Any, mesh: Any) -> None:
    """Its layers are `Conv1D`; one of them has the columns of queries, keys and values, each of which is split."""

    def cut(module: Any, weight: Any, bias: Any) -> None:
        for name, placement in (("weight", weight), ("bias", bias)):
            placed = distribute_tensor(getattr(module, name), mesh, [placement], src_data_rank=None)
            setattr(module, name, torch.nn.Parameter(placed))

    def columns(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x @ module.weight.to_local() + module.bias.to_local()

    def rows(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            partial = x @ module.weight.to_local()
            dist.all_reduce(partial, group=mesh.get_group())
            return partial + module.bias.to_local()

        return forward

    for block in model.transformer.h:
        cut(block.attn.c_attn, _StridedShard(1, split_factor=3), _StridedShard(0, split_factor=3))
        cut(block.mlp.c_fc, Shard(1), Shard(0))
        block.attn.split_size //= mesh.size()
        for module in (block.attn.c_attn, block.mlp.c_fc):
            module.forward = columns(module)
        for module in (block.attn.c_proj, block.mlp.c_proj):
            cut(module, Shard(0), Replicate())
            module.forward = rows(module)


def place(model: Any, placement: str) -> dict[str, Any]:
    """Place a model by hand, or return the arguments for `load_sharded`."""
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    if placement == "fsdp":
        return {"mesh": mesh}
    if placement == "fsdp by columns":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, shard_placement_fn=lambda it: Shard(1) if it.ndim == 2 else Shard(0))
        fully_shard(model, mesh=mesh)
        return {}
    if placement == "fsdp and tp":
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("dp", "tp"))
        place_model(model, mesh["tp"], "tp")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        return {}
    by_hand = {"T5ForConditionalGeneration": tensor_parallel_t5, "GPT2LMHeadModel": tensor_parallel_gpt2}
    if (own := by_hand.get(type(model).__name__)) is None:
        return {"mesh": mesh, "plan": "tp"}
    own(model, mesh)
    return {}


def whole_of(parameter: torch.Tensor) -> torch.Tensor:
    """The complete parameter, on every rank."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def placed(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model as the case says, and compare it with the resident one."""
    whole, store = wholes[case["model"]], folder / "stores" / case["model"]
    model: Any = build_model(store)
    told: list[tuple[int, int]] = []
    report = load_sharded(model, store, **place(model, case["placement"]), progress=lambda *at: told.append(at))
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name, one in found.items() if not torch.equal(whole_of(one), expected[name])]
    mine = [tuple(one.to_local().shape if isinstance(one, DTensor) else one.shape) for one in found.values()]
    seen, right = logits(model), logits(whole)
    return {
        "report": asdict(report), "wrong": wrong, "names": sorted(found) == sorted(expected), "progress": told,
        "held": sum(torch.Size(shape).numel() for shape in mine), "equal": torch.equal(seen, right),
        "difference": float((seen - right).abs().max()), "scale": float(right.abs().max()),
    }  # fmt: skip


class Faulty(StorageBackend):
    """A remote folder that causes the case's fault on one rank, as soon as it is read."""

    url = "far://folder"

    def __init__(self, folder: Path, fault: str) -> None:
        self._folder, self._fault = folder, fault
        self.loaded_bytes = 0

    async def load(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        if self._fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "hangs":
            await asyncio.sleep(4)
        self.loaded_bytes += stop - start
        data = (self._folder / key).read_bytes()[start:stop]
        return bytes(len(data)) if self._fault == "damaged" else data

    async def size(self, key: str) -> int:
        return (self._folder / key).stat().st_size

    async def exists(self, key: str) -> bool:
        return (self._folder / key).exists()

    async def list(self, prefix: str = "") -> list[str]:
        keys = [path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()]
        return [key for key in keys if key.startswith(prefix)]

    async def save(self, key: str, data: object) -> None:
        raise NotImplementedError


def failing(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Load through a disk cache, with or without a fault on the last rank."""
    store = folder / "stores" / case["model"]
    is_victim = dist.get_rank() == dist.get_world_size() - 1
    backend = Faulty(store, case["fault"] if is_victim else "")
    model: Any = build_model(store)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with WeightClient(backend, disk_cache="1GB", cache_dir=folder / case["cache"], offline=False) as client:
        load_sharded(model, client, mesh, timeout=case["timeout"])
    expected = dict(wholes[case["model"]].named_parameters())
    wrong = [name for name, one in model.named_parameters() if not torch.equal(whole_of(one), expected[name])]
    return {"loaded_bytes": backend.loaded_bytes, "wrong": wrong}


def staged(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Load a stage of a pipeline on each rank; each unit runs where its weights are, and all ranks get its result."""
    whole, store = wholes[case["model"]], folder / "stores" / case["model"]
    rank, count = dist.get_rank(), dist.get_world_size()
    with WeightClient(store) as client:
        manifest = client.run(lambda source: source.manifest(case["model"]))
        model: Any = build_model(client)
        units = find_units(model)
        stages = plan_stages(manifest, units, count)
        for unit in units:
            (owner,) = (stage.index for stage in stages if unit.path in stage.paths)
            relay(model, unit, owner)
        report = load_sharded(model, client)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name, one in found.items() if not torch.equal(one, expected[name])]
    seen, right = logits(model), logits(whole)
    return {
        "report": asdict(report), "wrong": wrong, "progress": [], "names": set(found) < set(expected),
        "stage": [rank, *stages[rank].layers], "equal": torch.equal(seen, right),
    }  # fmt: skip


def relay(model: Any, unit: Any, owner: int) -> None:
    """Run a unit on its owner only, and send its result to all ranks."""

    def share(output: Any) -> Any:
        box = [output]
        dist.broadcast_object_list(box, src=owner)
        return box[0]

    if owner == dist.get_rank():
        unit.module.register_forward_hook(lambda _module, _inputs, output: share(output))
        return
    absent = torch.nn.Module()
    absent.forward = lambda *_args, **_kwargs: share(None)
    parent, _, leaf = unit.path.rpartition(".")
    model.get_submodule(parent).register_module(leaf, absent)


def pipelined(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Answer prompts with the stages of a pipeline, and one by one with the resident model."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13]]
    answers: list[Any] = [None] * len(prompts)

    def take(found: Any) -> None:
        answers[found.index] = found.error or found.result.token_ids

    name = case.get("other", case["model"]) if dist.get_rank() else case["model"]
    with StageModel.open(folder / "stores" / name, memory_budget=case.get("budget")) as stage:
        if dist.get_rank():
            stage.serve()
        else:
            requests = [InferenceRequest(prompt_ids=ids, max_new_tokens=6, ignore_eos=True) for ids in prompts]
            stage.answer_many(requests, on_result=take, sequences=3, max_new_tokens=6)
        layers, weights = stage.layers, stage.manifest.payload_bytes
    if dist.get_rank():
        return {"layers": layers, "weights": weights}
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = wholes[case["model"]]
    right = [whole.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]
    return {"layers": layers, "weights": weights, "answers": answers, "right": right}


STEPS = 20


def train(model: Any, ids: torch.Tensor) -> list[float]:
    """Train on some sequences with AdamW; return the mean loss over all ranks of each step."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # otherwise one process would drop other elements than two
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(seen := loss.detach().clone())
        losses.append(float(seen) / dist.get_world_size())
    return losses


def trained(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Train a streamed model, the resident one placed in the same way, and the resident one in one process."""
    whole, store = wholes[case["model"]], folder / "stores" / case["model"]
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    torch.manual_seed(0)
    ids = torch.randint(1, 131, (2 * count, 12))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if case["placement"] == "mixed" else None

    def by_hand(model: Any) -> None:
        options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
        for unit in find_units(model):
            if unit.kind == "layer":
                fully_shard(unit.module, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)

    streamed: Any = build_model(store)
    if case["placement"] == "frozen":
        streamed.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    if policy is None:
        load_sharded(streamed, store, mesh)
    else:
        by_hand(streamed)
        load_sharded(streamed, store)
    same, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    if case["placement"] == "frozen":
        for model in (same, alone):
            model.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    by_hand(same)
    mine = ids[rank * 2 : rank * 2 + 2]
    losses, right = train(streamed, mine), train(same, mine)
    expected, before = dict(same.named_parameters()), dict(whole.named_parameters())
    ends = {name: whole_of(one) for name, one in streamed.named_parameters()}
    wrong = [name for name, one in ends.items() if not torch.equal(one, whole_of(expected[name]))]
    return {
        "losses": losses, "right": right, "alone": train(alone, ids), "wrong": wrong,
        "unchanged": [name for name, one in ends.items() if torch.equal(one, before[name])],
        "names": sorted(ends) == sorted(expected),
    }  # fmt: skip


def saved(case: Mapping[str, Any], folder: Path, wholes: Mapping[str, Any]) -> dict[str, Any]:
    """Train a placed model for a step of AdamW, and save it with its optimizer, and with `save_pretrained`."""
    store, place_to = folder / "stores" / case["model"], folder / "saved" / case["name"]
    model: Any = build_model(store)
    load_sharded(model, store, **place(model, case["placement"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    if case["form"] == "safetensors":
        writer = dcp.HuggingFaceStorageWriter(str(place_to), save_distributed=True)
        dcp.save(model.state_dict(), storage_writer=writer)
    else:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
        dcp.save(state if case["form"] == "model" else {"app": state}, checkpoint_id=place_to)
    whole = copy.deepcopy(wholes[case["model"]])
    ends = {name: whole_of(one) for name, one in model.state_dict().items()}
    whole.load_state_dict(ends)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "saved" / f"{case['name']}-plain")
    return {}


KINDS = {
    "placed": placed, "failing": failing, "staged": staged, "pipelined": pipelined, "trained": trained, "saved": saved,
}  # fmt: skip


def run_rank(job: int, rank: int, count: int, cases: list[Any], folder: Path, out: Path, wholes: Any) -> None:
    """Run all cases of a job on one rank."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{job}", rank=rank, world_size=count)
    results = []
    for case in cases:
        try:
            results.append(case | KINDS[case.get("kind", "placed")](case, folder, wholes))
        except Exception as exc:  # noqa: BLE001 - what a case expects is for the test to say
            results.append(case | {"error": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()})
    (out / f"{job}-{rank}.json").write_text(json.dumps(results))
    if not any("error" in one for one in results):
        dist.destroy_process_group()


def main() -> None:
    """Fork the ranks of each job, and wait for them."""
    jobs, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    names = {case["model"] for job in jobs for case in job["cases"]}
    wholes = {name: copy.deepcopy(resident(folder, name)).eval() for name in names}
    for at, job in enumerate(jobs):
        ranks = []
        for rank in range(job["ranks"]):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    run_rank(at, rank, job["ranks"], job["cases"], folder, out, wholes)
                    status = 0
                except BaseException:  # noqa: BLE001 - it is a process of its own
                    traceback.print_exc()
                finally:
                    os._exit(status)
            ranks.append(pid)
        for pid in ranks:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
