"""Train a model with FSDP2 and AdamW on several ranks, save a checkpoint, and chunk it.

    torchrun --nproc-per-node 2 examples/fsdp_training.py [CHECKPOINT [STORE [OUTPUT]]]

CHECKPOINT is a local directory; default: the small model that comes with surfw. It is chunked into STORE (default:
./chunks), from which each rank reads its share. OUTPUT (default: ./trained) is the folder of the saved checkpoint.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from surfw import ModelChunker, StreamingModel, demo_checkpoint
from surfw.distributed import build_model, load_sharded

TEXT = "Weights come by sea. They come when the tide is in, and they leave with the next wave. "
STEPS, LENGTH = 20, 64


def main(checkpoint: str, store: str, output: str) -> None:
    """Chunk a model, train and save it, chunk the result, and generate with it."""
    dist.init_process_group("gloo")  # "nccl" for GPUs
    rank, count = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        ModelChunker(checkpoint, store, name="base").chunk_model_sync()
    dist.barrier()

    model = build_model(store, name="base", dtype="float32")  # on the meta device: no weights yet
    report = load_sharded(model, store, init_device_mesh("cpu", (count,)), "fsdp", name="base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if rank == 0:
        with StreamingModel.open(store, "base") as resident:
            ids = resident.tokenizer(
                TEXT * LENGTH, truncation=True, max_length=count * LENGTH, return_tensors="pt"
            ).input_ids[0]
            whole_bytes = resident.manifest.payload_bytes
        print(f"rank 0 read {report.read_bytes / 1e6:.1f} MB of {whole_bytes / 1e6:.1f} MB")
    else:
        ids = torch.empty(count * LENGTH, dtype=torch.int64)
    dist.broadcast(ids, src=0)
    mine = ids.view(count, LENGTH)[rank : rank + 1]  # each rank trains on a different part of the text

    model.train()
    for step in range(STEPS):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach())
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item() / count:.6f}")
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=output)

    if rank == 0:
        ModelChunker(output, store, name="trained", config_from=checkpoint).chunk_model_sync()
        with StreamingModel.open(store, "trained") as trained:
            prompt = trained.tokenizer("Weights come", return_tensors="pt")
            tokens = trained.generate(**prompt, max_new_tokens=12)
            print(trained.tokenizer.decode(tokens[0], skip_special_tokens=True))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0] if arguments else str(demo_checkpoint()),
        arguments[1] if len(arguments) > 1 else "./chunks",
        arguments[2] if len(arguments) > 2 else "./trained",
    )
