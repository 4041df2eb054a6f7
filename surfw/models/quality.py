"""Measures how much a quantised form changes a model's outputs, by comparing it with the unquantised model on one text.

For models that generate, the logits after each token are compared. For other models, the last hidden states are, and
their mean over a passage. Results of different models are hardly comparable, and those of random weights mean nothing.

The unquantised model runs first. Its outputs are written to a folder and read back a batch at a time, so only one model
is open at a time, and the memory in addition to its weights is that of one batch.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from surfw.config import MIB
from surfw.errors import ConfigurationError, ModelError, UnsupportedModelError
from surfw.models.measure import most_positions
from surfw.models.streaming import StreamingModel
from surfw.skeleton.guards import foreign_errors

_PASSAGE_TOKENS = 512
_BATCH_TOKENS = 2048
_BATCH_BYTES = 64 * MIB
"""Most memory for the outputs of a batch, in float32; a batch has at least one passage, whatever its size."""

_ROWS = 64
"""Outputs compared at a time."""

_ROUNDING = 1e-6

_SPARE_POSITIONS = 2
"""RoBERTa counts positions from 2."""


def held_out_text() -> str:
    """English paragraphs about this subject that the demo model was not trained on."""
    return Path(__file__).with_suffix(".txt").read_text("utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How far a form is from the unquantised model, and its perplexity on the text.

    Attributes:
        tokens: number of outputs compared.
        perplexity: perplexity of the text: exp of the mean negative log-likelihood of each next token; None for models
            that do not generate, and for those with an encoder, which has read the token already.
        kl: mean Kullback-Leibler divergence of the next token's distribution from the unquantised model's, in nats.
        agreement: fraction of tokens after which both models have the same likeliest next token.
        cosine: for models that do not generate: mean cosine between both models' embeddings of a passage, each the
            mean of its last hidden states.
        relative_error: for models that do not generate: norm of the difference of the last hidden states ÷ norm of the
            unquantised ones.
    """

    tokens: int
    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Passages that run together.

    Attributes:
        ids: int64 of shape (passages, tokens), zeros behind shorter passages.
        mask: the same shape and dtype, 1 for the tokens of a passage.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, passages: Sequence[Sequence[int]]) -> "Batch":
        """Pad passages to one length."""
        longest = max(map(len, passages))
        rows = [[*one, *[0] * (longest - len(one))] for one in passages]
        kept = [[1] * len(one) + [0] * (longest - len(one)) for one in passages]
        return cls(torch.tensor(rows), torch.tensor(kept))

    @property
    def continued(self) -> torch.Tensor:
        """Mask of the tokens that have a next one: bool of shape (passages, tokens - 1)."""
        return self.mask[:, 1:].bool()


class Reference:
    """The unquantised model's outputs on a text, to compare other forms with.

    Attributes:
        passages: the token ids of each passage.
        quality: the number of tokens, and the model's own perplexity if it has one; everything else is None.
    """

    def __init__(
        self,
        model: StreamingModel,
        text: str,
        folder: Path,
        *,
        most_tokens: int | None = None,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run the model over the text.

        Args:
            model: an open model with unquantised weights.
            text: paragraphs, each of which is a separate passage.
            folder: where to store the outputs; the caller removes it.
            most_tokens: stop after this many tokens.
            on_step: called before each batch, with `batch 1 of 4`.

        Raises:
            ConfigurationError: the text is empty.
            UnsupportedModelError: the model has no tokenizer, or takes no text.
            ModelError: the outputs are not finite.
            SurfwError: weights could not be read.
        """
        if model.model.main_input_name != "input_ids":
            raise UnsupportedModelError(
                f"{model.manifest.name} takes {model.model.main_input_name}, not text; its quality is measured on text"
            )
        self._folder = folder
        self._generates = model.model.can_generate()
        config = model.model.config.get_text_config(decoder=True)
        width = config.vocab_size if self._generates else config.hidden_size
        self.passages = _read_passages(model.tokenizer, text, _passage_tokens(config), most_tokens)
        self._batches = _make_batches(self.passages, 4 * width)
        for number, outputs in enumerate(self.outputs_of(model, on_step)):
            save_file({"outputs": outputs}, self._file(number))
        self._has_perplexity = self._generates and not model.model.config.is_encoder_decoder
        own = self.compare(self._kept())
        self.quality = Quality(tokens=own.tokens, perplexity=own.perplexity)

    def outputs_of(
        self, model: StreamingModel, on_step: Callable[[str], None] = lambda _: None
    ) -> Iterator[torch.Tensor]:
        """A model's outputs on each batch, for `compare`.

        Yields:
            The logits of each token that has a next one, of shape (tokens, vocabulary), or the last hidden state of
            each token, of shape (tokens, width); passage by passage, in the model's compute dtype.
        """
        for number, batch in enumerate(self._batches, 1):
            on_step(f"batch {number} of {len(self._batches)}")
            yield _run(model, batch, generates=self._generates)

    def split(self, outputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split another program's concatenated outputs on all passages into batches, for `compare`."""
        of_batch = [int((batch.continued if self._generates else batch.mask).sum()) for batch in self._batches]
        return torch.split(outputs, of_batch)

    def compare(self, outputs: Iterable[torch.Tensor]) -> Quality:
        """Compare another model's outputs on each batch with the reference; see `outputs_of`.

        Raises:
            ModelError: the outputs are not finite.
        """
        compare = self._compare_logits if self._generates else self._compare_states
        found = compare(outputs)
        if not all(math.isfinite(value or 0) for value in (found.perplexity, found.kl, found.relative_error)):
            raise ModelError("the outputs are not finite, so they cannot be compared; expected numbers")
        return found

    def _compare_logits(self, outputs: Iterable[torch.Tensor]) -> Quality:
        likelihood = divergence = 0.0
        same = 0
        for batch, theirs, ours in zip(self._batches, self._kept(), outputs, strict=True):
            following = batch.ids[:, 1:][batch.continued]
            for at in range(0, len(following), _ROWS):
                rows = slice(at, at + _ROWS)
                p, q = theirs[rows].float().log_softmax(-1), ours[rows].float().log_softmax(-1)
                likelihood += q.gather(1, following[rows, None]).double().sum().item()
                share = p.exp()
                divergence += torch.where(share == 0, 0.0, share * (p - q)).double().sum().item()
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens = self._tokens
        return Quality(
            tokens=tokens,
            perplexity=torch.tensor(-likelihood / tokens).double().exp().item() if self._has_perplexity else None,
            kl=0.0 if -_ROUNDING < divergence / tokens < 0 else divergence / tokens,
            agreement=same / tokens,
        )

    def _compare_states(self, outputs: Iterable[torch.Tensor]) -> Quality:
        error = norm = 0.0
        cosines: list[float] = []
        for batch, theirs, ours in zip(self._batches, self._kept(), outputs, strict=True):
            p, q = theirs.double(), ours.double()
            error += (p - q).square().sum().item()
            norm += p.square().sum().item()
            lengths = batch.mask.sum(1).tolist()
            for one, other in zip(torch.split(p, lengths), torch.split(q, lengths), strict=True):
                cosines.append(torch.nn.functional.cosine_similarity(one.mean(0), other.mean(0), dim=0).item())
        return Quality(
            tokens=self._tokens,
            cosine=sum(cosines) / len(cosines),
            relative_error=math.sqrt(error / norm) if norm else math.sqrt(error),
        )

    def _kept(self) -> Iterator[torch.Tensor]:
        for number in range(len(self._batches)):
            yield load_file(self._file(number))["outputs"]

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"

    @property
    def _tokens(self) -> int:
        return sum(len(one) - self._generates for one in self.passages)


def measure_forms(
    reference: StreamingModel,
    open_form: Callable[[str], StreamingModel],
    codecs: Sequence[str],
    *,
    most_tokens: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Quality]:
    """Measure quantised forms on the text that comes with surfw.

    Args:
        reference: the unquantised model, not open yet; it is closed before the others are opened.
        open_form: creates the model in the form of a codec, not open yet.
        codecs: the codecs to measure.
        most_tokens: stop after this many tokens of the text.
        on_step: called with a description of each step.

    Raises:
        UnsupportedModelError: the model has no tokenizer, or takes no text.
        SurfwError: a model could not be run.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="surfw-quality-") as folder:
        with reference, foreign_errors("the text that comes with surfw"):
            on_step("running the unquantised model")
            kept = Reference(reference, held_out_text(), Path(folder), most_tokens=most_tokens)
        for codec in codecs:
            on_step(f"running the model as {codec}")
            with open_form(codec) as model:
                found[codec] = kept.compare(kept.outputs_of(model))
    return found


def _passage_tokens(config: Any) -> int:
    positions = most_positions(config) or _PASSAGE_TOKENS + _SPARE_POSITIONS
    return int(min(_PASSAGE_TOKENS, max(2, positions - _SPARE_POSITIONS)))


def _read_passages(
    tokenizer: PreTrainedTokenizerBase, text: str, longest: int, most_tokens: int | None
) -> list[list[int]]:
    """The token ids of each paragraph; long paragraphs are split, and passages of a single token left out."""
    passages: list[list[int]] = []
    left = most_tokens or len(text)
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        ids = cast("list[int]", tokenizer(words, verbose=False)["input_ids"]) if words else []
        for at in range(0, len(ids), longest):
            passage = ids[at : at + longest][: left + 1]
            if len(passage) > 1:
                passages.append(passage)
                left -= len(passage) - 1
    if not passages:
        raise ConfigurationError("the text is empty; expected some sentences to measure the quality on")
    return passages


def _make_batches(passages: Sequence[Sequence[int]], row_bytes: int) -> list[Batch]:
    """Group passages in order into batches, as large as `_BATCH_TOKENS` and `_BATCH_BYTES` allow."""
    most = min(_BATCH_TOKENS, _BATCH_BYTES // row_bytes)
    groups: list[list[Sequence[int]]] = []
    for passage in passages:
        if groups and max(map(len, [*groups[-1], passage])) * (len(groups[-1]) + 1) <= most:
            groups[-1].append(passage)
        else:
            groups.append([passage])
    return [Batch.of(group) for group in groups]


def _run(model: StreamingModel, batch: Batch, *, generates: bool) -> torch.Tensor:
    """Run a batch and return the outputs to compare, one row per token."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, "return_dict": True}
    if model.model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": batch.ids, "decoder_attention_mask": batch.mask}
    if generates:
        return cast("torch.Tensor", model(**inputs, use_cache=False).logits[:, :-1][batch.continued])
    found = model(**inputs, output_hidden_states=True)
    states = getattr(found, "last_hidden_state", None)
    if states is None:
        states = (found.get("decoder_hidden_states") or found.hidden_states)[-1]
    return cast("torch.Tensor", states[batch.mask.bool()])
