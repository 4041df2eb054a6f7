"""The quality measure equals the figures of plain transformers; how texts are split into passages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from surfw.errors import ConfigurationError, ModelError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.models.quality import Batch, Quality, Reference, _make_batches, held_out_text
from tests.checkpoints import resident

CORPUS = Path(__file__).resolve().parents[2] / "examples" / "demo_model" / "corpus"
TEXT = "Weights arrive while the model runs.\n\nA layer is fetched\nwhile the one before it computes.\n\n\n\nx\n"


def measured(store: Path, folder: Path, name: str, **options: Any) -> Reference:
    with StreamingModel.open(store, name) as model:
        return Reference(model, TEXT, folder, **options)


def test_of_a_decoder_the_likelihood_of_the_text_and_the_next_tokens_are_compared(
    store: Path, checkpoints: Path, tmp_path: Path
) -> None:
    reference = measured(store, tmp_path, "llama")
    own, passages = resident(checkpoints, "llama"), [torch.tensor([ids]) for ids in reference.passages]
    assert len(passages) == 2, "a passage of one token has none that follows"
    with torch.no_grad():
        logits = torch.cat([own(ids).logits[0, :-1] for ids in passages])
    others = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    found = reference.compare(reference.split(others))
    following = torch.cat([ids[0, 1:] for ids in passages])
    p, q = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    assert found.tokens == len(following)
    assert found.perplexity == pytest.approx(functional.nll_loss(q, following).exp().item(), rel=1e-5)
    assert found.kl == pytest.approx(functional.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    own_perplexity = pytest.approx(functional.nll_loss(p, following).exp().item(), rel=1e-5)
    assert reference.quality == Quality(tokens=len(following), perplexity=own_perplexity)


def test_of_an_encoder_its_states_and_embeddings_are_compared(store: Path, checkpoints: Path, tmp_path: Path) -> None:
    reference, own = measured(store, tmp_path, "bert"), resident(checkpoints, "bert").bert
    with torch.no_grad():
        states = [own(torch.tensor([ids])).last_hidden_state[0] for ids in reference.passages]
    source = torch.Generator().manual_seed(1)
    others = [one + torch.randn(one.shape, generator=source) for one in states]
    found = reference.compare(reference.split(torch.cat(others)))
    error = (torch.cat(others) - torch.cat(states)).norm() / torch.cat(states).norm()
    cosines = [
        functional.cosine_similarity(one.mean(0), other.mean(0), dim=0).item()
        for one, other in zip(states, others, strict=True)
    ]
    assert found == Quality(
        tokens=sum(map(len, states)),
        cosine=pytest.approx(sum(cosines) / len(cosines), rel=1e-5),
        relative_error=pytest.approx(error.item(), rel=1e-5),
    )


def test_outputs_of_another_program_are_cut_into_batches_and_must_be_numbers(store: Path, tmp_path: Path) -> None:
    reference = measured(store, tmp_path, "llama", most_tokens=20)
    assert reference.quality.tokens == 20
    logits = torch.cat([*reference._kept()])
    assert reference.compare(reference.split(logits)).kl == 0
    logits[3, 5] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        reference.compare(reference.split(logits))


def test_what_cannot_be_measured_is_said(store: Path, tmp_path: Path) -> None:
    with StreamingModel.open(store, "llama") as model, pytest.raises(ConfigurationError, match="the text is empty"):
        Reference(model, " \n\n", tmp_path)
    with StreamingModel.open(store, "t5") as model, pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        Reference(model, TEXT, tmp_path)


def test_batches_keep_the_order_and_take_no_more_than_they_may() -> None:
    passages = [[1] * length for length in (500, 100, 2, 400, 512, 3)]
    batches = _make_batches(passages, 64 * 1024)  # at most 1024 outputs in each
    assert [tuple(batch.ids.shape) for batch in batches] == [(2, 500), (2, 400), (2, 512)]
    assert [row for batch in batches for row in batch.mask.sum(1).tolist()] == [len(one) for one in passages]
    assert all(batch.ids.numel() <= 1024 for batch in batches)
    assert len(_make_batches(passages, 1 << 30)) == len(passages), "one passage is a batch whatever it takes"
    assert Batch.of([[7, 8], [9]]).continued.tolist() == [[True], [False]]


def test_the_text_is_none_that_the_demo_model_has_learned() -> None:
    pages = " ".join(" ".join(page.read_text("utf-8").split()) for page in CORPUS.glob("*.txt"))
    sentences = [one for one in " ".join(held_out_text().split()).split(". ") if one]
    assert len(sentences) > 80
    assert not [one for one in sentences if one in pages]
