"""Models whose tables are never in memory give the bits of the resident ones, and read only what they need."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surfw.config import MIB
from surfw.errors import IntegrityError
from surfw.models import StreamingModel
from surfw.runtime.absent import AbsentParameter
from surfw.runtime.rows import tables_of
from surfw.skeleton.build import Skeleton
from surfw.storage import Store, open_backend
from tests.exactness.families import Family
from tests.runtime.row_wise import RowWise, row_wise
from tests.servers import serve

ROWS, WIDTH = 12288, 64
_PLAIN = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": ROWS, "max_position_embeddings": 128,
}  # fmt: skip
_T5 = {
    "num_layers": 2, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_heads": 4, "vocab_size": ROWS,
    "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _PLAIN | {"tie_word_embeddings": False}),
    "gpt2": Family("GPT2LMHeadModel", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": ROWS}),
    "gemma2": Family("Gemma2ForCausalLM", _PLAIN | {"num_key_value_heads": 2, "head_dim": 16}),
    "opt": Family(
        "OPTForCausalLM",
        {
            "hidden_size": WIDTH, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": ROWS,
            "max_position_embeddings": 2048, "word_embed_proj_dim": WIDTH,
        },
    ),
    "bert": Family("BertForMaskedLM", _PLAIN),
    "t5": Family("T5ForConditionalGeneration", _T5),
    "t5-untied": Family("T5ForConditionalGeneration", _T5 | {"tie_word_embeddings": False}),
    "bart": Family(
        "BartForConditionalGeneration",
        {
            "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": ROWS, "scale_embedding": True,
        },
    ),
}  # fmt: skip
TABLES = {
    "llama": {"model.embed_tokens": ["model.embed_tokens.weight"]},
    "gpt2": {"transformer.wte": ["transformer.wte.weight"], "transformer.wpe": ["transformer.wpe.weight"]},
    "gemma2": {"model.embed_tokens": ["model.embed_tokens.weight"]},
    "opt": {
        "model.decoder.embed_tokens": ["model.decoder.embed_tokens.weight"],
        "model.decoder.embed_positions": ["model.decoder.embed_positions.weight"],
    },
    "bert": {"bert.embeddings": ["bert.embeddings.word_embeddings.weight"]},
}
"""Units, with the tables that they look up."""


def given(model: Any, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = {"input_ids": torch.randint(3, ROWS, (batch, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.randint(3, ROWS, (batch, 5), generator=generator)
    return ids


def all_absent(opened: RowWise) -> bool:
    provided = {info.name for chunk in opened.manifest.chunks for info in chunk.tensors}
    named = dict(opened.model.named_parameters())
    return all(isinstance(named[name], AbsentParameter) for name in provided if name in named)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_tables_outside_of_memory_the_bits_are_the_same(name: str, tmp_path: Path) -> None:
    with row_wise(FAMILIES[name], tmp_path) as opened:
        for batch in (1, 2):
            ids = given(opened.resident, batch)
            assert torch.equal(opened.model(**ids).logits, opened.resident(**ids).logits)
            assert all_absent(opened)
        if opened.resident.can_generate():
            prompt = {"input_ids": given(opened.resident, 1)["input_ids"]}
            settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1, "eos_token_id": None}
            assert torch.equal(
                opened.model.generate(**prompt, **settings), opened.resident.generate(**prompt, **settings)
            )
        assert opened.metrics.count("row_reads") > 0
        assert opened.engine.acquired, "layers come whole"
        assert not opened.engine.acquired & set(opened.units), "no unit with a table does"


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_rows_of_a_quantised_table_have_the_values_of_the_whole(dtype: torch.dtype | None, tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path, dtype=dtype, codec="int8") as opened:
        name = str(dtype or torch.float32).removeprefix("torch.")
        with StreamingModel.open(str(tmp_path / "store"), dtype=name) as whole:
            for batch in (1, 2):
                ids = given(opened.resident, batch)
                assert torch.equal(opened.model(**ids).logits, whole(**ids).logits)
        assert opened.metrics.count("row_reads") == 2
        assert not opened.engine.acquired & set(opened.units)
        assert {kind for chunk in opened.manifest.chunks for form in chunk.forms for kind in form.kinds} >= {"int8"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_found_in_what_modules_are(name: str, tmp_path: Path) -> None:
    with row_wise(FAMILIES[name], tmp_path) as opened:
        assert {path: list(unit.looked_up) for path, unit in opened.units.items()} == TABLES[name]


def test_what_lies_beside_a_table_in_its_unit_is_named(tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path) as opened:
        embeddings = opened.units["bert.embeddings"]
        assert embeddings.chunks == ("bert.embeddings",)
        assert sorted(name.removeprefix("bert.embeddings.") for name in embeddings.others) == [
            "LayerNorm.bias", "LayerNorm.weight", "position_embeddings.weight", "token_type_embeddings.weight",
        ]  # fmt: skip
        assert "cls" not in opened.units, "it multiplies by the table"


def test_tables_that_are_small_are_none(tmp_path: Path) -> None:
    with row_wise(FAMILIES["gpt2"], tmp_path) as opened:
        skeleton, manifest = Skeleton(opened.model, torch.float32), opened.manifest
        assert set(tables_of(skeleton, manifest, least_bytes=ROWS * WIDTH * 4)) == {"transformer.wte"}
        assert tables_of(skeleton, manifest, least_bytes=ROWS * WIDTH * 4 + 1) == {}


def test_a_chunk_that_is_stored_otherwise_has_no_tables(tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path) as opened:
        skeleton, chunks = Skeleton(opened.model, torch.float32), opened.manifest.chunks
        changed = tuple(replace(one, forms=(replace(one.forms[0], codec="lossless"),)) for one in chunks)
        assert tables_of(skeleton, replace(opened.manifest, chunks=changed)) == {}


def test_no_more_blocks_are_read_than_hold_what_is_needed(tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path) as opened:
        rows_per_block = MIB // (WIDTH * 4)
        low, high = torch.tensor([[5, 7, 5]]), torch.tensor([[5, ROWS - 1]])
        assert rows_per_block == ROWS // 3
        before = opened.metrics.count("fetched_bytes")
        opened.model(low)
        layers = sum(chunk.payload_bytes for chunk in opened.manifest.chunks if chunk.name not in opened.units)
        assert opened.metrics.count("fetched_bytes") - before == MIB + layers
        assert opened.source.blocks("model.embed_tokens") == [0]
        opened.model(high)
        assert opened.source.blocks("model.embed_tokens") == [2]
        opened.model(torch.tensor([[ROWS - 1, 7]]))
        assert opened.source.blocks("model.embed_tokens") == []
        assert opened.metrics.count("row_reads") == 3


def test_small_tensors_beside_a_table_are_read_alone_and_stay(tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path, keep_bytes=0) as opened:
        ids = torch.tensor([[5, 6, 7]])
        opened.model(ids)
        read = opened.source.blocks("bert.embeddings")
        assert sorted(set(read)) == [0, 1, 2, 3], "block 3 for the small ones, 0 for rows, the whole for the head"
        assert opened.tables.others("bert.embeddings")["bert.embeddings.LayerNorm.weight"].shape == (WIDTH,)
        opened.model(ids)
        assert opened.source.blocks("bert.embeddings") == [0, 0, 1, 2, 3], "a row, and the whole for the head"


def test_a_server_sends_no_more_than_the_parts(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    asyncio.run(Store(open_backend(tmp_path / "store")).create())
    with serve(tmp_path / "store") as served, row_wise(FAMILIES["llama"], tmp_path, url=served.url) as opened:
        ids = torch.tensor([[5, 7, ROWS - 1]])
        before = served.stats()["bytes_sent"]
        assert torch.equal(opened.model(ids).logits, opened.resident(ids).logits)
        layers = sum(chunk.payload_bytes for chunk in opened.manifest.chunks if chunk.name not in opened.units)
        assert served.stats()["bytes_sent"] - before == 2 * MIB + layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_cast_part_by_part(dtype: torch.dtype, tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path, dtype=dtype) as opened:
        for batch in (1, 2):
            ids = given(opened.resident, batch)
            seen = opened.model(**ids).logits
            assert seen.dtype == dtype
            assert torch.equal(seen, opened.resident(**ids).logits)
        assert not opened.engine.acquired & set(opened.units)


def test_an_embedding_that_changes_its_table_has_the_whole_of_it(tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path) as opened:
        ids = torch.tensor([[5, 6]])
        opened.model.model.embed_tokens.max_norm = opened.resident.model.embed_tokens.max_norm = 0.01
        assert torch.equal(opened.model(ids).logits, opened.resident(ids).logits)
        assert opened.metrics.count("row_reads") == 0
        assert "model.embed_tokens" in opened.engine.acquired
        assert all_absent(opened)


def test_a_table_that_is_used_outside_of_its_module_is_looked_up_in_by_rows_too(tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path) as opened:
        given = torch.ones(2, WIDTH)
        ids = torch.tensor([7, 7, ROWS - 1])
        table, resident = opened.model.model.embed_tokens.weight, opened.resident.model.embed_tokens.weight
        assert torch.equal(nn.functional.embedding(ids, table, -1), nn.functional.embedding(ids, resident, -1))
        assert opened.engine.acquired == set()
        assert torch.equal(nn.functional.linear(given, table), nn.functional.linear(given, resident))
        assert torch.equal(given @ table.T, given @ resident.T)
        assert opened.engine.acquired == set(), "nothing runs: whoever looks gets a copy"


def test_ids_out_of_range_are_torchs_error(tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path) as opened:
        for ids in (torch.tensor([[1, ROWS]]), torch.tensor([[-1, 3]])):
            with pytest.raises(IndexError, match="index out of range in self"):
                opened.resident(ids)
            with pytest.raises(IndexError, match="index out of range in self"):
                opened.model(ids)
        assert all_absent(opened)
        assert opened.source.blocks("model.embed_tokens") == []


@pytest.mark.parametrize("chunk", ["model.embed_tokens", "lm_head"])
def test_a_damaged_block_is_an_error_until_it_is_mended(chunk: str, tmp_path: Path) -> None:
    with row_wise(FAMILIES["llama"], tmp_path) as opened:
        location = opened.manifest.by_name[chunk].forms[0].locations[0]
        blob = tmp_path / "store" / location.object
        ids = torch.tensor([[5, 6]])
        expected = opened.resident(ids).logits
        _flip(blob, location.start + 100)
        with pytest.raises(IntegrityError, match=f"chunk {chunk} from .* is damaged: block 0 has BLAKE3"):
            opened.model(ids)
        assert all_absent(opened)
        _flip(blob, location.start + 100)
        assert torch.equal(opened.model(ids).logits, expected)


def _flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_hooks_that_are_interrupted_can_go_on(tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path) as opened:
        ids = torch.tensor([[5, 6]])

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = opened.model.bert.embeddings.word_embeddings.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened.model(ids)
        handle.remove()
        opened.hooks.recover()
        assert all_absent(opened)
        assert torch.equal(opened.model(ids).logits, opened.resident(ids).logits)


def test_clearing_gives_all_memory_back_and_everything_is_read_again(tmp_path: Path) -> None:
    with row_wise(FAMILIES["bert"], tmp_path) as opened:
        ids = torch.tensor([[5, 6]])
        expected = opened.model(ids).logits
        first = opened.source.blocks("bert.embeddings")
        opened.tables.clear()
        assert torch.equal(opened.model(ids).logits, expected)
        assert opened.source.blocks("bert.embeddings") == first
