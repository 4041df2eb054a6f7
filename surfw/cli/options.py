"""What all commands share: how one is parsed and run, and the options of the settings, `--config` and `--json`.

Typer reads the options; `surfw.settings` decides which value counts. So no option of a setting has a default of its
own, and one that is not given is None.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from surfw.cli import signals
from surfw.setting import Setting
from surfw.settings import CONFIG_VARIABLE, EXCLUSIVE, SETTINGS, TABLE, SettingOrigin, Settings, trace_settings
from surfw.storage_options import parse_options

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help=f"A TOML file with settings in [{TABLE}]. [env var: {CONFIG_VARIABLE}]"
    ),
]

_PLACE = "configuration"
_OFFERED: dict[str, tuple[str, ...]] = {}


class Command(TyperCommand):
    """A command as typer runs it, except for its usage line, its complaints, and what an interruption does."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the pieces of the usage line; a required argument has no braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the command line; complaints do not start with the name of an exception."""
        try:
            return super().parse_args(ctx, [*_join_words(args)])
        except typer.BadParameter as exc:
            exc.message = exc.message.removeprefix("Value error, ")
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run it. If it is interrupted, say so on stderr, with the text that the interruption may carry."""
        try:
            signals.begin()
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            signals.say(str(exc))
            raise
        except Exception as exc:
            if not signals.is_interrupted():
                raise
            signals.say()  # whatever fails from then on fails because of that
            raise KeyboardInterrupt from exc


@dataclass(frozen=True)
class Configuration:
    """The settings of a command, and where each comes from."""

    settings: Settings
    origins: Mapping[str, SettingOrigin]


def load_configuration(context: typer.Context, config: Path | None, arguments: Mapping[str, Any]) -> Configuration:
    """Load the settings from options, variables, and the file named by `--config` before or after the command.

    Raises:
        ConfigurationError: one of them cannot be used.
        BadParameter: two options exclude each other.
    """
    given = [SETTINGS[name].option for name in EXCLUSIVE if arguments.get(name) is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"does not go with {given[0]}; give one of them", param_hint=given[1])
    found = trace_settings(config or context.find_root().params.get("config"), arguments)
    return Configuration(
        Settings(**{name: value for name, (value, _) in found.items()}),
        {name: where for name, (_, where) in found.items()},
    )


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings, and `--config`.

    The options stand where the command has its parameter `configuration`, which receives a `Configuration`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, config: Path | None, **given: Any) -> None:
            arguments = {name: _value(SETTINGS[name], given.pop(name)) for name in names}
            arguments |= {name: word for name in names for word in SETTINGS[name].words if given.pop(f"{name}_{word}")}
            given[_PLACE] = load_configuration(context, config, arguments)
            command(**given)

        shown = [_parameter("context", typer.Context)]
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == _PLACE:
                shown += [_parameter(name, _annotation(SETTINGS[name]), None) for name in names]
                shown += [_word_parameter(SETTINGS[name], word) for name in names for word in SETTINGS[name].words]
            else:
                shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        shown.append(_parameter("config", ConfigFile, None))
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        _OFFERED[command.__name__] = names
        return run

    return decorate


def commands_with(name: str) -> list[str]:
    """Return the commands that have this setting as an option."""
    return [command.replace("_", " ") for command, names in _OFFERED.items() if name in names]


def _join_words(args: Sequence[str]) -> Iterator[str]:
    """Make one option of a switch and the word that follows it: `--live full` is `--live-full`."""
    known = {setting.option: setting.words for setting in SETTINGS.values() if setting.words}
    left = deque(args)
    while left:
        arg = left.popleft()
        option, _, word = arg.partition("=")
        if word in known.get(option, ()):
            yield f"{option}-{word}"
        elif left and left[0] in known.get(arg, ()):
            yield f"{arg}-{left.popleft()}"
        else:
            yield arg
        if arg == "--":
            yield from left
            return


def _word_parameter(setting: Setting, word: str) -> inspect.Parameter:
    """Return the parameter of a switch with a word; help shows it with the switch."""
    option = typer.Option(f"{setting.option}-{word}", hidden=True)
    return _parameter(f"{setting.name}_{word}", Annotated[bool, option], default=False)


def _value(setting: Setting, given: Any) -> Any:
    """Return what an option says; None if it was not given."""
    if setting.kind is dict:
        return parse_options(given) if given else None
    return given


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(setting: Setting) -> Any:
    """Return the type and the option of a setting, as typer wants them."""
    notes = [f"env var: {setting.variable}"] + [f"default: {setting.default_text}"] * bool(setting.default_text)
    option = f"{setting.option}/--no-{setting.option[2:]}" if setting.kind is bool else setting.option
    declared = typer.Option(
        option,
        metavar=setting.metavar,
        min=setting.least,
        max=setting.most,
        help=f"{setting.help} [{'; '.join(notes)}]",
    )
    kind: Any = Literal[setting.choices] if setting.choices else setting.kind
    if setting.kind is dict:
        kind = list[str]
    return Annotated[kind | None, declared]
