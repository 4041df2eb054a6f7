"""Each form of a model is compared with the unquantised one, as data and as printed text."""

import asyncio
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from surfw.bench.peers import PEERS
from surfw.bench.peers.gguf_file import check_gguf
from surfw.bench.quality import QualityResult, QualityRow, QualityWork, bench_quality
from surfw.chunking import prepare_model, write_model
from surfw.cli import bench_view
from surfw.errors import ConfigurationError
from surfw.storage import open_backend
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import surfw

TEXT = "Weights arrive while the model runs.\n\nA layer is fetched while the one before it computes."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA, whose layers are quantised."""
    return save_llama(tmp_path_factory.mktemp("quality") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A short text."""
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that llama.cpp is not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


@pytest.mark.usefixtures("alone")
def test_each_form_of_a_checkpoint_is_measured_beside_it(checkpoint: Path, text: str, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "work").mkdir()
    work = QualityWork(checkpoint=str(checkpoint), text=text, folder=str(tmp_path / "work"))
    found = bench_quality(work, on_progress=said.append)
    assert [row.name for row in found.rows] == ["unquantised", "int8", "int4"]
    exact, int8, int4 = found.rows
    assert (exact.kl, exact.agreement, exact.failed) == (None, None, None)
    assert (exact.perplexity or 0) > 1
    assert 0 < (int8.kl or 0) < (int4.kl or 0)
    assert (exact.stored_bytes or 0) > (int8.stored_bytes or 0) > (int4.stored_bytes or 0) > 0
    assert found.work == {
        "model": "tiny", "class_name": "LlamaForCausalLM", "source": None, "text": text, "passages": 2,
        "tokens": exact.tokens,
    }  # fmt: skip
    assert any(note.startswith("not compared with llama.cpp: llama.cpp is not installed") for note in found.notes)
    assert said[1:] == ["unquantised: batch 1 of 1", "int8: batch 1 of 1", "int4: batch 1 of 1"]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.usefixtures("alone")
def test_of_a_model_in_a_store_the_forms_that_it_has(text: str, tmp_path: Path) -> None:
    async def write(*codecs: str, to: str) -> None:
        with prepare_model(str(save_bert(tmp_path / "bert"))) as prepared:
            await write_model(prepared, open_backend(to), codecs=codecs)

    store = str(tmp_path / "store")
    work = QualityWork(source=store, model="bert", text=text)
    asyncio.run(write("none", to=store))
    with pytest.raises(
        ConfigurationError, match=r"bert is stored as it is \(none\) in .*, not as int8; store it so: surfw chunk"
    ):
        bench_quality(work)
    alone = str(tmp_path / "alone")
    asyncio.run(write("int4", to=alone))
    with pytest.raises(ConfigurationError, match=r"without its exact weights.*name its checkpoint"):
        bench_quality(replace(work, source=alone))
    asyncio.run(write("none", "int8", to=store))
    found = bench_quality(work)
    assert [row.name for row in found.rows] == ["unquantised", "int8"]
    assert 0.99 < (found.rows[1].cosine or 0) < 1
    assert 0 < (found.rows[1].relative_error or 0) < 0.1
    assert any(note.startswith("it generates nothing") for note in found.notes)


def test_what_cannot_be_measured_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"codecs": ["lossless"]}, "codec 'lossless' loses nothing, or is not known; expected int8 or int4"),
        ({"text": "/no.txt"}, "the text /no.txt cannot be read: No such file or directory; expected a text file"),
        ({"folder": str(tmp_path / "no")}, "no is not a folder"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            bench_quality(QualityWork(checkpoint=str(checkpoint), **options))  # type: ignore[arg-type]


def test_llama_cpp_reads_the_same_tokens(checkpoint: Path, text: str) -> None:
    if reason := PEERS["llama.cpp"].installed() or check_gguf(str(checkpoint)):
        pytest.skip(reason)
    rows = {row.name: row for row in bench_quality(QualityWork(checkpoint=str(checkpoint), text=text)).rows}
    assert {name: row.failed for name, row in rows.items()} == dict.fromkeys(rows)
    assert rows["llama.cpp"].perplexity == pytest.approx(rows["unquantised"].perplexity, rel=0.01)
    assert (rows["llama.cpp"].kl or 0) < (rows["llama.cpp-q8_0"].kl or 0) < (rows["llama.cpp-q4_0"].kl or 0)


def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"tokens": 1880, "stored_bytes": 1_800_000}
    found = QualityResult(
        benchmark="quality",
        machine={"cpu": "one"},
        work={"model": "demo", "class_name": "X", "source": None, "text": None, "passages": 32, "tokens": 1880},
        rows=(
            QualityRow(name="unquantised", stored_bytes=3_500_000, tokens=1880, perplexity=12.3456),
            QualityRow(name="int8", perplexity=12.4, kl=0.00096, agreement=0.9931, **numbers),  # type: ignore[arg-type]
            QualityRow(name="llama.cpp-q8_0", failed="was ended by SIGILL"),
        ),
        notes=("llama.cpp-q8_0: was ended by SIGILL",),
    )
    bench_view.show_quality(found)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "                  size  perplexity  KL, nats  same next token",
        "unquantised     3.5 MB       12.35",
        "int8            1.8 MB        12.4   0.00096           99.3 %",
        "llama.cpp-q8_0  failed",
        "",
        "demo: 1,880 tokens of the text that comes with surfw, in 32 passages",
        "- llama.cpp-q8_0: was ended by SIGILL",
        "on cpu one",
    ]
    assert json.loads(json.dumps(asdict(found)))["rows"][1]["kl"] == 0.00096


def test_the_command_takes_a_checkpoint(text: str, tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    done = surfw(tmp_path, "bench", "quality", str(bert), "--codec", "int4", "--text", text, "--json", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found.keys() == {"benchmark", "machine", "work", "rows", "notes"}
    assert found["work"]["model"] == "bert"
    assert [row["name"] for row in found["rows"]] == ["unquantised", "int4"]
    assert found["rows"][1].keys() == {
        "name", "stored_bytes", "tokens", "perplexity", "kl", "agreement", "cosine", "relative_error", "failed",
    }  # fmt: skip
