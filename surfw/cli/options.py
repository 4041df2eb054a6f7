"""What all commands share: parsing, running, and the options for settings, `--config`, `--json` and `-q`.

Typer reads the options; `surfw.settings` decides which value applies. So an option for a setting has no default here,
and is None if it is not given.
"""

import inspect
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from surfw.cli import completion, signals
from surfw.cli.addresses import Mistake, is_here
from surfw.config import TlsFiles, display_url, is_size, suggest_size
from surfw.errors import ConfigurationError
from surfw.setting import Setting
from surfw.settings import (
    CONFIG_VARIABLE,
    EXCLUSIVE,
    SETTINGS,
    TABLE,
    SettingOrigin,
    Settings,
    find_misspelt_variables,
    trace_settings,
)
from surfw.storage_options import parse_options

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
RUN_SETTINGS = (
    "model", "adapter", "source", "source_order", "storage_options", "cache_layers", "memory_budget", "device",
    "device_memory", "policy", "codec", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "dtype",
    "on_missing", "connect_timeout", "silence_timeout", "retry_attempts", "retry_first_delay", "retry_backoff",
    "retry_most_delay", "retry_jitter", "retry_restart", "deadline", "token_file", "ssl_ca_certs", "ssl_certfile",
    "ssl_keyfile", "encryption_key_file", "verify_key", "disk_cache", "cache_dir", "offline", "live",
)  # fmt: skip
"""The settings of commands that run a model."""
TLS_SETTINGS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
Place = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="The model's name in the source, or a source: HOST:PORT, URL, folder, or hub id. [default: see --source]",
        autocompletion=completion.models_in_source,
    ),
]
"""The argument that names the model to run."""
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Continue past the model's end token.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors on stderr.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help=f"A TOML file with settings in [{TABLE}]. [env var: {CONFIG_VARIABLE}]"
    ),
]

FORM = "Form of the weights"
"""The `rich_help_panel` of options of `chunk` that other commands have, too, in another section."""

MORE = "More commands"
"""The `rich_help_panel` of the less common commands, which the help lists under this heading."""

_PANELS = {
    "Prompt and answer": (
        "prompt", "max_new_tokens", "system", "stop", "temperature", "top_p", "top_k", "seed", "raw", "ignore_eos",
        "prompt_ids", "pair", "prompt_name",
    ),
    "Model and source": (
        "model", "store", "name", "source", "adapter", "base", "source_order", "revision", "variant", "config_from",
        "codec", "dtype", "on_missing", "storage_options",
    ),
    FORM: ("quantize", "dequantize", "in_place"),
    "Memory, cache and speed": (
        "memory_budget", "cache_layers", "device", "device_memory", "cache_mb", "redis_url", "policy", "prompt_lookup",
        "draft", "disk_cache", "cache_dir", "offline",
    ),
    "Many prompts": ("prompts", "output", "ordered", "resume", "sequences", "pipeline"),
    "Network": (
        "host", "port", "clients", "allowed_host", "insecure", "max_bytes_per_second", "max_client_bytes_per_second",
        "slow_client_timeout", "drain_seconds", "connect_timeout", "silence_timeout", "retry_attempts",
        "retry_first_delay", "retry_backoff", "retry_most_delay", "retry_jitter", "retry_restart", "deadline",
    ),
    "Tokens, certificates and keys": (
        "token_file", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "encryption_key_file", "encrypt", "sign",
        "verify_key",
    ),
    "Output and general": (
        "explain", "dry_run", "live", "log_format", "announce", "record", "trace", "json", "quiet", "config", "help",
    ),
}  # fmt: skip
"""The sections of a long help and the parameters in each, in order; an option's own `rich_help_panel` goes first."""
_PANEL_ORDER = [name for names in _PANELS.values() for name in names]
_MOST_UNGROUPED = 15
_OPTION_COLUMNS = 30

_PLACE = "configuration"
_OFFERED: dict[str, tuple[str, ...]] = {}

_OTHER_WORDS = {
    "run": "infer", "generate": "infer", "ask": "infer", "download": "pull", "convert": "chunk",
    "split": "chunk", "start": "serve", "status": "stats", "top": "stats", "benchmark": "bench", "ls": "list",
    "models": "list", "info": "show", "inspect": "show", "remove": "rm", "delete": "rm", "clean": "prune",
    "gc": "prune", "check": "verify", "settings": "config",
}  # fmt: skip
"""Names that other tools use, and the commands they stand for."""

_COMPLETIONS: Mapping[str, Callable[..., list[str]]] = {
    "model": completion.models_in_source,
    "dtype": completion.dtypes,
}


class WrongSettingError(ConfigurationError):
    """An environment variable or a settings file is invalid. Exit code 2, as for a wrong option."""


@contextmanager
def _in_kind_words(args: Sequence[str]) -> Iterator[None]:
    """Improve typer's error messages: say what was seen and expected, drop exception names, suggest a fix."""
    typed = list(args)  # typer empties the list
    try:
        yield
    except typer.BadParameter as exc:
        expected = _expect(exc.param)
        if exc.param and expected and (seen := _find_value(exc.param.opts[0], typed)) is not None:
            exc.message = f"{seen!r} is not {expected}"
        exc.message = exc.message.removeprefix("Value error, ")
        raise
    except Exception as exc:  # a usage error; typer does not export its class
        if near := getattr(exc, "possibilities", None):
            meant = [one for one in near if one != "--help"][:2] or near
            exc.message = f"{exc.message}; did you mean {' or '.join(meant)}?"  # type: ignore[attr-defined]
            exc.possibilities = None  # type: ignore[attr-defined]
        elif seen := _find_single_dash(exc, typed):
            exc.message = f"{exc.message}; did you mean -{seen}?"  # type: ignore[attr-defined]
        elif str(getattr(exc, "message", "")).startswith("Got unexpected extra argument"):
            ctx = exc.ctx  # type: ignore[attr-defined]
            names = {one.name for one in ctx.command.params} if ctx else set()
            if "prompt" in names:
                exc.message += "; a text with spaces goes between quotes"  # type: ignore[attr-defined]
            elif ctx.info_name == "list":
                exc.message += "; --store names a store, and 'surfw show NAME' shows one model"  # type: ignore[attr-defined]
        raise


def _find_single_dash(exc: Any, typed: Sequence[str]) -> str | None:
    """Return the long option that was typed with a single dash, if that is why an option is unknown."""
    ctx, unknown = getattr(exc, "ctx", None), getattr(exc, "option_name", None)
    if ctx is None or unknown is None:
        return None
    offered = {option for one in ctx.command.params for option in one.opts}
    words = (one.partition("=")[0] for one in typed)
    return next((one for one in words if one.startswith(unknown) and f"-{one}" in offered), None)


def _panel_of(option: Any) -> str:
    """Return the section of a long help that an option belongs to."""
    own: str | None = getattr(option, "rich_help_panel", None)
    return own or next(panel for panel, names in _PANELS.items() if option.name in names)


def _expect(param: Any) -> str | None:
    """Describe the values that a numeric option accepts; None for any other option."""
    if param is None:
        return None
    if setting := SETTINGS.get(param.name or ""):
        return setting.expected if setting.kind in {int, float} else None
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if kind not in {int, float}:
        return None
    return Setting(
        name=param.name, kind=kind, optional=True, default_text="", help="", least=param.min, most=param.max
    ).expected


def _find_value(option: str, args: Sequence[str]) -> str | None:
    """Return the value that was typed for an option."""
    for at, text in enumerate(args):
        if text.startswith(f"{option}="):
            return text.partition("=")[2]
        if text == option:
            return args[at + 1] if at + 1 < len(args) else None
    return None


class Group(TyperGroup):
    """A group of commands whose help has sections, and which suggests commands for the names other tools use."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the commands, the common ones first."""
        shown = [(name, one) for name, one in self.commands.items() if not one.hidden]
        width = formatter.width - 6 - max(len(name) for name, _ in shown)
        panels: dict[str, list[tuple[str, str]]] = {"Commands": [], MORE: []}
        for name, one in shown:
            panel = getattr(one, "rich_help_panel", None)
            panels[MORE if panel == MORE else "Commands"].append((name, one.get_short_help_str(width)))
        for title, rows in panels.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=max(len(name) for name, _ in shown))

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the options before the command."""
        with _in_kind_words(args):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the named command; if it does not exist, fail with a suggestion."""
        if args and args[0] not in self.commands and (meant := _OTHER_WORDS.get(args[0])) in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        name, command, args = super().resolve_command(ctx, args)
        if isinstance(command, Deferred):
            command = self.commands[command.name] = command.load()
        return name, command, args


class Command(TyperCommand):
    """A typer command with its own usage line, error messages, and handling of interruptions."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the pieces of the usage line; a required argument has no braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the arguments and options: in sections if there are many options, and each is known to have one."""
        shown = [(one, row) for one in self.get_params(ctx) if (row := one.get_help_record(ctx))]
        arguments = [row for one, row in shown if one.param_type_name == "argument"]
        known = [(one, row) for one, row in shown if one.param_type_name == "option" and one.name in _PANEL_ORDER]
        if len(known) <= _MOST_UNGROUPED or len(known) + len(arguments) < len(shown):
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": arguments} | {name: [] for name in _PANELS}
        for one, row in sorted(known, key=lambda found: _PANEL_ORDER.index(found[0].name or "")):
            sections[_panel_of(one)].append(row)
        width = min(_OPTION_COLUMNS, max(len(name) for _, (name, _) in shown))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(f"{name:<{width}}", text) for name, text in rows])

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the command line."""
        with _in_kind_words(args):
            return super().parse_args(ctx, [*_join_words(ctx, args)])

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command. If it is interrupted, say so on stderr, with the text of the `KeyboardInterrupt`, if any."""
        try:
            signals.begin(quiet=bool(ctx.params.get("quiet")))
            result = super().invoke(ctx)
            signals.check()  # a signal may have come in the last step
        except KeyboardInterrupt as exc:
            signals.say(str(exc))
            raise
        except Exception as exc:
            if not signals.is_interrupted():
                raise
            signals.say()  # an error after a signal is a consequence of it
            raise KeyboardInterrupt from exc
        else:
            return result


class Deferred(Command):
    """The name and the summary of a command whose module is not imported yet.

    `where` is a module of this package, the command's function or typer application in it, and optionally the name of
    its examples if that is not `EXAMPLES`: `chunk:chunk`, `store:rm:RM_EXAMPLES`.
    """

    name: str

    def __init__(self, name: str, where: str, summary: str, *, panel: str | None = None) -> None:
        super().__init__(name, help=summary, rich_help_panel=panel)
        self._where = where

    def load(self) -> Any:
        """Import the module, and return the command itself."""
        module_name, function, *examples_name = self._where.split(":")
        module = import_module(f"surfw.cli.{module_name}")
        found = getattr(module, function)
        if not isinstance(found, typer.Typer):
            examples = getattr(module, *examples_name or ("EXAMPLES",))
            made = typer.Typer(rich_markup_mode=None, add_completion=False)
            made.command(self.name, cls=Command, epilog=examples, rich_help_panel=self.rich_help_panel)(found)
            found = made
        command = typer.main.get_command(found)
        command.name = self.name
        return command


@dataclass(frozen=True)
class Configuration:
    """A command's settings, the origin of each, and in `several` all values of the options that may be repeated."""

    settings: Settings
    origins: Mapping[str, SettingOrigin]
    several: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def load_configuration(context: typer.Context, config: Path | None, arguments: Mapping[str, Any]) -> Configuration:
    """Load the settings from options, variables, and the file named by `--config` before or after the command.

    Raises:
        WrongSettingError: an environment variable, the file, or a value in it is invalid.
        BadParameter: an option is invalid, or two of them exclude each other.
    """
    given = [SETTINGS[name].option for name in EXCLUSIVE if arguments.get(name) is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"does not go with {given[0]}; give one of them", param_hint=given[1])
    for seen, meant in find_misspelt_variables().items():
        logging.getLogger("surfw.cli").warning("%s is no variable of surfw's; did you mean %s?", seen, meant)
    for name, value in arguments.items():
        check_option(name, value)
    try:
        found = trace_settings(config or context.find_root().params.get("config"), arguments)
        loaded = Configuration(
            Settings(**{name: value for name, (value, _) in found.items()}),
            {name: where for name, (_, where) in found.items()},
        )
        for name in ("memory_budget", "device_memory", "disk_cache"):
            _check_size(loaded, name)
    except ConfigurationError as exc:
        raise WrongSettingError(str(exc)) from exc
    settings = loaded.settings
    runs, has_cache = "offline" in arguments, settings.disk_cache is not None or settings.offline
    if runs and arguments.get("cache_dir") is not None and not has_cache:  # pull, list and rm have a cache in any case
        raise Mistake(
            "--cache-dir is the folder of a disk cache, and this run has none; add --disk-cache SIZE, such as 20GB, or "
            "--offline"
        )
    return loaded


def tls_for(configuration: Configuration, url: str) -> TlsFiles | None:
    """Return the certificates for a server with TLS, if there are any.

    Raises:
        Mistake: they were given as options, and the URL is not that of a server with TLS.
        ConfigurationError: there is a key without a certificate.
    """
    for name in TLS_SETTINGS:
        if configuration.origins[name].kind == "argument" and not url.startswith("wss://"):
            raise Mistake(
                f"{SETTINGS[name].option} is for a server with TLS, and {display_url(url)} is none; "
                "expected wss://HOST:PORT"
            )
    return configuration.settings.tls_for(url)


def hand_on(configuration: Configuration, names: Sequence[str]) -> None:
    """Pass these settings to child processes, in environment variables."""
    for name in names:
        if (value := getattr(configuration.settings, name)) is not None:
            os.environ[SETTINGS[name].variable] = str(value)


def check_option(name: str, value: Any) -> None:
    """Check the value of a setting's option; None means that it was not given.

    Raises:
        Mistake: the value is invalid.
    """
    try:
        if value is not None:
            SETTINGS[name].check(value, SETTINGS[name].option)
    except ConfigurationError as exc:
        raise Mistake(str(exc)) from exc


def _check_size(loaded: Configuration, name: str) -> None:
    """Refuse a size setting whose unit is evidently missing.

    Raises:
        ConfigurationError: the size comes from an environment variable or a file.
        Mistake: it was given as an option.
    """
    size, origin = getattr(loaded.settings, name), loaded.origins[name]
    if origin.kind == "argument":
        check_size(SETTINGS[name].option, size)
    elif size is not None and suggest_size(size):
        where = origin.name if origin.kind == "variable" else f"{origin.name}: {name}"
        raise ConfigurationError(_ask_for_unit(where, size))


def check_size(option: str, size: str | None) -> None:
    """Refuse an option's value that is not a size, or whose unit is evidently missing.

    Raises:
        Mistake: the value is refused.
    """
    if size is not None and not is_size(size):
        raise Mistake(f"{option} is {size!r}, expected a size such as 1.2GB")
    if size is not None and suggest_size(size):
        raise Mistake(_ask_for_unit(option, size))


def _ask_for_unit(where: str, size: str) -> str:
    return f"{where} is {size}, which is {size} bytes; did you mean {suggest_size(size)}?"


def with_settings(*names: str, several: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options for these settings, and `--config`.

    The options take the place of the command's parameter `configuration`, which receives a `Configuration`. Options in
    `several` may be repeated; the first value is the setting.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, config: Path | None, **given: Any) -> None:
            repeated = {name: tuple(given[name] or ()) for name in several}
            given |= {name: next(iter(values), None) for name, values in repeated.items()}
            arguments = {name: _value(SETTINGS[name], given.pop(name)) for name in names}
            arguments |= {name: word for name in names for word in SETTINGS[name].words if given.pop(f"{name}_{word}")}
            given[_PLACE] = replace(load_configuration(context, config, arguments), several=repeated)
            command(**given)

        shown = [_parameter("context", typer.Context)]
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == _PLACE:
                shown += [
                    _parameter(name, _annotation(SETTINGS[name], is_repeated=name in several), None) for name in names
                ]
                shown += [_word_parameter(SETTINGS[name], word) for name in names for word in SETTINGS[name].words]
            else:
                shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        shown.append(_parameter("config", ConfigFile, None))
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        _OFFERED[command.__name__] = names
        return run

    return decorate


def check_system(system: str | None, *, raw: bool) -> None:
    """Refuse a system message if the chat template is not used.

    Raises:
        Mistake: both `--system` and `--raw` were given.
    """
    if system is not None and raw:
        raise Mistake(
            "--system does not go with --raw: a system message is part of the chat template, which --raw leaves out; "
            "give one of them"
        )


def commands_with(name: str) -> list[str]:
    """Return the commands that have this setting as an option."""
    return sorted(command.replace("_", " ").strip() for command, names in _OFFERED.items() if name in names)


def _join_words(ctx: typer.Context, args: Sequence[str]) -> Iterator[str]:
    """Join a switch and the word after it into one option: `--live full` becomes `--live-full`.

    Raises:
        Mistake: the switch does not take that word.
    """
    offered = {option for parameter in ctx.command.params for option in parameter.opts}
    known = {one.option: one.words for one in SETTINGS.values() if one.words and one.option in offered}
    left = deque(args)
    while left:
        arg = left.popleft()
        option, mark, word = arg.partition("=")
        if word in known.get(option, ()):
            yield f"{option}-{word}"
        elif left and left[0] in known.get(arg, ()):
            yield f"{arg}-{left.popleft()}"
        elif option in known and (mark or _is_word(left)) and not ctx.resilient_parsing:
            wrong, expected = word if mark else left[0], " or ".join(known[option])
            others = "" if mark else f"; a name or a prompt goes before {option}"
            raise Mistake(f"{option} is {wrong!r}, expected {expected}, or nothing{others}", ctx=ctx)
        else:
            yield arg
        if arg == "--":
            yield from left
            return


def _is_word(left: Sequence[str]) -> bool:
    """Whether the text after a switch must belong to it: it has letters only, and at most an option follows.

    In `--live my-model 'a prompt'`, both are arguments of the command. So is the name of an existing file or folder.
    """
    word, following = [*left, "", ""][:2]
    return word.isalpha() and not is_here(word) and (not following or (following != "-" and following[0] == "-"))


def _word_parameter(setting: Setting, word: str) -> inspect.Parameter:
    """Return the hidden parameter for a switch joined with a word; the switch's help describes it."""
    option = typer.Option(f"{setting.option}-{word}", hidden=True)
    return _parameter(f"{setting.name}_{word}", Annotated[bool, option], default=False)


def _value(setting: Setting, given: Any) -> Any:
    """Return an option's value; None if it was not given."""
    if setting.kind is dict:
        return parse_options(given) if given else None
    if setting.many:
        return (given[0] if len(given) == 1 else tuple(given)) if given else None
    return given


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(setting: Setting, *, is_repeated: bool = False) -> Any:
    """Return a setting's type and option as a typer annotation."""
    notes = [f"env var: {setting.variable}"] + [f"default: {setting.default_text}"] * bool(setting.default_text)
    option = f"{setting.option}/--no-{setting.option[2:]}" if setting.kind is bool else setting.option
    declared = typer.Option(
        option,
        metavar=setting.metavar,
        min=setting.least,
        max=setting.most,
        autocompletion=completion.choices(setting.choices) if setting.choices else _COMPLETIONS.get(setting.name),
        help=f"{setting.help}{' May be repeated to compare answers.' * is_repeated} [{'; '.join(notes)}]",
    )
    kind: Any = Literal[setting.choices] if setting.choices else setting.kind
    if setting.kind is dict or setting.many or is_repeated:
        kind = list[str]
    return Annotated[kind | None, declared]
