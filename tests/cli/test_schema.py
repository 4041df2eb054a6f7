"""Every `--json` has a schema, which refuses output without a required key. `tests.cli.run.surfw` checks all output."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from surfw.cli.schema import FOLDER
from tests.checkpoints import save_llama
from tests.cli.run import surfw
from tests.cli.schemas import check, validator
from tests.regenerate import commands, options_of
from tests.servers import serve

_OPTIONAL = {"lossless_estimate_bytes", "bytes_read", "connections", "events", "heat", "sending"}
"""Keys that only some models, or some servers, have."""
WITH_JSON = [name for name in commands() if "--json" in options_of(name)]


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_schemas_are_schemas(path: Path) -> None:
    Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("command", WITH_JSON)
def test_every_json_has_a_schema(command: str, tmp_path: Path) -> None:
    assert validator(command).schema["title"].startswith("What surfw ")


def test_all_schemas_are_of_commands() -> None:
    names = {path.stem.replace("-", " ") for path in FOLDER.iterdir()}
    assert names - {"bench"} <= set(WITH_JSON)


def test_an_output_that_lacks_a_key_or_has_another_one_fails(tmp_path: Path) -> None:
    save_llama(tmp_path / "tiny")
    printed = {
        command: json.loads(surfw(tmp_path, *command, "--json").stdout)
        for command in [
            ("chunk", str(tmp_path / "tiny"), "--dry-run"), ("chunk", str(tmp_path / "tiny")), ("list",), ("config",),
            ("show", "tiny"), ("verify",), ("infer", "tiny", "--prompt-ids", "1,2", "--max-new-tokens", "2"),
            ("infer", "tiny", "--explain"), ("rm", "tiny"), ("prune", "--dry-run"), ("bench", "cache", "--layers", "4"),
        ]
    }  # fmt: skip
    with serve(tmp_path / "store") as served:
        printed["stats", served.url] = json.loads(surfw(tmp_path, "stats", served.url, "--json").stdout)
    for command, facts in printed.items():
        for key in facts.keys() - _OPTIONAL:
            with pytest.raises(AssertionError, match=r"--json: \$"):
                check(command, json.dumps({name: value for name, value in facts.items() if name != key}))
        if command[0] != "config":  # its keys are the names of the settings
            with pytest.raises(AssertionError, match="surprise"):
                check(command, json.dumps(facts | {"surprise": 1}))


def test_what_is_published_allows_keys_of_later_versions(tmp_path: Path) -> None:
    facts = json.loads(surfw(tmp_path, "bench", "cache", "--layers", "4", "--json").stdout)
    published = Draft202012Validator(json.loads(surfw(tmp_path, "schema", "bench", "cache").stdout))
    published.validate(facts | {"later": 1})
    del facts["rows"]
    with pytest.raises(ValidationError):
        published.validate(facts)


def test_a_command_without_a_schema_is_a_mistake(tmp_path: Path) -> None:
    assert "infer" in surfw(tmp_path, "schema").stdout.splitlines()
    for words in (("nosuch",), ("..", "settings"), ("bench", "nosuch"), ("serve",)):
        done = surfw(tmp_path, "schema", *words)
        assert done.returncode == 2
        assert "there is no schema for" in done.stderr
