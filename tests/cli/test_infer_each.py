"""`surfw infer --model A --model B`: the answers of several models to one prompt."""

import json
from pathlib import Path

import pytest

from surfw import ModelChunker
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, surfw
from tests.cli.terminal import terminal


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    made = [save_llama(home / name, seed=at, eos_token_id=None) for at, name in enumerate(("one", "other"))]
    for folder in (*made, save_bert(home / "encoder")):
        ModelChunker(folder, home / "store").chunk_model_sync()
    return home


EACH = ("infer", "--model", "one", "--model", "other", "--prompt", "Weights", "--max-new-tokens", "5")


def test_each_model_answers_as_it_does_alone(home: Path) -> None:
    done = surfw(home, *EACH, "--model", "encoder", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    one, other, encoder = document["answers"]
    assert [answer["model"] for answer in document["answers"]] == ["one", "other", "encoder"]
    assert one["token_ids"] != other["token_ids"]
    assert len(encoder["embedding"]) == 64
    alone = surfw(home, "infer", "other", "Weights", "--max-new-tokens", "5", "--json")
    expected = json.loads(alone.stdout)
    assert other["token_ids"] == expected["token_ids"]
    assert other["text"] == expected["text"]
    assert other["cache"]["hits"] + other["cache"]["misses"] == expected["cache"]["hits"] + expected["cache"]["misses"]


def test_each_answer_stands_under_its_name(home: Path) -> None:
    found = json.loads(surfw(home, *EACH, "--json").stdout)["answers"]
    done = surfw(home, *EACH)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"one:\n{found[0]['text']}\nother:\n{found[1]['text']}\n"
    assert done.stderr.count("surfw: 5 tokens in") == 2


@pytest.mark.parametrize("options", [(), ("--live", "full")])
def test_each_answer_in_a_terminal(home: Path, options: tuple[str, ...]) -> None:
    with terminal(home, [SURFW, *EACH, *options], columns=120) as (window, process):
        pass
    shown = "\n".join(window.rows())
    assert process.returncode == 0, shown
    assert shown.count("surfw: 5 tokens in") == 2
    assert shown.index("one:") < shown.index("surfw: 5 tokens in") < shown.index("other:")
    assert "/5 tokens" not in shown, "the status goes"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--model", "third"), "third"),
        (("--model", f"one@b3:{'0' * 64}"), "is not the model that is wanted"),
        (("--model", ""), "--model is ''"),
        (("--trace", "trace.json"), "--trace does not go with several models (--model); give one of them"),
        (("--explain",), "--explain does not go with several models (--model); give one of them"),
        (("--adapter", "x"), "--adapter does not go with several models (--model); give one of them"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_computed(
    options: tuple[str, ...], complaint: str, home: Path
) -> None:
    done = surfw(home, *EACH, *options)
    assert done.returncode in {1, 2}
    assert complaint in done.stderr.splitlines()[-1]
    assert done.stdout == ""
