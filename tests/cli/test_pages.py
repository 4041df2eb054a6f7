"""The commands and settings on the pages work as written."""

import contextlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from tests import pages, regenerate
from tests.cli.run import surfw
from tests.pages import Block
from tests.sandbox import NEEDS_A_NETWORK, Sandbox, commands
from tests.services.s3 import S3Service

BUCKET = "s3://bucket"
SETTINGS_FILES = pages.blocks("toml")


def test_the_first_command_prints_english(tmp_path: Path) -> None:
    lines = [line for one in pages.blocks("sh") if one.page == "README.md" for line in commands(one.text)]
    (command,) = [found[1] for line in lines if (found := re.search(r"^python3 -m venv .*/surfw (infer .*)$", line))]
    prompt = re.fullmatch(r'infer --prompt "(.*)"', command)
    assert prompt is not None
    done = surfw(tmp_path, "infer", "--prompt", prompt[1], "--model", "demo")
    assert done.returncode == 0
    assert "the demo model" in done.stderr
    assert done.stdout.rstrip().endswith(".")
    assert {"layer", "weights", "memory", "model"} & set(done.stdout.lower().replace(".", " ").split())
    assert (tmp_path / "demo").is_dir()


def test_the_cpu_build_is_the_release_that_was_tried() -> None:
    (version,) = re.findall(r"torch==(\S+) --index-url https://download.pytorch.org/whl/cpu", pages.read("README.md"))
    assert f"\ntorch=={version}\n" in (pages.ROOT / ".ci" / "tried.txt").read_text()


@pytest.mark.parametrize("example", SETTINGS_FILES, ids=str)
def test_an_example_of_a_settings_file_is_one(example: Block, tmp_path: Path) -> None:
    (tmp_path / "surfw.toml").write_text(example.text)
    command = ["--config", str(tmp_path / "surfw.toml"), "config", "--json"]
    shown = json.loads(surfw(tmp_path, *command, SURFW_PORT="").stdout)
    given = {name: one["value"] for name, one in shown.items() if one["from"] == str(tmp_path / "surfw.toml")}
    assert given == tomllib.loads(example.text)["tool"]["surfw"]


def test_settings_files_are_shown_for_all_commands_and_for_a_storage() -> None:
    keys = [tomllib.loads(one.text)["tool"]["surfw"].keys() for one in SETTINGS_FILES]
    assert any({"store", "port", "model", "live"} <= one for one in keys)
    assert {"storage_options"} in keys


@pytest.mark.parametrize("page", sorted({one.page for one in pages.blocks("sh")}))
def test_the_commands_of_a_page_work(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Run the commands of a page in turn, except installations; for measurements, only check the options."""
    shown = [one for one in pages.blocks("sh") if one.page == page]
    places, variables = {}, {}
    if any(BUCKET in one.text for one in shown):
        with contextlib.suppress(pytest.skip.Exception):
            places, variables = s3_places(request.getfixturevalue("s3"))
    with Sandbox(tmp_path, places=places, **variables) as here:
        for block in shown:
            here.new_shell()
            for command in commands(block.text) if places or BUCKET not in block.text else ():
                if NEEDS_A_NETWORK.match(command):
                    continue
                if command.startswith("surfw serve"):
                    here.stop()
                done = here.run(f"{command} --help" if command.startswith("surfw bench ") else command)
                assert done.code == 0, f"{block}: {command}\n{done.shown}"


def s3_places(s3: S3Service) -> tuple[dict[str, str], dict[str, str]]:
    """A bucket to replace that of the pages, and the variables to reach it."""
    variables = {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    return {BUCKET: f"s3://{s3.bucket()}"}, variables


@pytest.mark.parametrize("page", sorted({one.page for one in pages.blocks("console") if not one.is_generated}))
def test_what_commands_are_shown_to_print_is_what_they_print(page: str, tmp_path: Path) -> None:
    text = pages.read(page)
    assert text == regenerate.with_outputs(page, text, tmp_path), "run python -m tests.regenerate"
