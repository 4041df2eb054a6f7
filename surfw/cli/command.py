"""A command as typer runs it, which tells three things in other words: its usage, wrong values, interruptions."""

from typing import Any

import typer
from typer.core import TyperCommand

from surfw.cli import signals


class Command(TyperCommand):
    """A command of the application."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """What the usage line shows: an argument that has to be there stands without braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the command line; complaints come without the name of a class in between."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as exc:
            exc.message = exc.message.removeprefix("Value error, ")
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run it; where it is interrupted that is said, with the text that the interruption may have."""
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
