"""The registry of all settings, and how their values are resolved.

Each field of `Settings` is a setting, with its type, default, bounds and meaning. Its name is the keyword in Python and
the key in a settings file; the environment variable is `SURFW_` plus the name in capitals; the command line builds its
options from the same fields. Arguments override variables, variables override the file, the file overrides defaults.

The token that a client sends to a server is not a setting: it is read when it is needed, and never displayed.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from surfw.config import (
    DEFAULT_CACHE_MB,
    DEFAULT_CLIENTS,
    DEFAULT_CONNECT_SECONDS,
    DEFAULT_DRAIN_SECONDS,
    DEFAULT_HOST,
    DEFAULT_PORT,
    DEFAULT_SILENCE_SECONDS,
    DEFAULT_SLOW_SECONDS,
    DTYPES,
    CodecChoice,
    LogFormat,
    OnMissing,
    Policy,
    SourceOrder,
    TlsFiles,
    default_store,
    is_device,
    is_rate,
    is_size,
)
from surfw.errors import ConfigurationError
from surfw.files import expand_home
from surfw.retry import RetryPolicy
from surfw.setting import Setting
from surfw.storage_options import is_options

CONFIG_VARIABLE = "SURFW_CONFIG"
"""The path of a TOML settings file, like `--config`."""

TOKEN_VARIABLE = "SURFW_TOKEN"  # noqa: S105 - a name
"""The token itself. This variable has no matching option or file key."""

_OTHER_VARIABLES = ("SURFW_HOME", "SURFW_DEBUG")
"""Variables read outside this module."""

_PREFIX, _NEAR = "SURFW_", 0.7
"""The prefix of all variables, and the `difflib` similarity cutoff for suggesting a known variable."""

_MOST_TOKEN_BYTES = 64 * 1024
_MOST_FILE_BYTES = 1 << 20

TABLE = "tool.surfw"
"""The TOML table that holds the settings."""

_PLACES = ("argument", "variable", "file", "default")
"""Where a value can come from, highest precedence first."""

EXCLUSIVE = ("cache_layers", "memory_budget")
"""Two settings for the same thing, both without a default. The one given with higher precedence wins."""

_RETRY = RetryPolicy()
_SHORTEST_SECONDS = 0.001


def _setting(
    default: Any,
    meaning: str,
    *,
    shown: str | None = None,
    least: float | None = None,
    most: float | None = None,
    metavar: str | None = None,
    form: str = "",
    has_form: Callable[[Any], bool] | None = None,
    in_repr: bool = True,
) -> Any:
    """A field with the metadata of its `Setting`; `shown` describes a missing or computed default in words."""
    known = {
        "help": meaning, "default_text": shown, "least": least, "most": most, "metavar": metavar, "form": form,
        "has_form": has_form,
    }  # fmt: skip
    if callable(default):
        return field(default_factory=default, metadata=known, repr=in_repr)
    return field(default=default, metadata=known, repr=in_repr)


class SeveralTokensError(ConfigurationError):
    """A client was given a server's file of several tokens; a client sends one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings, validated. `Settings.load()` also reads the environment and a file; `Settings()` is the defaults.

    Raises:
        ConfigurationError: a value has the wrong type or is out of bounds.
    """

    store: str = _setting(
        default_store, "The store: a folder or a storage URL.", shown="$SURFW_HOME/store", metavar="URL"
    )
    source: str | tuple[str, ...] | None = _setting(
        None,
        "A server (host:port), a folder, a storage URL, or a hub id; give several for failover.",
        shown="a server on this machine, else the store, else the demo model",
        metavar="URL",
    )
    source_order: SourceOrder = _setting(  # noqa: RUF009 - it makes a field
        "given", "Which of several sources to read first: the first one given, or the fastest as measured."
    )
    storage_options: dict[str, Any] = _setting(  # noqa: RUF009 - it makes a field
        dict,
        "An option for the storage backend; may be repeated.",
        shown="none",
        metavar="KEY=VALUE",
        form="a table of names and values",
        has_form=is_options,
        in_repr=False,
    )
    model: str | None = _setting(None, "The model's name, or the last part of it.", shown="the only one")
    adapter: str | None = _setting(None, "The name of a LoRA adapter to apply to the model.", shown="none")
    host: str = _setting(DEFAULT_HOST, "The address to listen on.")
    port: int = _setting(DEFAULT_PORT, "The TCP port; 0 lets the system choose.", least=0, most=65535)
    cache_mb: int = _setting(DEFAULT_CACHE_MB, "The size of the cache in MB.", least=17)
    redis_url: str | None = _setting(
        None,
        "The URL of a Redis shared by servers: redis://, rediss://, redis+cluster://.",
        shown="none",
        metavar="URL",
        in_repr=False,
    )
    max_bytes_per_second: str | None = _setting(
        None,
        "Limit the bytes sent per second to all clients together.",
        shown="no limit",
        metavar="SIZE",
        form="a size of 1MB or more",
        has_form=is_rate,
    )
    max_client_bytes_per_second: str | None = _setting(
        None,
        "Limit the bytes sent per second to each client.",
        shown="no limit",
        metavar="SIZE",
        form="a size of 1MB or more",
        has_form=is_rate,
    )
    slow_client_timeout: float = _setting(
        DEFAULT_SLOW_SECONDS,
        "Disconnect a client that takes none of the data it requested for this many seconds.",
        least=_SHORTEST_SECONDS,
    )
    insecure: bool = _setting(
        False,
        "Allow listening beyond loopback without a token, or with one sent in clear text.",
    )
    clients: int = _setting(DEFAULT_CLIENTS, "The maximum number of open connections.", least=1)
    allowed_host: str | None = _setting(
        None,
        "The host names that a server without a token answers to, separated by commas.",
        shown="its addresses, localhost and --host",
        metavar="NAMES",
    )
    log_format: LogFormat = _setting(  # noqa: RUF009 - it makes a field
        "text", "The format of the log on stderr: plain lines, or one JSON object per line."
    )
    drain_seconds: float = _setting(
        DEFAULT_DRAIN_SECONDS, "Seconds to let requests in flight finish when a signal stops the server.", least=0
    )
    cache_layers: int | None = _setting(
        None,
        "The number of layers in memory, including the running one; one more may be in flight.",
        shown="what fits",
        least=1,
    )
    memory_budget: str | None = _setting(
        None,
        "The memory budget for weights, instead of a number of layers.",
        shown="the available memory",
        metavar="SIZE",
        form="a size such as 1.2GB",
        has_form=is_size,
    )
    device: str = _setting(
        "cpu",
        "The device to compute on: cpu, cuda, cuda:1, or auto.",
        form="cpu, cuda, cuda:1 or auto",
        has_form=is_device,
    )
    device_memory: str | None = _setting(
        None,
        "The memory budget on the device, for weights and the KV cache.",
        shown="the device's free memory",
        metavar="SIZE",
        form="a size such as 8GB",
        has_form=is_size,
    )
    policy: Policy = _setting("auto", "Which layers stay resident: a planned choice, or the most recently used.")  # noqa: RUF009 - it makes a field
    codec: CodecChoice = _setting(  # noqa: RUF009 - it makes a field
        "auto",
        "The form of the weights to read: the fastest (auto), or the one named; int8 and int4 are not exact.",
    )
    dtype: str | None = _setting(
        None,
        "The dtype to run in, such as bfloat16.",
        shown="as stored",
        form=f"one of {', '.join(DTYPES)}",
        has_form=DTYPES.__contains__,
    )
    disk_cache: str | None = _setting(
        None,
        "The size of the disk cache, which keeps fetched weights for later runs.",
        shown="none",
        metavar="SIZE",
        form="a size such as 20GB",
        has_form=is_size,
    )
    cache_dir: str | None = _setting(
        None, "The folder of the disk cache; processes may share it.", shown="$SURFW_HOME/cache", metavar="DIR"
    )
    offline: bool | None = _setting(
        None,
        "Contact no source: read weights only from the disk cache.",
        shown="$HF_HUB_OFFLINE, if there is a disk cache",
    )
    max_new_tokens: int = _setting(128, "The maximum number of tokens to generate.", least=1)
    temperature: float | None = _setting(None, "The sampling temperature.", shown="greedy", least=0)
    top_p: float | None = _setting(
        None, "Sample from the most likely tokens with this total probability.", least=0, most=1
    )
    top_k: int | None = _setting(None, "Sample from this many of the most likely tokens.", least=1)
    seed: int | None = _setting(None, "The random seed.", least=0, most=2**63 - 1)
    live: bool | Literal["full"] | None = _setting(
        None, "Show a live view; 'full' adds a table of figures.", shown="in a terminal"
    )
    connect_timeout: float = _setting(
        DEFAULT_CONNECT_SECONDS, "Seconds to wait for a server to answer.", least=_SHORTEST_SECONDS
    )
    silence_timeout: float = _setting(
        DEFAULT_SILENCE_SECONDS,
        "Give up after this many seconds without progress.",
        least=_SHORTEST_SECONDS,
    )
    retry_attempts: int = _setting(
        _RETRY.attempts, "The total number of attempts to connect; 1 means no retry.", least=1, most=1000
    )
    retry_first_delay: float = _setting(_RETRY.first_delay_seconds, "Seconds before the first retry.", least=0)
    retry_backoff: float = _setting(_RETRY.backoff, "The factor by which each further delay grows.", least=1)
    retry_most_delay: float = _setting(_RETRY.most_delay_seconds, "The longest delay in seconds.", least=0)
    retry_jitter: float = _setting(_RETRY.jitter, "The share of each delay that is random.", least=0, most=1)
    retry_restart: float = _setting(
        _RETRY.restart_seconds,
        "Seconds to wait for a server to come back after it announced that it is stopping.",
        least=0,
    )
    deadline: float | None = _setting(
        None,
        "Wait up to this many seconds for each read, and retry if its source fails.",
        shown="until the retries are used up",
        least=_SHORTEST_SECONDS,
    )
    token_file: str | None = _setting(
        None, "The file with the token that clients send; a server's may hold several.", shown="none", metavar="FILE"
    )
    ssl_certfile: str | None = _setting(
        None, "The TLS certificate to present, in PEM; a server needs one for wss://.", shown="none", metavar="FILE"
    )
    ssl_keyfile: str | None = _setting(
        None, "The certificate's private key, in PEM.", shown="in the same file", metavar="FILE"
    )
    ssl_ca_certs: str | None = _setting(
        None,
        "The CA certificates to trust, in PEM; a server then requires a client certificate.",
        shown="the system's; a server requires none",
        metavar="FILE",
    )
    encryption_key_file: str | None = _setting(
        None, "The file with the key of encrypted models.", shown="none", metavar="FILE"
    )
    verify_key: str | None = _setting(
        None,
        "A file of public keys, in PEM; models not signed with one of them are refused.",
        shown="signatures are not checked",
        metavar="FILE",
    )
    on_missing: OnMissing = _setting("error", "What to do if a model lacks weights.")  # noqa: RUF009 - it makes a field

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.check(getattr(self, name), name))
        if None not in [getattr(self, name) for name in EXCLUSIVE]:
            raise _exclude_each_other(" and ".join(EXCLUSIVE))

    @classmethod
    def load(cls, config: str | os.PathLike[str] | None = None, **arguments: Any) -> Self:
        """Load settings from arguments, `SURFW_*` variables, a file and the defaults, in this order of precedence.

        Args:
            config: a TOML file with a table `[tool.surfw]`; by default the file named by `$SURFW_CONFIG`, if set.
            arguments: settings by name; None means not given.

        Raises:
            ConfigurationError: a value is invalid, a name is unknown, or the file cannot be read.
        """
        return cls(**{name: value for name, (value, _) in trace_settings(config, arguments).items()})

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources in the order given; empty if none is set."""
        return (self.source,) if isinstance(self.source, str) else self.source or ()

    @property
    def retry(self) -> RetryPolicy:
        """The retry policy for connections."""
        return RetryPolicy(
            attempts=self.retry_attempts,
            first_delay_seconds=self.retry_first_delay,
            backoff=self.retry_backoff,
            most_delay_seconds=self.retry_most_delay,
            jitter=self.retry_jitter,
            restart_seconds=self.retry_restart,
        )

    @property
    def token(self) -> str | None:
        """A client's token, from `token_file`, else from `$SURFW_TOKEN`. It is read on every access.

        Raises:
            ConfigurationError: the file cannot be read, or does not hold exactly one token.
        """
        return read_token(self.token_file)

    def tls_for(self, url: str) -> TlsFiles | None:
        """`tls` for a client of the server at this URL; None if the URL does not use TLS."""
        return self.tls if url.startswith("wss://") else None

    @property
    def tls(self) -> TlsFiles | None:
        """This side's certificate and the certificates it trusts; None if nothing is set.

        Raises:
            ConfigurationError: a key is set without a certificate.
        """
        if self.ssl_certfile is self.ssl_keyfile is self.ssl_ca_certs is None:
            return None
        return TlsFiles(certfile=self.ssl_certfile, keyfile=self.ssl_keyfile, ca_certs=self.ssl_ca_certs)


def _read_registry() -> dict[str, Setting]:
    """Build the settings from the fields of `Settings`."""
    hints = get_type_hints(Settings)
    found = {}
    for one in fields(Settings):
        parts = () if get_origin(hints[one.name]) is dict else get_args(hints[one.name])
        words = [word for kind in parts if get_origin(kind) is Literal for word in get_args(kind)]
        kinds = [get_origin(kind) or kind for kind in parts or (hints[one.name],) if kind is not type(None)]
        choices = get_args(hints[one.name]) if get_origin(hints[one.name]) is Literal else ()
        shown = one.metadata["default_text"]
        if shown is None:
            shown = "" if one.default is None or one.default is False else str(one.default)
        found[one.name] = Setting(
            name=one.name,
            kind=str if choices else kinds[0],
            optional=type(None) in get_args(hints[one.name]),
            choices=choices,
            words=tuple(words),
            many=any(get_origin(kind) is tuple for kind in parts),
            **{**one.metadata, "default_text": shown},
        )
    return found


SETTINGS: Mapping[str, Setting] = _read_registry()
"""All settings by name."""


@dataclass(frozen=True, slots=True)
class SettingOrigin:
    """Where a value comes from.

    Attributes:
        kind: the kind of place.
        name: the argument, the variable, or the file's path; `default` for a default.
    """

    kind: Literal["argument", "variable", "file", "default"]
    name: str


def trace_settings(
    config: str | os.PathLike[str] | None, arguments: Mapping[str, Any]
) -> dict[str, tuple[Any, SettingOrigin]]:
    """Return every setting's value and origin. Takes the arguments of `Settings.load`.

    A table such as `storage_options` is merged from all places that give it; per entry, the highest precedence wins.

    Raises:
        ConfigurationError: as in `Settings.load`.
    """
    for name in arguments:
        if name not in SETTINGS:
            raise ConfigurationError(f"there is no setting {name}{_closest(name, SETTINGS)}")
    file = config or os.environ.get(CONFIG_VARIABLE)
    path = expand_home(file) if file else None
    table = read_settings_file(path) if path is not None else {}
    places = {name: _places_of(setting, arguments, table, path) for name, setting in SETTINGS.items()}
    yielding = _decide_between(places)
    defaults = Settings()
    found: dict[str, tuple[Any, SettingOrigin]] = {}
    for name, setting in SETTINGS.items():
        if name == yielding:
            found[name] = None, places[next(one for one in EXCLUSIVE if one != name)][0]
            continue
        nearest, *others = places[name]
        value = getattr(defaults, name) if nearest.kind == "default" else _read(setting, nearest, arguments, table)
        if setting.kind is dict:
            for origin in others:
                value = _read(setting, origin, arguments, table) | value
        found[name] = value, nearest
    if os.environ.get(TOKEN_VARIABLE) and found["token_file"][1].kind != "argument":
        _check_token(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE)
        found["token_file"] = None, SettingOrigin("variable", TOKEN_VARIABLE)  # the token itself, not a path
    return found


def _places_of(
    setting: Setting, arguments: Mapping[str, Any], table: Mapping[str, Any], path: Path | None
) -> list[SettingOrigin]:
    """The places that give a setting, highest precedence first; the default if no place gives it."""
    given = {
        SettingOrigin("argument", setting.name): arguments.get(setting.name) is not None,
        SettingOrigin("variable", setting.variable): bool(os.environ.get(setting.variable)),
        SettingOrigin("file", str(path)): setting.name in table,
    }
    return [origin for origin, is_given in given.items() if is_given] or [SettingOrigin("default", "default")]


def _read(setting: Setting, origin: SettingOrigin, arguments: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """The validated value of a setting from one place."""
    if origin.kind == "argument":
        return setting.check(arguments[setting.name], setting.name)
    if origin.kind == "variable":
        return setting.parse(os.environ[setting.variable], setting.variable)
    return table[setting.name]  # checked when the file was read


def _decide_between(places: Mapping[str, Sequence[SettingOrigin]]) -> str | None:
    """Return which of the two exclusive settings is dropped because the other has higher precedence.

    Raises:
        ConfigurationError: both are given in the same place.
    """
    nearer, other = sorted(EXCLUSIVE, key=lambda name: _PLACES.index(places[name][0].kind))
    origin = places[other][0]
    if origin.kind == "default":
        return None
    if origin.kind == places[nearer][0].kind:
        names = " and ".join(SETTINGS[name].variable if origin.kind == "variable" else name for name in EXCLUSIVE)
        raise _exclude_each_other(f"{origin.name}: {names}" if origin.kind == "file" else names)
    return other


def _exclude_each_other(names: str) -> ConfigurationError:
    return ConfigurationError(f"{names} exclude each other; give one of them")


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read and validate the settings in a TOML file.

    Raises:
        ConfigurationError: the file cannot be read, is not TOML, has no table `[tool.surfw]`, or has an invalid entry.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE_BYTES + 1)
        if len(data) > _MOST_FILE_BYTES:
            raise ConfigurationError(
                f"settings file {path} has more than {_MOST_FILE_BYTES} bytes, which no settings need; name another "
                f"with --config or {CONFIG_VARIABLE}"
            )
        document = tomllib.loads(data.decode())
    except OSError as exc:
        raise ConfigurationError(
            f"settings file {path} cannot be read: {exc.strerror or type(exc).__name__}; name another with --config or "
            f"{CONFIG_VARIABLE}"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigurationError(f"settings file {path} is not TOML: {exc}; correct it there") from exc
    tool = document.get("tool")
    table = tool.get("surfw") if isinstance(tool, dict) else None
    if not isinstance(table, dict):
        raise ConfigurationError(f"settings file {path} has no table [{TABLE}]; settings stand below that line")
    return {key: _check_entry(path, key, value) for key, value in table.items()}


def _check_entry(path: Path, key: str, value: object) -> Any:
    if isinstance(value, dict) and (key not in SETTINGS or SETTINGS[key].kind is not dict):
        raise ConfigurationError(
            f"{path}: {key} is a table, expected settings in [{TABLE}] itself{_closest(key, SETTINGS)}"
        )
    if key not in SETTINGS:
        raise ConfigurationError(f"{path}: there is no setting {key}{_closest(key, SETTINGS)}")
    return SETTINGS[key].check(value, f"{path}: {key}")


def find_misspelt_variables() -> dict[str, str]:
    """Return unknown `SURFW_*` environment variables, each with the known variable that it resembles."""
    known = {setting.variable for setting in SETTINGS.values()} | {CONFIG_VARIABLE, TOKEN_VARIABLE, *_OTHER_VARIABLES}
    words = [name.removeprefix(_PREFIX) for name in known]
    found = {}
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in known:
            found[name] = difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1, cutoff=_NEAR)
    return {name: f"{_PREFIX}{near[0]}" for name, near in found.items() if near}


def _closest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; 'surfw config' lists all settings"


def read_token(token_file: str | None) -> str | None:
    """Return the token in a file, else in `$SURFW_TOKEN`, else None.

    Raises:
        ConfigurationError: the file cannot be read, or does not hold exactly one token.
    """
    if token_file is None:
        given = os.environ.get(TOKEN_VARIABLE)
        return _check_token(given, TOKEN_VARIABLE) if given else None
    path = expand_home(token_file)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_TOKEN_BYTES).decode(errors="replace")
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise ConfigurationError(
            f"token_file {path} cannot be read: {reason}; name a file that holds the token"
        ) from exc
    return _check_token(text, f"token_file {path}")


def _check_token(text: str, where: str) -> str:
    """Validate a token and strip surrounding whitespace. Errors never include the token."""
    token = text.strip()
    if not token:
        raise ConfigurationError(f"{where} is empty, expected a token; put one in, or unset it")
    if token.startswith(("[", "#")) and "\n" in token:
        raise SeveralTokensError(f"{where} holds a server's tokens, expected one; put the one to show in a file alone")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{where} holds no token, expected one word of printable ASCII characters")
    return token
