"""The application: its commands, and how an error becomes a line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or a wrong setting, 130 interrupted, 143 ended by SIGTERM, 129 ended by
SIGHUP, 141 if the reader of stdout has left.
"""

import logging
import os
import signal
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from surfw import __version__
from surfw.cli import options, signals, streams
from surfw.cli.addresses import Mistake
from surfw.cli.wording import with_options
from surfw.errors import SurfwError, UninitializedWeightsWarning

_COMMANDS = {
    "chunk": ("chunk:chunk", "Split a checkpoint into chunks by layer, and store them."),
    "serve": ("serve:serve", "Serve a store or a plain checkpoint to clients, through a cache."),
    "infer": ("infer:infer", "Run a model while its layers arrive, and print its output."),
    "stats": ("stats:stats", "Show a server's counters, cache, clients and recent events."),
    "bench": ("bench:app", "Measure surfw against a baseline in the same run."),
    "chat": ("chat:chat", "Chat with a model that stays open between turns."),
    "pull": ("cached:pull", "Fetch a model into the disk cache and pin it there."),
    "list": ("store:list_:LIST_EXAMPLES", "List the models in a store, and anything else in it."),
    "show": ("store:show:SHOW_EXAMPLES", "Show a model in a store: its chunks, sizes and files."),
    "rm": ("store:rm:RM_EXAMPLES", "Remove a model from a store. Its blobs stay until 'surfw prune'."),
    "prune": ("store:prune:PRUNE_EXAMPLES", "Remove the blobs that no model needs."),
    "verify": (
        "store:verify:VERIFY_EXAMPLES",
        "Verify every byte of the models in a store.",
    ),
    "config": ("config:config", "Show every setting, its value, and where it comes from."),
    "schema": ("schema:schema", "Print the JSON Schema of a command's --json output."),
}
"""The module of each command and its examples, and its summary; `surfw --help` imports none of the modules."""
_EVERYDAY = ("chunk", "serve", "infer", "stats", "bench")


class _Commands(options.Group):
    """All commands, each imported when it is first used."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        known = {
            name: options.Deferred(name, where, summary, panel=None if name in _EVERYDAY else options.MORE)
            for name, (where, summary) in _COMMANDS.items()
        }
        self.commands = known | dict(self.commands)


app = typer.Typer(
    name="surfw",
    help="Run transformer models whose weights are remote or bigger than memory.",
    epilog="Start with:  surfw infer --prompt 'Weight streaming is'",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("help", cls=options.Command, rich_help_panel=options.MORE)
def show_help(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="A command, such as 'bench wire'.")
    ] = None,
) -> None:
    """Show help for surfw, or for one of its commands."""
    shown = context.find_root()
    for word in words or ():
        group = shown.command
        if not isinstance(group, options.Group):
            raise Mistake(f"'{shown.command_path}' has no commands of its own, and no {word!r}")
        _, command, _ = group.resolve_command(shown, [word])
        assert command is not None, "a mistake was raised"
        shown = typer.Context(command, info_name=word, parent=shown)
    typer.echo(shown.get_help())


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"surfw {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    config: options.ConfigFile = None,
) -> None:
    """Options of every command."""


_show_other_warning = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Log surfw's own warnings as one line each; show others as Python does."""
    if issubclass(category, UninitializedWeightsWarning):
        logging.getLogger("surfw").warning("%s", message)
    else:
        _show_other_warning(message, category, *where, **more)


def run() -> int:
    """Run the command line, and return the exit code."""
    streams.set_up()
    handler = _ToStderr()
    handler.setFormatter(_Remark("%(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("surfw").addHandler(handler)
    warnings.showwarning = _show_warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code = _run()
    try:
        streams.finish()
    except streams.OutputError as exc:
        code = code or _report(exc)
    return code


def _run() -> int:
    """Run the command, and turn an exception into an error line and an exit code."""
    try:
        try:
            app()
        finally:
            signals.conclude()
    except SystemExit as end:
        if end.code == signals.INTERRUPTED:
            return signals.exit_code()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return signals.exit_code()
    except (SurfwError, streams.OutputError) as exc:
        return _report(exc)
    except Exception as exc:
        if os.environ.get("SURFW_DEBUG"):
            raise
        return _fail(f"unexpected {type(exc).__name__}: {exc}; SURFW_DEBUG=1 shows where, please report it")
    return 0


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a spinner or a live view may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.setStream(sys.stderr)
        super().emit(record)


class _Remark(streams.OneLine):
    """Formats a record as one line, `surfw: warning: …`, with options instead of arguments."""

    def format(self, record: logging.LogRecord) -> str:
        return f"surfw: {record.levelname.lower()}: {with_options(super().format(record))}"


def _report(error: Exception) -> int:
    """Print an error and return the exit code; print nothing if the reader of stdout has left, as `head` does."""
    if isinstance(error, streams.OutputError) and error.is_unread:
        return 128 + signal.SIGPIPE
    return _fail(with_options(str(error)), 2 if isinstance(error, options.WrongSettingError) else 1)


def _fail(message: str, code: int = 1) -> int:
    """Print the error as one line on stderr; return the exit code."""
    print(f"surfw: error: {streams.one_line(message)}", file=sys.stderr)
    return code
