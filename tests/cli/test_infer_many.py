"""`surfw infer --prompts`: JSON lines in, JSON lines out, also after the process was killed."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from surfw import ModelChunker
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, environment, surfw
from tests.cli.terminal import terminal
from tests.services import warm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for folder in (save_llama(home / "talker"), save_bert(home / "encoder")):
        ModelChunker(folder, home / "store").chunk_model_sync()
    return home


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_json_lines_and_a_bad_line_stops_nobody(home: Path, tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "Weights"},
        "{no json",
        {"prompt": "while", "max_new_tokens": 2},
        "",
        {"id": "a", "prompt": "again"},
        {"id": "b"},
        {"id": "c", "prompt": "x", "temprature": 1},
        {"id": "d", "prompt_ids": [7, 8, 9], "ignore_eos": True},
        ["a list"],
        {"id": "e", "prompt": "x", "max_new_tokens": 0},
    )
    done = surfw(home, "infer", "talker", "--prompts", str(prompts), "--max-new-tokens", "5", "--ordered")
    assert done.returncode == 1
    found = read(done.stdout)
    assert [(one["id"], one["line"], "error" in one) for one in found] == [
        ("a", 1, False), (None, 2, True), (3, 3, False), ("a", 5, True), ("b", 6, True), ("c", 7, True),
        ("d", 8, False), (None, 9, True), ("e", 10, True),
    ]  # fmt: skip
    assert "line 1 has the id" in found[3]["error"]
    assert "temprature" in found[5]["error"]
    assert len(found[2]["token_ids"]) <= 2
    assert len(found[6]["token_ids"]) == 5
    assert found[6]["prompt_tokens"] == 3
    expected = """a line is JSON, an object such as {"prompt": "…"}, not '{no json'"""
    assert found[1]["error"] == expected
    assert f"surfw: line 2 of the prompts: {expected}" in done.stderr.splitlines()
    assert "3 prompts answered, 6 failed" in done.stderr
    assert "6 prompts of 9 could not be answered" in done.stderr.splitlines()[-1]
    alone = surfw(
        home, "infer", "talker", "--prompts", "-", "-q", "--max-new-tokens", "5", stdin='{"prompt": "Weights"}'
    )
    assert alone.returncode == 0
    assert alone.stderr == ""
    assert read(alone.stdout)[0]["text"] == found[0]["text"]


def test_an_encoder_answers_with_what_its_head_says(home: Path, tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "Weights while"},
        {"id": "b", "prompt": "the [MASK] computes"},
        {"id": "c", "prompt": "Weights", "pair": "while"},
        {"id": "d", "prompt": "Weights while"},
        {"id": "e", "prompt": "Weights", "prompt_name": "query"},
    )
    done = surfw(home, "infer", "encoder", "--prompts", str(prompts), "--ordered")
    assert done.returncode == 1
    first, masked, pair, same, named = read(done.stdout)
    assert len(first["embedding"]) == 64
    assert first["pooling"]["modes"] == ["mean"]
    assert same["embedding"] == first["embedding"]
    assert len(masked["predictions"][0]["candidates"]) == 5
    assert "reads one text; give no second one" in pair["error"]
    assert "has no prompts of its own" in named["error"]
    assert "text" not in first
    assert "3 prompts answered, 2 failed" in done.stderr


def test_killed_and_resumed_no_id_is_lost_or_doubled(home: Path, tmp_path: Path) -> None:
    count = 200
    prompts = write(
        tmp_path / "prompts.jsonl",
        *(
            {"id": at, "prompt_ids": [7 + at % 50] * (1 + at % 30), "max_new_tokens": 1 + at % 40}
            for at in range(count)
        ),
    )
    output = tmp_path / "answers.jsonl"
    command = ["infer", "talker", "--prompts", str(prompts), "--output", str(output), "--ignore-eos", "--resume", "-q"]
    for answered in (30, 100):
        process = warm.start([SURFW, *command], modules=warm.MODELS, env=environment(home))
        while not output.exists() or output.read_bytes().count(b"\n") < answered:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with output.open("ab") as file:
        file.write(b'{"id": 199, "text": "torn')
    again = surfw(home, *command[:-1])
    assert again.returncode == 0, again.stderr
    assert "answered before" in again.stderr
    found = read(output.read_text())
    assert sorted(one["id"] for one in found) == list(range(count))
    assert {one["id"]: len(one["token_ids"]) for one in found} == {at: 1 + at % 40 for at in range(count)}


def test_interrupted_it_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": "Weights", "max_new_tokens": 200} for _ in range(200)))
    output = tmp_path / "answers.jsonl"
    command = [SURFW, "infer", "talker", "--prompts", str(prompts), "--output", str(output), "--ignore-eos"]
    with warm.start(command, modules=warm.MODELS, env=environment(home), stderr=subprocess.PIPE) as process:
        while not output.exists() or not output.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.wait(60) == 130
    assert "the same command with --resume goes on where it stopped" in said


@pytest.mark.parametrize("to_file", [False, True])
def test_answers_begin_rows_of_their_own_above_the_progress_bar(to_file: bool, home: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"id": at, "prompt": "Weights"} for at in range(5)), "{}")
    command = [SURFW, "infer", "talker", "--prompts", str(prompts), "--sequences", "1", "--max-new-tokens", "4"]
    with (tmp_path / "answers.jsonl").open("w+b") as file:
        with terminal(home, command, columns=600, stdout=file if to_file else None) as (window, _):
            pass
        file.seek(0)
        shown = file.read().decode() if to_file else "\n".join(row for row in window.rows() if '"line"' in row)
    assert sorted(one["id"] for one in read(shown)) == [0, 1, 2, 3, 4, 6]
    assert b"answering" in window.seen
    assert any(row.startswith("surfw: line 6 of the prompts: give either") for row in window.rows())
    assert not any("answering" in row for row in window.rows())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--ordered",), "--ordered needs --prompts FILE; add it, or leave --ordered out"),
        (("--prompts", "{prompts}", "--resume"), "; add it, or leave --resume out"),
        (("--prompts", "{prompts}", "--json"), "--prompts does not go with --json"),
        (("--prompts", "{prompts}", "--prompt", "x"), "--prompts does not go with a prompt"),
        (("--prompts", "{folder}"), " (--prompts) cannot be read: it is a folder; name a file with a line such as"),
        (("--prompts", "{folder}/nosuch"), "/nosuch (--prompts) cannot be read: there is no such file; name a file"),
        (("-prompts", "{folder}/nosuch"), "No such option: -p; did you mean --prompts?"),
        (("-prompts=x",), "No such option: -p; did you mean --prompts?"),
        (("--prompts", "{prompts}", "--output", "{prompts}"), "add --resume to go on with it"),
        (("--prompts", "{prompts}", "--output", "{prompts}", "--resume"), "is no answer of surfw's"),
        (("--prompts", "{prompts}", "--output", "{folder}"), "cannot be written to"),
    ],
)
def test_wrong_options(options: tuple[str, ...], complaint: str, home: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "Weights"})
    filled = [one.format(prompts=prompts, folder=tmp_path) for one in options]
    done = surfw(home, "infer", "talker", *filled)
    assert done.returncode in {1, 2}
    assert complaint in done.stderr
    assert done.stdout == ""
    assert prompts.read_text() == '{"id": "a", "prompt": "Weights"}\n'


def test_a_reader_that_leaves_ends_it_without_a_word(home: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": "Weights"} for _ in range(100)))
    command = [SURFW, "infer", "talker", "--prompts", str(prompts), "-q"]
    pipe = subprocess.PIPE
    with warm.start(command, modules=warm.MODELS, env=environment(home), stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) != 0


def test_a_full_disk_is_an_error_that_names_the_file(home: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "Weights"})
    done = surfw(home, "infer", "talker", "--prompts", str(prompts), "--output", "/dev/full")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("surfw: error: an answer cannot be written to /dev/full: No space left on device; mend that")
