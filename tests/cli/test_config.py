"""Settings on the command line: precedence, `surfw config`, and errors."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from surfw.cli.options import Configuration
from surfw.cli.sources import choose_source
from surfw.errors import ConfigurationError
from surfw.settings import SETTINGS, SettingOrigin, Settings
from tests.checkpoints import save_llama
from tests.cli.run import complaint, surfw
from tests.peers import tcp_server
from tests.servers import serve
from tests.stores import make_store


def write(folder: Path, text: str) -> str:
    file = folder / "surfw.toml"
    file.write_text(f"[tool.surfw]\n{text}\n")
    return str(file)


def test_config_shows_every_setting_and_where_it_comes_from(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 9000\nlive = true\nstore = "s3://key:secret@bucket/models"')
    shown = json.loads(surfw(tmp_path, "config", "--config", file, "--json", SURFW_HOST="::1", SURFW_PORT="").stdout)
    assert list(shown) == [*SETTINGS, "token"]
    assert shown["port"] == {"value": 9000, "from": file}
    assert shown["live"] == {"value": True, "from": file}
    assert shown["host"] == {"value": "::1", "from": "SURFW_HOST"}
    assert shown["seed"] == {"value": None, "from": "default"}
    assert shown["token"] == {"value": "not set", "from": "default"}
    assert "secret" not in shown["store"]["value"]
    table = surfw(tmp_path, "--config", file, "config", SURFW_PORT="").stdout
    assert ["port", "9000"] in [line.split()[:2] for line in table.splitlines()]
    assert "secret" not in table


def test_config_never_shows_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    by_file = surfw(tmp_path, "config", "--json", SURFW_TOKEN_FILE=str(tmp_path / "token"))
    assert json.loads(by_file.stdout)["token"] == {"value": "set", "from": "token_file"}
    by_variable = surfw(tmp_path, "config", "--json", SURFW_TOKEN="s3cret")
    assert json.loads(by_variable.stdout)["token"] == {"value": "set", "from": "SURFW_TOKEN"}
    assert "s3cret" not in by_file.stdout + by_variable.stdout


def test_the_file_is_named_before_or_after_the_command_or_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 1")
    other = tmp_path / "pyproject.toml"
    other.write_text("[tool.surfw]\nport = 2\n")

    def port(*arguments: str, **extra: str) -> int:
        return int(json.loads(surfw(tmp_path, *arguments, "--json", SURFW_PORT="", **extra).stdout)["port"]["value"])

    assert port("--config", file, "config") == port("config", "--config", file) == 1
    assert port("config", SURFW_CONFIG=file) == 1
    assert port("--config", file, "config", SURFW_CONFIG=str(other)) == 1
    assert port("--config", file, "config", "--config", str(other)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "there is no setting prot; did you mean port?"),
        ("port = '1'", "port is '1', expected a whole number from 0 to 65535"),
        ("max_new_tokens = 0", "max_new_tokens is 0, expected a whole number >= 1"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_for_every_command(text: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    for command in (["config"], ["serve"], ["stats"], ["infer", "--prompt", "a"], ["chunk", "model"]):
        assert complaint(surfw(tmp_path, *command, "--config", file), 2) == f"{file}: {said}"
    assert surfw(tmp_path, "serve", "--help", SURFW_CONFIG=file).returncode == 0, "help needs no settings"


def test_a_mistake_in_a_variable_is_one_line_and_one_in_an_option_is_usage(tmp_path: Path) -> None:
    said = complaint(surfw(tmp_path, "serve", SURFW_PORT="tcp://10.0.0.1:80"), 2)
    assert said == "SURFW_PORT is 'tcp://10.0.0.1:80', expected a whole number from 0 to 65535"
    for option in (["--port", "70000"], ["--port", "x"], ["--clients", "0"], ["--cache-mb", "-1"]):
        done = surfw(tmp_path, "serve", *option)
        assert (done.returncode, "Usage:" in done.stderr) == (2, True)
    assert surfw(tmp_path, "infer", "--prompt", "a", "--on-missing", "guess").returncode == 2
    endless = surfw(tmp_path, "infer", "--prompt", "a", "--temperature", "inf")
    assert endless.returncode == 2
    assert endless.stderr.endswith("\nError: --temperature is inf, expected a number >= 0\n")


def test_of_the_budget_and_the_layers_the_nearer_one_counts(tmp_path: Path) -> None:
    def shown(*arguments: str, **extra: str) -> list[object]:
        found = json.loads(surfw(tmp_path, *arguments, "config", "--json", **extra).stdout)
        return [found["cache_layers"], found["memory_budget"]]

    file = write(tmp_path, "cache_layers = 4")
    assert shown("--config", file) == [{"value": 4, "from": file}, {"value": None, "from": "default"}]
    budget = {"value": "1.2GB", "from": "SURFW_MEMORY_BUDGET"}
    assert shown("--config", file, SURFW_MEMORY_BUDGET="1.2GB") == [budget | {"value": None}, budget]


def test_infer_keeps_within_the_budget_that_is_nearest(tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(save_llama(tmp_path / "tiny"))).returncode == 0
    arguments = ["infer", "--source", str(tmp_path / "store"), "--prompt-ids", "5,6", "--max-new-tokens", "1"]
    small = complaint(surfw(tmp_path, *arguments, "--memory-budget", "1B", SURFW_CACHE_LAYERS="4"))
    assert small.startswith("a memory budget of 1 B is too small for tiny")
    assert complaint(surfw(tmp_path, *arguments, SURFW_MEMORY_BUDGET="1B")) == small
    for options in (["--cache-layers", "4"], ["--memory-budget", "1GB", "--policy", "lru"]):
        assert surfw(tmp_path, *arguments, *options, SURFW_MEMORY_BUDGET="1B").returncode == 0
    both = surfw(tmp_path, *arguments, "--cache-layers", "4", "--memory-budget", "1GB")
    assert both.returncode == 2
    assert "--memory-budget: does not go with --cache-layers; give one of them" in both.stderr
    wrong = complaint(surfw(tmp_path, *arguments, SURFW_MEMORY_BUDGET="much"), 2)
    assert wrong == "SURFW_MEMORY_BUDGET is 'much', expected a size such as 1.2GB"
    typed = surfw(tmp_path, *arguments, "--memory-budget", "much")
    assert typed.returncode == 2
    assert typed.stderr.endswith("\nError: --memory-budget is 'much', expected a size such as 1.2GB\n")
    assert surfw(tmp_path, *arguments, "--policy", "fifo").returncode == 2


def test_infer_takes_an_option_before_a_variable_before_the_file(tmp_path: Path) -> None:
    model = str(save_llama(tmp_path / "tiny"))
    assert surfw(tmp_path, "chunk", model, SURFW_STORE=str(tmp_path / "mine")).returncode == 0
    assert not (tmp_path / "store").exists()
    file = write(tmp_path, f'source = "{tmp_path / "mine"}"\nmax_new_tokens = 2')
    arguments = ["infer", "--config", file, "--prompt-ids", "5,6", "--ignore-eos", "--json"]

    def tokens(*options: str, **extra: str) -> int:
        return int(json.loads(surfw(tmp_path, *arguments, *options, **extra).stdout)["new_tokens"])

    assert tokens() == 2
    assert tokens(SURFW_MAX_NEW_TOKENS="3") == 3
    assert tokens("--max-new-tokens", "4", SURFW_MAX_NEW_TOKENS="3", SURFW_TOKEN="needless-here") == 4
    done = surfw(tmp_path, *arguments[:-1])
    assert f"(named in {file})" in done.stderr
    absent = surfw(tmp_path, *arguments[:-1], "--source", str(tmp_path / "absent"), SURFW_SOURCE="ws://nobody")
    assert "(named with --source)" in absent.stderr


def test_a_server_and_its_clients_share_one_file(tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(save_llama(tmp_path / "tiny"))).returncode == 0
    (tmp_path / "token").write_text("s3cret\n")
    with serve(tmp_path / "store", "--token-file", str(tmp_path / "token")) as served:
        port = served.url.rpartition(":")[2]
        file = write(tmp_path, f'port = {port}\ntoken_file = "{tmp_path / "token"}"\nmax_new_tokens = 1')
        done = surfw(tmp_path, "--config", file, "infer", "--prompt-ids", "5,6", SURFW_PORT="")
        assert "(the server on this machine)" in done.stderr
        assert done.returncode == 0
        assert json.loads(surfw(tmp_path, "--config", file, "stats", "--json", SURFW_PORT="").stdout)["models"] == [
            "tiny"
        ]
        assert surfw(tmp_path, "stats", served.url, SURFW_TOKEN="s3cret").returncode == 0
        assert "token" in complaint(surfw(tmp_path, "stats", served.url, SURFW_TOKEN="wrong"))


@pytest.mark.parametrize(("extra", "why"), [({}, "wants a token"), ({"SURFW_TOKEN": "another"}, "refuses the token")])
def test_a_server_on_this_machine_that_says_no_is_an_error(tmp_path: Path, extra: dict[str, str], why: str) -> None:
    make_store(tmp_path / "store", "tiny")
    (tmp_path / "token").write_text("s3cret\n")
    with serve(tmp_path / "store", "--token-file", str(tmp_path / "token")) as served:
        port = served.url.rpartition(":")[2]
        said = complaint(surfw(tmp_path, "infer", "--prompt-ids", "5", "--model", "tiny", SURFW_PORT=port, **extra))
    assert said.startswith(f"the server at {served.url} {why}; ")
    assert "name a source with --source" in said


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def mail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example.org ESMTP\r\n")
    await reader.read()


def test_what_is_no_surfw_server_is_passed_over_and_what_says_nothing_is_not(tmp_path: Path) -> None:
    make_store(tmp_path / "store", "tiny")

    async def choose(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> str:
        async with tcp_server(talk) as url:
            settings = Settings(
                port=int(url.rpartition(":")[2]), store=str(tmp_path / "store"), model="tiny", connect_timeout=0.5
            )
            origins = {name: SettingOrigin("default", "default") for name in SETTINGS}
            configuration = Configuration(settings, origins)

            def look() -> str:
                with choose_source(configuration) as chosen:
                    return chosen.url

            return await asyncio.to_thread(look)

    assert asyncio.run(choose(mail)) == str(tmp_path / "store")
    with pytest.raises(ConfigurationError, match=r"no answer within 0\.5 seconds; .* name a source with --source"):
        asyncio.run(choose(silence))
