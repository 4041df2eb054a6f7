"""Fine-tune a LoRA over a streamed LLaMA within a memory budget, and generate with it.

    pip install peft
    python examples/lora_training.py [CHECKPOINT [BUDGET [LENGTH]]]

CHECKPOINT is a hub id or a local directory; default: the small model that comes with surfw. BUDGET limits the memory
for weights, activations and training state, such as 1GB. LENGTH is the number of tokens per step.
"""

import resource
import sys
import tempfile
import time
import warnings

import peft
import torch
from transformers import PreTrainedTokenizerBase

from surfw import ModelChunker, StreamingModel, demo_checkpoint

warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # triggered by peft

TEXT = "Weights come by sea. They come when the tide is in, and they leave with the next wave. "
STEPS = 20


def make_learner(model: torch.nn.Module) -> peft.PeftModel:
    """Add a LoRA to the model; only its weights are trained."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def encode(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Repeat the text up to `length` tokens."""
    return tokenizer(TEXT * length, truncation=True, max_length=length, return_tensors="pt").input_ids


def learn(learner: torch.nn.Module, ids: torch.Tensor) -> None:
    """Run the training steps, and print each step's loss and time."""
    learning = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    for step in range(STEPS):
        started = time.perf_counter()
        loss = learner(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.6f}, {time.perf_counter() - started:.2f} s")


def train(store: str, name: str, adapter: str, budget: str, length: int) -> None:
    """Train an adapter to memorise the text, and save it."""
    with StreamingModel.open(store, name, memory_budget=budget) as model:
        learner = make_learner(model.model)
        ids = encode(model.tokenizer, length)
        with model.training():
            learn(learner, ids)
        trained = {name: one for name, one in learner.named_parameters() if one.requires_grad}
        learner.save_pretrained(adapter, state_dict=trained)  # without this argument, peft reads the whole base


def main(checkpoint: str, budget: str, length: int) -> None:
    """Chunk a model, train an adapter over it, chunk the adapter, and generate with both."""
    with tempfile.TemporaryDirectory() as folder:
        info = ModelChunker(checkpoint, output_dir=f"{folder}/store").chunk_model_sync()
        train(f"{folder}/store", info.name, f"{folder}/sea", budget, length)
        print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory in this process")
        ModelChunker(f"{folder}/sea", f"{folder}/store", base=info.name).chunk_model_sync()
        with StreamingModel.open(f"{folder}/store", "sea", memory_budget=budget) as model:
            prompt = model.tokenizer("Weights come", return_tensors="pt")
            print(model.tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0], skip_special_tokens=True))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0] if arguments else str(demo_checkpoint()),
        arguments[1] if len(arguments) > 1 else "32MB",
        int(arguments[2]) if len(arguments) > 2 else 64,
    )
