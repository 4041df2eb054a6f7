"""Each setting comes from an argument, a variable, a file or its default, in this order; invalid values are refused."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import default_store
from surfw.errors import ConfigurationError
from surfw.retry import RetryPolicy
from surfw.settings import CONFIG_VARIABLE, SETTINGS, TOKEN_VARIABLE, SettingOrigin, Settings, trace_settings

THREE: dict[str, tuple[Any, Any, Any]] = {
    "store": ("/a", "s3://bucket/b", "c"),
    "source": ("ws://a:1", "ws://b:2", "/c"),
    "storage_options": ({"region": "a"}, {"region": "b"}, {"region": "c"}),
    "model": ("org/a", "b", "c"),
    "adapter": ("org/a", "b", "c"),
    "host": ("0.0.0.0", "::1", "localhost"),
    "port": (0, 65535, 9000),
    "cache_mb": (17, 1000, 2000),
    "max_bytes_per_second": ("1MB", "1.5GiB", "1000000"),
    "max_client_bytes_per_second": ("1MB", "1.5GiB", "1000000"),
    "slow_client_timeout": (0.5, 1.5, 2.5),
    "insecure": (False, True, True),
    "clients": (1, 2, 3),
    "allowed_host": ("a.example", "b.example", "c.example"),
    "log_format": ("json", "text", "json"),
    "drain_seconds": (1.0, 2.0, 3.0),
    "cache_layers": (1, 2, 3),
    "memory_budget": ("1.2GB", "500 MiB", "4096"),
    "device": ("auto", "cuda", "cuda:1"),
    "device_memory": ("8GB", "500 MiB", "4096"),
    "policy": ("lru", "auto", "lru"),
    "codec": ("none", "auto", "lossless"),
    "dtype": ("float32", "bfloat16", "float16"),
    "disk_cache": ("20GB", "500 MiB", "4096"),
    "cache_dir": ("/a", "/b", "/c"),
    "offline": (True, False, False),
    "max_new_tokens": (1, 2, 3),
    "temperature": (0.0, 0.5, 1.5),
    "top_p": (0.0, 0.5, 1.0),
    "top_k": (1, 2, 3),
    "seed": (0, 1, 2**63 - 1),
    "live": (False, True, True),
    "connect_timeout": (0.5, 1.5, 2.5),
    "silence_timeout": (0.5, 1.5, 2.5),
    "retry_attempts": (1, 2, 1000),
    "retry_first_delay": (0.0, 0.5, 2.5),
    "retry_backoff": (1.0, 2.5, 3.5),
    "retry_most_delay": (0.0, 5.0, 60.0),
    "retry_jitter": (0.0, 0.25, 1.0),
    "retry_restart": (0.0, 20.0, 60.0),
    "deadline": (0.5, 1.5, 2.5),
    "token_file": ("/a", "/b", "/c"),
    "ssl_certfile": ("/a", "/b", "/c"),
    "ssl_keyfile": ("/a", "/b", "/c"),
    "ssl_ca_certs": ("/a", "/b", "/c"),
    "encryption_key_file": ("/a", "/b", "/c"),
    "verify_key": ("/a", "/b", "/c"),
    "source_order": ("speed", "given", "speed"),
    "on_missing": ("uninitialized", "error", "uninitialized"),
    "redis_url": ("redis://a", "rediss://b", "redis://c:6380/1"),
}
"""Three values of each setting: for the argument, the variable and the file."""


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [CONFIG_VARIABLE, TOKEN_VARIABLE, *(setting.variable for setting in SETTINGS.values())]:
        monkeypatch.delenv(name, raising=False)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def text(value: Any) -> str:
    """The text of a variable."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def write(folder: Path, text: str) -> Path:
    file = folder / "surfw.toml"
    file.write_text(f"[tool.surfw]\n{text}\n")
    return file


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_an_argument_goes_before_a_variable_before_the_file_before_the_default(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argument, variable, in_file = THREE[name]

    def loaded(config: Path | None, **arguments: Any) -> tuple[Any, str]:
        value = getattr(Settings.load(config, **arguments), name)
        traced, origin = trace_settings(config, arguments)[name]
        assert type(value) is type(traced)
        assert value == traced
        return value, origin.kind

    assert loaded(None) == (getattr(Settings(), name), "default")
    file = write(tmp_path, f"{name} = {toml(in_file)}")
    assert loaded(file) == (in_file, "file")
    monkeypatch.setenv(f"SURFW_{name.upper()}", text(variable))
    assert loaded(file) == (variable, "variable")
    assert loaded(file, **{name: argument}) == (argument, "argument")
    assert loaded(file, **{name: None}) == (variable, "variable"), "None is no argument"
    monkeypatch.setenv(f"SURFW_{name.upper()}", "")
    assert loaded(file) == (in_file, "file"), "an empty variable is not set"
    assert dataclasses.asdict(Settings.load(file)) == dataclasses.asdict(Settings()) | {name: in_file}


def test_the_defaults_are_checked_and_the_store_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, setting in SETTINGS.items():
        assert setting.check(getattr(Settings(), name), name) == getattr(Settings(), name)
        assert setting.help.endswith(".")
    monkeypatch.setenv("SURFW_HOME", str(tmp_path))
    assert Settings().store == Settings.load().store == default_store() == str(tmp_path / "store")


def test_settings_are_frozen_and_keyword_only() -> None:
    settings: Any = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1
    untyped: Any = Settings
    with pytest.raises(TypeError, match="positional argument"):
        untyped("store")


LAYERS, BUDGET = "cache_layers", "memory_budget"


@pytest.mark.parametrize("nearer", [LAYERS, BUDGET])
@pytest.mark.parametrize(("near", "far"), [("argument", "variable"), ("argument", "file"), ("variable", "file")])
def test_of_two_settings_that_exclude_each_other_the_nearer_one_counts(
    nearer: str, near: str, far: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    farther = LAYERS if nearer == BUDGET else BUDGET
    places = {near: nearer, far: farther}
    values: dict[str, Any] = {LAYERS: 4, BUDGET: "1GB"}
    file = write(tmp_path, f"{farther} = {toml(values[farther])}" if far == "file" else "")
    if variable := places.get("variable"):
        monkeypatch.setenv(SETTINGS[variable].variable, str(values[variable]))
    arguments = {nearer: values[nearer]} if near == "argument" else {}
    settings = Settings.load(file, **arguments)
    assert (getattr(settings, nearer), getattr(settings, farther)) == (values[nearer], None)
    found = trace_settings(file, arguments)
    assert found[nearer][1].kind == near
    assert found[farther] == (None, found[nearer][1]), "what decided that it is not set"


def test_what_yields_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURFW_MEMORY_BUDGET", "much")
    assert Settings.load(cache_layers=4).memory_budget is None
    monkeypatch.setenv("SURFW_CACHE_LAYERS", "4")
    assert Settings.load(memory_budget="1GB").cache_layers is None, "an argument decides between two variables"


def test_two_settings_that_exclude_each_other_are_refused_in_one_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both: dict[str, Any] = {LAYERS: 4, BUDGET: "1GB"}
    file = write(tmp_path, "cache_layers = 4\nmemory_budget = '1GB'")
    for attempt, names in (
        (lambda: Settings(**both), "cache_layers and memory_budget"),
        (lambda: Settings.load(**both), "cache_layers and memory_budget"),
        (lambda: Settings.load(file), f"{file}: cache_layers and memory_budget"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert str(caught.value) == f"{names} exclude each other; give one of them"
    monkeypatch.setenv("SURFW_CACHE_LAYERS", "4")
    assert Settings.load(file).memory_budget is None, "a variable decides between two of a file"
    monkeypatch.setenv("SURFW_MEMORY_BUDGET", "1GB")
    with pytest.raises(ConfigurationError, match=r"^SURFW_CACHE_LAYERS and SURFW_MEMORY_BUDGET exclude each other; "):
        Settings.load()


def test_origins_name_the_variable_and_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path, "port = 1")
    monkeypatch.setenv("SURFW_HOST", "::1")
    found = trace_settings(file, {"clients": 2})
    assert [found[name][1] for name in ("port", "host", "clients", "seed")] == [
        SettingOrigin("file", str(file)),
        SettingOrigin("variable", "SURFW_HOST"),
        SettingOrigin("argument", "clients"),
        SettingOrigin("default", "default"),
    ]


def test_the_file_that_is_given_goes_before_the_one_that_the_variable_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "port = 1")
    monkeypatch.setenv(CONFIG_VARIABLE, "~/surfw.toml")
    assert Settings.load().port == 1
    other = tmp_path / "pyproject.toml"
    other.write_text('[project]\nname = "mine"\n[tool.other]\nport = 3\n[tool.surfw]\nport = 2\n')
    assert Settings.load(other).port == 2
    assert Settings.load(str(other), port=3).port == 3
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    assert Settings.load().port == Settings().port


def test_whole_numbers_do_as_numbers_and_paths_as_texts(tmp_path: Path) -> None:
    settings = Settings.load(write(tmp_path, "connect_timeout = 5"), temperature=1, store=tmp_path)
    assert (settings.connect_timeout, settings.temperature, settings.store) == (5.0, 1.0, str(tmp_path))
    assert type(settings.connect_timeout) is type(settings.temperature) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True), ("true", True), ("Yes", True), (" ON ", True),
        ("0", False), ("FALSE", False), ("no", False), ("off", False),
    ],
)  # fmt: skip
def test_switches_in_variables(text: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURFW_LIVE", text)
    assert Settings.load().live is value


def test_a_switch_that_may_be_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(live="full").live == "full"
    assert Settings.load(write(tmp_path, 'live = "full"')).live == "full"
    monkeypatch.setenv("SURFW_LIVE", "full")
    assert Settings.load().live == "full"
    monkeypatch.setenv("SURFW_LIVE", "ful")
    with pytest.raises(ConfigurationError, match=r"^SURFW_LIVE is 'ful', expected true, false or full$"):
        Settings.load()


WRONG: list[tuple[str, Any, str]] = [
    ("port", True, "is true, expected a whole number from 0 to 65535"),
    ("port", "80", "is '80', expected a whole number from 0 to 65535"),
    ("port", 80.0, "is 80.0, expected a whole number from 0 to 65535"),
    ("port", -1, "is -1, expected a whole number from 0 to 65535"),
    ("port", 65536, "is 65536, expected a whole number from 0 to 65535"),
    ("cache_mb", 16, "is 16, expected a whole number >= 17"),
    ("max_bytes_per_second", "999kB", "is '999kB', expected a size of 1MB or more"),
    ("clients", 0, "is 0, expected a whole number >= 1"),
    ("top_p", 1.01, "is 1.01, expected a number from 0 to 1"),
    ("top_p", False, "is false, expected a number from 0 to 1"),
    ("temperature", float("nan"), "is nan, expected a number >= 0"),
    ("retry_backoff", float("inf"), "is inf, expected a number >= 1"),
    ("connect_timeout", 0, "is 0.0, expected a number >= 0.001"),
    ("insecure", 1, "is 1, expected true or false"),
    ("live", "true", "is 'true', expected true, false or full"),
    ("store", "", "is '', expected a text that is not empty"),
    ("model", 7, "is 7, expected a text that is not empty"),
    ("model", ["a"], "is ['a'], expected a text that is not empty"),
    ("on_missing", "ignore", "is 'ignore', expected error or uninitialized"),
    ("policy", "fifo", "is 'fifo', expected auto or lru"),
    ("memory_budget", "much", "is 'much', expected a size such as 1.2GB"),
    ("memory_budget", "0 GB", "is '0 GB', expected a size such as 1.2GB"),
    ("memory_budget", "", "is '', expected a size such as 1.2GB"),
    ("memory_budget", 10**9, "is 1000000000, expected a size such as 1.2GB"),
    ("host", 9**99, f"is {str(9**99)[:80]}…, expected a text that is not empty"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_what_does_not_fit_is_refused_as_an_argument_and_in_a_file(
    name: str, value: Any, text: str, tmp_path: Path
) -> None:
    file = write(tmp_path, f"{name} = {toml(value)}")
    for attempt, where in (
        (lambda: Settings(**{name: value}), name),
        (lambda: Settings.load(**{name: value}), name),
        (lambda: Settings.load(file), f"{file}: {name}"),
        (lambda: Settings.load(file, **{name: THREE[name][0]}), f"{file}: {name}"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert str(caught.value) == f"{where} {text}"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("port", "tcp://10.0.0.1:8765", "a whole number from 0 to 65535"),
        ("port", "1.0", "a whole number from 0 to 65535"),
        ("port", "70000", "a whole number from 0 to 65535"),
        ("temperature", "hot", "a number >= 0"),
        ("retry_jitter", "nan", "a number from 0 to 1"),
        ("insecure", "maybe", "true or false"),
        ("model", " ", "a text that is not empty"),
        ("on_missing", "ERROR", "error or uninitialized"),
        ("policy", "LRU", "auto or lru"),
        ("memory_budget", "1.2 gallons", "a size such as 1.2GB"),
        ("memory_budget", "-1GB", "a size such as 1.2GB"),
    ],
)
def test_a_variable_that_does_not_fit_is_refused_where_it_counts(
    name: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SURFW_{name.upper()}", text)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    assert str(caught.value) == f"SURFW_{name.upper()} is {text!r}, expected {expected}"
    assert getattr(Settings.load(**{name: THREE[name][0]}), name) == THREE[name][0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.surfw]\nprot = 1", "{file}: there is no setting prot; did you mean port?"),
        ("[tool.surfw]\nxyz = 1", "{file}: there is no setting xyz; 'surfw config' lists all settings"),
        (
            "[tool.surfw.port]\nx = 1",
            "{file}: port is a table, expected settings in [tool.surfw] itself; did you mean port?",
        ),
        ("[tool.surfw]\nretry = {attempts = 1}", "{file}: retry is a table, expected settings in [tool.surfw] itself"),
        ("port = 1", "settings file {file} has no table [tool.surfw]; settings stand below that line"),
        ("tool = 1", "settings file {file} has no table [tool.surfw]; settings stand below that line"),
        ("[tool]\nsurfw = 1", "settings file {file} has no table [tool.surfw]; settings stand below that line"),
        ("[tool.surfw\n", "settings file {file} is not TOML: "),
        ("[tool.surfw]\nport = " + "9" * 5000, "settings file {file} is not TOML: "),
    ],
)
def test_files_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "surfw.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(file)
    assert str(caught.value).startswith(said.format(file=file))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="cannot be read: No such file or directory; name another with --config"
    ):
        Settings.load(tmp_path / "absent.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        Settings.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="binary is not TOML"):
        Settings.load(tmp_path / "binary")


def test_an_unknown_argument_names_the_closest_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"^there is no setting cache_layer; did you mean cache_layers\?$"):
        Settings.load(cache_layer=1)


@given(st.sampled_from(sorted(SETTINGS)), st.text(max_size=8))
def test_any_text_of_a_variable_gives_a_value_or_is_refused(name: str, text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        value = SETTINGS[name].parse(text, SETTINGS[name].variable)
        assert SETTINGS[name].check(value, name) == value


def test_the_retry_policy_is_made_of_settings_at_any_allowed_value() -> None:
    assert Settings().retry == RetryPolicy()
    names = (
        "retry_attempts",
        "retry_first_delay",
        "retry_backoff",
        "retry_most_delay",
        "retry_jitter",
        "retry_restart",
    )
    for edge in (0, 2):
        values = [THREE[name][edge] for name in names]
        policy = Settings(**dict(zip(names, values, strict=True))).retry
        assert [
            policy.attempts, policy.first_delay_seconds, policy.backoff, policy.most_delay_seconds, policy.jitter,
            policy.restart_seconds,
        ] == values  # fmt: skip


def test_the_token_is_read_when_it_is_asked_for_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Settings().token is None
    file = tmp_path / "token"
    file.write_text("  s3cret\n")
    settings = Settings(token_file=str(file))
    assert settings.token == "s3cret"
    monkeypatch.setenv(TOKEN_VARIABLE, "other\n")
    assert Settings().token == "other"
    assert settings.token == Settings.load(token_file=str(file)).token == "s3cret"  # the argument has precedence
    assert Settings.load(write(tmp_path, f'token_file = "{file}"')).token == "other"
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    assert Settings.load(write(tmp_path, f'token_file = "{file}"')).token == "s3cret"
    assert "s3cret" not in repr(settings)
    assert "token" not in SETTINGS
    with pytest.raises(ConfigurationError, match="there is no setting token; did you mean token_file"):
        Settings.load(write(tmp_path, 'token = "s3cret"'))


def test_entries_of_a_table_come_from_all_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path, "[tool.surfw.storage_options]\nregion = 'file'\nsecret = 's3cret'\nsse = 'file'")
    monkeypatch.setenv("SURFW_STORAGE_OPTIONS", '{"region": "variable", "sse": "variable"}')
    settings = Settings.load(file, storage_options={"sse": "argument"})
    assert settings.storage_options == {"region": "variable", "secret": "s3cret", "sse": "argument"}
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ('{"a b": "s3cret"}', "a table with a name of other characters than letters, digits and _"),
        ('["s3cret"]', "a list"),
        ("s3cret", "not JSON"),
        ('"s3cret"', "a text"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_storage_options_that_are_none_are_refused_without_being_shown(
    value: str, seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SURFW_STORAGE_OPTIONS", value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    assert str(caught.value) == (
        f'SURFW_STORAGE_OPTIONS is {seen}, expected a table of names and values as JSON, such as {{"name": "value"}}'
    )
    monkeypatch.delenv("SURFW_STORAGE_OPTIONS")
    with pytest.raises(ConfigurationError, match=r"storage_options is a text, expected a table of names and values$"):
        Settings.load(write(tmp_path, 'storage_options = "s3cret"'))


def test_several_sources_are_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings().sources == ()
    assert Settings(source="a:1").sources == ("a:1",)
    assert Settings(source=["a:1"]).source == "a:1"  # type: ignore[arg-type]
    assert Settings(source=["a:1", "b:2"]).sources == ("a:1", "b:2")  # type: ignore[arg-type]
    assert Settings.load(write(tmp_path, 'source = ["a:1", "./b"]')).sources == ("a:1", "./b")
    monkeypatch.setenv("SURFW_SOURCE", '["c:3", "d:4"]')
    assert Settings.load(write(tmp_path, 'source = "a:1"')).sources == ("c:3", "d:4")
    for wrong in (["a:1", 3], ["a:1", " "], [["a:1"]]):
        with pytest.raises(ConfigurationError, match=r"source is .*, expected a text that is not empty"):
            Settings(source=wrong)  # type: ignore[arg-type]
