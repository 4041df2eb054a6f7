"""`--prompt-lookup` and `--draft`: the answer stays the same, and the summary reports the guesses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from surfw import ModelChunker
from surfw.cli.guessing import guessed
from tests.checkpoints import save_llama
from tests.cli.run import surfw

FACTS: Any = {
    "kind": "prompt_lookup", "draft": None, "guessed_tokens": 10, "accepted_tokens": 5, "acceptance": 0.5, "passes": 9,
    "guessed_passes": 3, "seconds_per_token_with": 0.5, "seconds_per_token_without": 1.0, "switched_off": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    ModelChunker(save_llama(home / "talker"), home / "store", codecs=("none", "int8")).chunk_model_sync()
    ModelChunker(save_llama(home / "talker"), home / "other").chunk_model_sync()
    return home


def run(home: Path, *more: str) -> Any:
    done = surfw(home, "infer", "talker", "Weights", "--max-new-tokens", "12", "--ignore-eos", "--json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_draft_of_the_store_of_another_or_of_the_model_itself(home: Path) -> None:
    plain = run(home)
    assert "speculation" not in plain
    for draft in ("self:int8", str(home / "other"), "talker"):
        found = run(home, "--draft", draft)
        assert found["token_ids"] == plain["token_ids"]
        assert found["speculation"]["draft"] == ("self:int8" if draft == "self:int8" else "talker")
    found = run(home, "--prompt-lookup", "3")
    assert found["token_ids"] == plain["token_ids"]
    assert found["speculation"]["kind"] == "prompt_lookup"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--draft", "self:int4"), 1, "surfw: error: talker is stored as it is (none) and as int8"),
        (("--draft", "nothing"), 1, "has no model 'nothing'"),
        (("--draft", "a", "--prompt-lookup", "3"), 2, "--draft does not go with --prompt-lookup"),
        (("--prompt-lookup", "0"), 2, "Invalid value for '--prompt-lookup': '0' is not a whole number >= 1"),
        (("--draft", ""), 2, "--draft is empty, expected self:int8, self:int4, a model's name, or a source"),
        (("--draft", "self:int3"), 2, "--draft is 'self:int3', expected self:int8 or self:int4"),
    ],
)
def test_what_cannot_guess_is_said_in_a_line(home: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = surfw(home, "infer", "talker", "Weights", "--no-live", *arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]


def test_a_folder_is_a_draft_only_if_it_is_written_as_a_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)  # where the store `other` is
    done = surfw(home, "infer", "talker", "Weights", "--no-live", "--draft", "other")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "has no model 'other'; it has: talker" in error
    assert error.endswith("for the folder of that name here, write ./other")
    for path in ("./other", "../" + home.name + "/other"):
        assert run(home, "--draft", path)["speculation"]["draft"] == "talker"


def test_what_a_draft_needs_counts_both(home: Path) -> None:
    done = surfw(home, "infer", "talker", "Weights", "--no-live", "--draft", "talker", "--memory-budget", "800kB")
    assert done.returncode == 1
    said = re.search(r"of the memory budget of 800.0 kB: both need over (1\.\d) MB; give more memory", done.stderr)
    assert said, done.stderr


def test_a_source_of_several_models_is_no_draft(home: Path) -> None:
    several = home / "several"
    for name in ("a", "b"):
        ModelChunker(home / "talker", several, name=name).chunk_model_sync()
    done = surfw(home, "infer", "talker", "Weights", "--no-live", "--draft", str(several))
    assert done.returncode == 1
    assert "holds 2 models; a draft is the only model of its source" in done.stderr


def test_many_prompts_do_not_guess(home: Path) -> None:
    done = surfw(home, "infer", "talker", "--prompts", "-", "--draft", "talker")
    assert done.returncode == 2
    assert "--prompts does not go with --draft" in done.stderr


def test_what_guessing_came_to_in_words() -> None:
    assert guessed(None) == []
    assert guessed(FACTS) == ["50 % of 10 guesses of prompt lookup were right (2.00 tok/s with them, 1.00 without)"]
    off = FACTS | {"kind": "draft", "draft": "small", "switched_off": True, "seconds_per_token_with": None}
    assert guessed(off) == [
        "50 % of 10 guesses of the draft small were right",
        "guessing was switched off, as it did not pay",
    ]
    assert guessed(FACTS | {"guessed_tokens": 1, "seconds_per_token_with": None}) == [
        "50 % of 1 guess of prompt lookup was right"
    ]
    assert guessed(FACTS | {"guessed_tokens": 0}) == ["prompt lookup guessed nothing"]
