"""Train the demo model, the very small LLaMA in the package with which surfw can be tried without a download.

    python examples/demo_model/train.py --out surfw/demo

It writes a checkpoint in the usual Hugging Face layout, which `surfw chunk` and `surfw infer` read. It imports nothing
from surfw.

The steps: read the prose (the corpus in this folder and the repository's README), train the tokenizer, make padded
batches of lessons, train the model, save it in bf16, and print greedy samples. The same seed, prose, thread count and
versions of the libraries give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from prose import Lesson, Teacher, read_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2: the trainer numbers special tokens in this order
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
IGNORED_LABEL = -100  # the label that torch's cross entropy ignores

SAMPLE_PROMPTS = (
    "Weight streaming is",
    "Weight streaming is useful because",
    "What is weight streaming?",
    "The server",
    "A chunk",
    "When the cache",
    "To start,",
    "Large language models",
    "Hello",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers that determine the result; they are written to TRAINING.json."""

    seed: int = 20
    vocabulary: int = 1280
    hidden: int = 128
    intermediate: int = 352
    layers: int = 8
    heads: int = 4
    positions: int = 512
    steps: int = 2200
    warmup_steps: int = 60
    batch_lessons: int = 12
    batches_sorted: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    token_noise: float = 0.05  # share of input tokens replaced at random, so that the model tolerates an unknown token


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(paragraphs: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes any text and decodes it unchanged. Each text starts with `<s>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(paragraphs, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)
    return tokenizer


# --- training --------------------------------------------------------------------------------------------------------


def encode(lesson: Lesson, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return a lesson's tokens and labels, of equal length; the cue's labels are ignored, the end token is learned."""
    cue = tokenizer.encode(lesson.cue)  # begins with <s>
    text = [*tokenizer.encode(lesson.text, add_special_tokens=False), EOS_ID]
    return cue + text, [IGNORED_LABEL] * len(cue) + text


def lessons(
    paragraphs: list[str], tokenizer: PreTrainedTokenizerFast, chance: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield encoded lessons without end; each epoch uses every paragraph once, in a new order."""
    teacher = Teacher(paragraphs, chance)
    while True:
        for paragraph in chance.sample(paragraphs, len(paragraphs)):
            yield encode(teacher.lesson(paragraph), tokenizer)


def batches(
    paragraphs: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, labels) without end, both int64 [lessons, longest], right-padded.

    To limit padding, lessons of similar length share a batch: `batches_sorted` batches at a time are sorted by length.
    """
    chance = random.Random(recipe.seed)
    noise = torch.Generator().manual_seed(recipe.seed)
    source = lessons(paragraphs, tokenizer, chance)
    while True:
        pool = sorted(islice(source, recipe.batch_lessons * recipe.batches_sorted), key=lambda lesson: len(lesson[0]))
        groups = [pool[i : i + recipe.batch_lessons] for i in range(0, len(pool), recipe.batch_lessons)]
        for rows in chance.sample(groups, len(groups)):
            longest = len(rows[-1][0])
            inputs = torch.tensor([tokens + [PAD_ID] * (longest - len(tokens)) for tokens, _ in rows])
            labels = torch.tensor([known + [IGNORED_LABEL] * (longest - len(known)) for _, known in rows])

            replaced = (torch.rand(inputs.shape, generator=noise) < recipe.token_noise) & (inputs > EOS_ID)
            strangers = torch.randint(EOS_ID + 1, recipe.vocabulary, inputs.shape, generator=noise)
            yield torch.where(replaced, strangers, inputs), labels


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Build a float32 LLaMA with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return an AdamW that applies weight decay to matrices, not to norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def train(paragraphs: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[LlamaForCausalLM, float]:
    """Return the trained model, and its mean loss (nats per token) over the last tenth of the steps."""
    model = build_model(recipe).train()
    optimizer = optimizer_of(model, recipe)
    losses: list[float] = []
    started = time.perf_counter()
    for step, (inputs, labels) in zip(range(recipe.steps), batches(paragraphs, tokenizer, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1:5d}  loss {recent:.3f}  {time.perf_counter() - started:5.0f} s", flush=True)
    last = losses[-max(1, recipe.steps // 10) :]
    return model.eval(), sum(last) / len(last)


# --- result ----------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> int:
    """Write the weights in bf16, the configurations and the tokenizer; return the size of the weights file in bytes."""
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=120, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = out / "model.safetensors"
    weights.chmod(0o644)  # safetensors lets only its owner read the file, but everyone may read the package
    return weights.stat().st_size


def print_samples(out: Path) -> None:
    """Load the saved model and continue each sample prompt greedily."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out)
    for prompt in SAMPLE_PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**encoded, max_new_tokens=120)[0]  # type: ignore[misc]
        end = "" if tokens[-1] == EOS_ID else " [no end]"
        print(f"\n> {tokenizer.decode(tokens, skip_special_tokens=True)}{end}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; only `--out` is required."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, help="compute threads (default: PyTorch's own choice)")
    return parser.parse_args()


def main() -> None:
    """Train, save, record the facts in TRAINING.json, and print samples."""
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps)

    paragraphs, digests = read_corpus(HERE / "corpus", REPOSITORY / "README.md")
    tokenizer = train_tokenizer(paragraphs, recipe)
    tokens = sum(len(tokenizer.encode(p)) for p in paragraphs)
    print(f"{len(paragraphs)} paragraphs, {tokens} tokens, {torch.get_num_threads()} threads")

    model, loss = train(paragraphs, tokenizer, recipe)
    weight_bytes = save(model, tokenizer, arguments.out)
    facts = {
        "recipe": asdict(recipe),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "weight_bytes": weight_bytes,
        "final_loss": round(loss, 4),
        "corpus": {"paragraphs": len(paragraphs), "tokens": tokens, "sha256": digests},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    print(f"{facts['parameters']} parameters, {weight_bytes} bytes, loss {loss:.3f}")
    print_samples(arguments.out)


if __name__ == "__main__":
    main()
