"""Adapters at the command line: chunked over a base, applied, listed, and explained if no base is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.adapters import save_adapter, with_peft
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, complaint, surfw
from tests.cli.terminal import terminal


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "base")
    save_adapter(home / "base", home / "lora", r=4, target_modules=["q_proj"])
    assert surfw(home, "chunk", str(home / "base")).returncode == 0
    done = surfw(home, "chunk", str(home / "lora"), "--base", "base", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert (written["name"], written["base"], written["chunks"]) == ("lora", "base", 4)
    return home


def test_an_adapter_is_applied_by_option_and_by_its_own_name(home: Path) -> None:
    ids = "5,9,70,3"
    expected = with_peft(home / "base", home / "lora").generate(
        input_ids=torch.tensor([[5, 9, 70, 3]]), max_new_tokens=4, do_sample=False
    )[0, 4:]
    options = ("--prompt-ids", ids, "--max-new-tokens", "4", "--ignore-eos", "--json")
    for arguments in (("base", "--adapter", "lora"), ("lora",)):
        done = surfw(home, "infer", *arguments, *options)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["model"], answer["adapter"]) == ("base", "lora")
        assert answer["token_ids"] == expected.tolist()


def test_an_adapter_beside_its_base_has_a_draft_of_the_base(home: Path) -> None:
    each = (
        "infer",
        "--model",
        "base",
        "--model",
        "lora",
        "--prompt-ids",
        "5,9,70,3",
        "--max-new-tokens",
        "4",
        "--json",
    )
    plain = json.loads(surfw(home, *each).stdout)["answers"]
    assert surfw(home, "chunk", "base", "--from", str(home / "store"), "--codec", "none,int8").returncode == 0
    for draft in ("self:int8", "base"):
        done = surfw(home, *each, "--draft", draft)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["answers"]
        assert [one["token_ids"] for one in found] == [one["token_ids"] for one in plain]
    assert "lora is stored as" not in complaint(surfw(home, *each, "--draft", "self:int4"))


def test_who_replaces_a_base_hears_of_its_adapters(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "store", tmp_path / "store")
    again = surfw(tmp_path, "chunk", str(home / "base"))
    assert again.returncode == 0
    assert "other weights" not in again.stderr
    other = save_llama(tmp_path / "other", seed=1)
    done = surfw(tmp_path, "chunk", str(other), "--name", "base")
    assert done.returncode == 0
    assert "base has other weights now, over which 1 adapter of" in done.stderr
    assert "(such as lora) cannot be applied; chunk the adapters again" in done.stderr


def test_an_adapter_is_listed_shown_and_needed(home: Path) -> None:
    listed = surfw(home, "list")
    assert "LoRA over base" in listed.stdout
    assert "LoRA over base" in surfw(home, "show", "lora").stdout
    assert json.loads(surfw(home, "show", "lora", "--json").stdout)["base"] == "base"
    assert "base is the base of 1 adapter" in complaint(surfw(home, "rm", "base"))


def test_chunk_and_serve_and_infer_explain_an_adapter_alike(home: Path) -> None:
    folder = home / "lora"
    text = (
        f"{folder} is an adapter (adapter_config.json), no whole model: chunk its base first, and then the adapter "
        f"over it, with surfw chunk {folder} --base NAME"
    )
    assert complaint(surfw(home, "chunk", str(folder))) == text
    assert complaint(surfw(home, "infer", str(folder), "--prompt-ids", "1")) == text
    served = surfw(home, "serve", str(folder), "--port", "0", "--quiet")
    assert (served.returncode, text in served.stderr) == (1, True), served.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "bfloat16"), "--dtype: does not go with --base, as it is for whole models"),
        (("--in-place",), "--in-place: does not go with --base, as it is for whole models"),
        (("--codec", "int8"), "--codec: adapters are not quantised"),
    ],
)
def test_options_of_whole_models_do_not_go_with_a_base(home: Path, arguments: tuple[str, ...], said: str) -> None:
    done = surfw(home, "chunk", str(home / "lora"), "--base", "base", *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_an_answer_and_a_conversation_bear_the_name_of_the_adapter(home: Path) -> None:
    done = surfw(
        home, "infer", "--model", "base", "--model", "lora", "--model", "base", "--prompt", "Weights",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [line for line in done.stdout.splitlines() if line in {"base:", "lora:"}]
    assert names == ["base:", "lora:", "base:"]
    save_bert(home / "encoder")
    assert surfw(home, "chunk", str(home / "encoder")).returncode == 0
    with terminal(home, [SURFW, "chat", "base", "--no-live"], columns=200) as (it, process):
        it.read_to("base, which has no chat template")
        it.type("/model lora\r")
        it.read_to("lora, which has no chat template")
        it.type("/model encoder\r")  # it has no conversation: the session continues with the adapter
        it.read_to("so there is no conversation with it")
        it.type("/model\r")
        it.read_to("this is lora")
        it.type("/quit\r")
        assert process.wait(60) == 0
