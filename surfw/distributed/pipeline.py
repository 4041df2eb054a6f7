"""Pipeline-parallel generation for many prompts: each rank streams and keeps only its own layers.

    rank 0: prompt, tokens ─▶ embeddings, layers ─▶ rank 1: layers ─▶ … ─▶ last rank: layers, head ─▶ logits to rank 0

Rank 0 drives. Each sequence is a micro-batch of its own, with a KV cache on every rank. Several sequences are in flight
at a time, so that all ranks compute at once: while the last rank works on the first sequence, rank 0 works on later
ones. Every rank receives work in the order in which rank 0 sent it, and logits return in that order. Rank 0 chooses
tokens with transformers' own processors and stopping criteria, as `generate()` sets them up, so that they equal those
of one process with the whole model.

A message between two ranks is a header of four int64 (kind, sequence, tokens, 0) and, for a pass, the hidden states, of
shape (1, tokens, width) in the model's dtype.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from surfw.distributed.ranks import expect_one_model
from surfw.distributed.stages import cut_out
from surfw.errors import ConfigurationError, RankError
from surfw.manifest import Manifest
from surfw.models.inference import (
    GenerationOptions,
    InferenceRequest,
    InferenceResult,
    encode_prompt,
    generation_config,
)
from surfw.models.many import Feed, ManyResult, OnTokens
from surfw.models.streaming import StreamingModel
from surfw.runtime.kv_cache import cache_name
from surfw.skeleton.build import Skeleton

_PASS, _ROOM, _END, _STOP = range(4)
_IDLE = timedelta(days=7)
"""The gloo timeout: ranks may wait long for prompts. A rank that exits is noticed at once."""

_PATIENCE_SECONDS = 0.1


def join_job() -> tuple[int, int]:
    """Join the job that `torchrun` started; returns this rank and the number of ranks.

    Raises:
        ConfigurationError: the process was not started by `torchrun`, or the ranks cannot connect.
    """
    try:
        dist.init_process_group("gloo", timeout=_IDLE)
    except (ValueError, RuntimeError) as exc:
        raise ConfigurationError(
            f"the ranks of a pipeline do not find each other ({str(exc).partition(chr(10))[0][:120]}); start them with "
            "'torchrun --nproc-per-node N -m surfw infer --pipeline …'"
        ) from exc
    return dist.get_rank(), dist.get_world_size()


class StageModel(StreamingModel):
    """This rank's stage of a model, streamed within its own budget. Call `join_job` first.

    Rank 0 calls `answer_many`; the other ranks call `serve`.
    """

    def _take_part(self, manifest: Manifest, skeleton: Skeleton) -> tuple[Manifest, Skeleton]:
        _expect_one_model(manifest)
        return cut_out(manifest, skeleton, dist.get_rank(), dist.get_world_size())

    def _switch(self, name: str) -> None:
        """Refuse to switch models: all ranks would have to switch."""
        raise ConfigurationError(f"a stage of a pipeline cannot switch to {name[:80]!r}; start the job with that model")

    def serve(self) -> None:
        """Compute passes from the previous rank until rank 0 stops the job.

        Raises:
            RankError: another rank is gone.
            SurfwError: weights could not be read.
        """
        parts = self._open_here()
        self.run(lambda inner: _Worker(inner, parts.kv.reserve_for).work())

    def _answer_many(
        self,
        feed: Feed,
        options: GenerationOptions,
        *,
        on_result: Callable[[ManyResult], None],
        on_tokens: OnTokens | None,
        sequences: int,
    ) -> None:
        """Override for a pipeline; `sequences` is the number of micro-batches in flight."""
        parts = self._open_here()
        tokenizer = self.find_tokenizer()
        shared = InferenceRequest(prompt_ids=(0,), **options)

        def drive(inner: nn.Module) -> None:
            driver = _Driver(self, inner, tokenizer, shared, parts.kv.reserve_for)
            driver.run(feed, on_result=on_result, on_tokens=on_tokens, most=sequences)

        self.run(drive)


def _expect_one_model(manifest: Manifest) -> None:
    """Check that all ranks have the same model, because each rank resolves it through its own source.

    Raises:
        RankError: a rank has another model, or is gone.
    """
    identities = [""] * dist.get_world_size()
    try:
        dist.all_gather_object(identities, manifest.identity)
    except RuntimeError as exc:
        why = str(exc).partition("\n")[0][:120]
        raise RankError(f"another rank is gone ({why}); its own output says why; start the job again") from exc
    expect_one_model(identities, dist.get_rank())


class _Ends:
    """The connections to other ranks."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send without waiting. Keeps a reference to each tensor until its send has completed."""
        try:
            self._sending.append((dist.isend(tensor, to), tensor))
            while self._sending and self._sending[0][0].is_completed():
                self._sending.popleft()
        except RuntimeError as exc:
            raise self._gone(to, exc) from exc

    def flush(self) -> None:
        """Wait until all sends have completed."""
        while self._sending:
            with suppress(RuntimeError):
                self._sending.popleft()[0].wait()

    def receive(self, tensor: torch.Tensor, from_: int) -> torch.Tensor:
        """Receive a tensor in place."""
        try:
            dist.recv(tensor, from_)
        except RuntimeError as exc:
            raise self._gone(from_, exc) from exc
        return tensor

    def tell_next(self, kind: int, sequence: int, tokens: int, hidden: torch.Tensor | None = None) -> None:
        """Send a header, and hidden states if given, to the next rank; does nothing on the last rank."""
        if self.rank + 1 < self.count:
            self.send(torch.tensor([kind, sequence, tokens, 0]), self.rank + 1)
            if hidden is not None:
                self.send(hidden.contiguous(), self.rank + 1)

    def _gone(self, rank: int, exc: Exception) -> RankError:
        why = str(exc).partition("\n")[0][:120]
        return RankError(f"rank {rank} of {self.count} is gone ({why}); its own output says why; start the job again")


class _Stage:
    """Runs this rank's layers, for any number of sequences."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._caches: dict[int, DynamicCache] = {}
        self._cache_name = cache_name(inner)
        self._received: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        layers = next(list(one) for one in inner.modules() if isinstance(one, nn.ModuleList) and len(one))
        self._hooks = [
            layers[0].register_forward_pre_hook(self._replace_input, with_kwargs=True),
            layers[-1].register_forward_hook(self._keep_output),
        ]

    def close(self) -> None:
        """Remove the hooks from the layers."""
        for hook in self._hooks:
            hook.remove()

    def _replace_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._received is None:
            return None
        return ((self._received, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self._received})

    def _keep_output(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._last = output if isinstance(output, torch.Tensor) else output[0]

    def compute(self, sequence: int, ids: torch.Tensor, received: torch.Tensor | None) -> tuple[Any, torch.Tensor]:
        """Run one pass; returns the model's logits and this stage's last hidden states, of shape (1, tokens, width)."""
        cache = self._caches.setdefault(sequence, DynamicCache(config=self._inner.config))
        self._received = received
        options = {self._cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        output = self._inner(input_ids=ids, **options)
        assert self._last is not None, "the layer ran"
        return output.logits, self._last

    def end(self, sequence: int) -> None:
        """Free a sequence's KV cache."""
        self._caches.pop(sequence, None)


class _Worker:
    """Any rank but rank 0."""

    def __init__(self, inner: Any, reserve: Callable[[int, int], None]) -> None:
        self._stage, self._ends, self._reserve = _Stage(inner), _Ends(), reserve
        self._width, self._dtype = inner.config.hidden_size, inner.dtype

    def work(self) -> None:
        """Handle messages from the previous rank until it sends `_STOP`."""
        ends = self._ends
        try:
            while True:
                kind, sequence, tokens, _ = ends.receive(torch.zeros(4, dtype=torch.int64), ends.rank - 1).tolist()
                if kind == _PASS:
                    hidden = torch.empty(1, tokens, self._width, dtype=self._dtype)
                    self._pass(sequence, tokens, ends.receive(hidden, ends.rank - 1))
                    continue
                ends.tell_next(kind, sequence, tokens)
                if kind == _ROOM:
                    self._reserve(tokens, 0)
                elif kind == _END:
                    self._stage.end(sequence)
                else:
                    ends.flush()
                    return
        finally:
            self._stage.close()

    def _pass(self, sequence: int, tokens: int, hidden: torch.Tensor) -> None:
        logits, last = self._stage.compute(sequence, torch.zeros(1, tokens, dtype=torch.int64), hidden)
        if self._ends.rank + 1 < self._ends.count:
            self._ends.tell_next(_PASS, sequence, tokens, last)
        else:
            self._ends.send(logits[:, -1].contiguous(), 0)


@dataclass
class _Sequence:
    """A prompt that is being answered."""

    index: int
    request: InferenceRequest
    ids: torch.Tensor
    prompt_tokens: int
    most_tokens: int
    samples: bool
    processors: Any = field(repr=False)
    criteria: Any = field(repr=False)
    fed: int = 0  # tokens that are in every rank's KV cache

    @property
    def tokens(self) -> list[int]:
        """The tokens generated so far."""
        answer: list[int] = self.ids[0, self.prompt_tokens :].tolist()
        return answer


class _Driver:
    """Rank 0: starts sequences, computes the first stage, and chooses tokens."""

    def __init__(
        self,
        model: StreamingModel,
        inner: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        shared: InferenceRequest,
        reserve: Callable[[int, int], None],
    ) -> None:
        self._model, self._inner, self._tokenizer, self._shared = model, inner, tokenizer, shared
        self._stage, self._ends, self._reserve = _Stage(inner), _Ends(), reserve
        self._running: dict[int, _Sequence] = {}
        self._under_way: deque[tuple[_Sequence, torch.Tensor | None]] = deque()

    def run(
        self, feed: Feed, *, on_result: Callable[[ManyResult], None], on_tokens: OnTokens | None, most: int
    ) -> None:
        """Answer prompts until their feed ends."""
        if self._shared.seed is not None:
            torch.manual_seed(self._shared.seed)
        try:
            while self._running or not feed.has_ended:
                room = most - len(self._running)
                taken = feed.take(room, wait_seconds=0 if self._running else _PATIENCE_SECONDS) if room else []
                for index, request in taken:
                    try:
                        sequence = self._begin(index, request)
                    except ConfigurationError as exc:
                        on_result(ManyResult(index=index, error=str(exc)))
                        continue
                    self._make_room()
                    self._pass(sequence)
                if self._under_way:
                    self._advance(*self._under_way.popleft(), on_result, on_tokens)
            self._ends.tell_next(_STOP, 0, 0)
            self._ends.flush()
        finally:
            self._stage.close()

    def _begin(self, index: int, request: InferenceRequest) -> _Sequence:
        """Start a sequence with the logits processors and stopping criteria that `generate()` would use."""
        for name in ("temperature", "top_p", "top_k", "seed"):
            if getattr(request, name) != getattr(self._shared, name):
                raise ConfigurationError(f"{name} is {getattr(request, name)}, but it is the same for all of a run")
        if request.stop and self._tokenizer is None:
            raise ConfigurationError("the model has no tokenizer, so no text can end its generation")
        ids = encode_prompt(self._model, self._tokenizer, request)["input_ids"]
        if not ids.shape[-1]:
            raise ConfigurationError("the prompt has no tokens")
        config = generation_config(self._inner.generation_config, request)
        found: dict[str, Any] = {}

        def note(_: object, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            found.update(options)
            return input_ids

        self._inner.generate(ids, generation_config=config, custom_generate=note)
        sequence = _Sequence(
            index, request, ids, ids.shape[-1], ids.shape[-1] + request.max_new_tokens, bool(config.do_sample),
            found["logits_processor"], found["stopping_criteria"],
        )  # fmt: skip
        self._running[index] = sequence
        return sequence

    def _make_room(self) -> None:
        """Have every rank reserve memory for the KV caches of all running sequences."""
        tokens = sum(one.most_tokens for one in self._running.values())
        self._reserve(tokens, 0)
        self._ends.tell_next(_ROOM, 0, tokens)

    def _pass(self, sequence: _Sequence) -> None:
        """Compute this stage's part of a sequence's next pass and send the result to the next rank."""
        new = sequence.ids[:, sequence.fed :]
        sequence.fed = sequence.ids.shape[-1]
        logits, last = self._stage.compute(sequence.index, new, None)
        self._ends.tell_next(_PASS, sequence.index, new.shape[-1], last)
        self._under_way.append((sequence, logits[:, -1] if self._ends.count == 1 else None))

    def _advance(
        self,
        sequence: _Sequence,
        logits: torch.Tensor | None,
        on_result: Callable[[ManyResult], None],
        on_tokens: OnTokens | None,
    ) -> None:
        """Choose a token from the logits of the oldest pass, then continue the sequence or finish it."""
        if logits is None:
            width = self._inner.config.vocab_size
            logits = self._ends.receive(torch.empty(1, width, dtype=self._inner.dtype), self._ends.count - 1)
        scores = sequence.processors(sequence.ids, logits.to(copy=True, dtype=torch.float32))
        if sequence.samples:
            token = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        sequence.ids = torch.cat([sequence.ids, token], dim=-1)
        is_wanted = on_tokens is None or on_tokens(sequence.index, [int(token)]) is not False
        text, stopped = self._text(sequence)
        if is_wanted and not stopped and not bool(sequence.criteria(sequence.ids, None).all()):
            self._pass(sequence)
            return
        del self._running[sequence.index]
        self._stage.end(sequence.index)
        self._ends.tell_next(_END, sequence.index, 0)
        if text is None:
            text = self._decode(sequence)
        result = InferenceResult(text=text, token_ids=sequence.tokens, prompt_tokens=sequence.prompt_tokens)
        on_result(ManyResult(index=sequence.index, result=result))

    def _decode(self, sequence: _Sequence) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode(sequence.tokens, skip_special_tokens=True))

    def _text(self, sequence: _Sequence) -> tuple[str | None, bool]:
        """The text before the first stop text, and whether there is one."""
        if not sequence.request.stop:
            return None, False
        text = self._decode(sequence)
        at = [place for stop in sequence.request.stop if (place := text.find(stop)) >= 0]
        return (text[: min(at)], True) if at else (None, False)
