"""What `chunk` reports about the quantised forms it has written, and when it refers to another command."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from surfw.cli import chunk_quality
from surfw.config import GB
from surfw.models.quality import Quality
from tests.checkpoints import save_llama
from tests.cli.run import surfw


def test_forms_are_measured_beside_the_checkpoint_or_the_store(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "tiny")
    done = surfw(tmp_path, "chunk", str(checkpoint), "--codec", "int4")
    assert done.returncode == 0, done.stderr
    assert "tiny: no exact weights are stored; to have them too, chunk the checkpoint with --codec none,int4\n" in (
        done.stderr
    )
    assert re.fullmatch(
        r"int4: KL [0-9.e-]+, next token as unquantised [0-9]+\.[0-9] % on 512 tokens", done.stdout.splitlines()[-1]
    )
    done = surfw(tmp_path, "chunk", str(checkpoint), "--name", "both", "--codec", "none,int8,int4", "--json")
    assert done.stderr == ""
    quality = json.loads(done.stdout)["quality"]
    assert quality.keys() == {"int8", "int4"}
    assert 0 < quality["int8"]["kl"] < quality["int4"]["kl"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"payload_bytes": 5 * GB}, "because the model has 5.0 GB; 'surfw bench quality' does it"),
        ({"payload_bytes": GB, "files": ()}, "because the model has no tokenizer"),
        ({"payload_bytes": GB, "files": ("tokenizer.json",)}, "could not be measured: there is no folder /nowhere"),
    ],
)
def test_what_keeps_it_from_being_measured_is_a_warning(
    facts: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    place: chunk_quality.Place = ("/nowhere", {})
    manifest: Any = SimpleNamespace(**facts)
    assert not chunk_quality.measure(manifest, ["int4"], reference=place, written=place, step=lambda _: None)
    assert said in caplog.text


def test_a_line_says_what_was_compared() -> None:
    decoder = Quality(tokens=512, perplexity=9.0, kl=0.00671, agreement=0.9648)
    assert chunk_quality.describe("int4", decoder) == (
        "int4: KL 0.0067, next token as unquantised 96.5 % on 512 tokens"
    )
    encoder = Quality(tokens=500, cosine=0.99958, relative_error=0.0302)
    assert chunk_quality.describe("int8", encoder) == (
        "int8: embeddings have the cosine 0.9996, last hidden states are off by 3.0 %, on 500 tokens"
    )
