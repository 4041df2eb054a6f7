"""Where the process of a command begins: with its signals, before anything is imported that takes time."""

import sys

from surfw.cli import signals


def main() -> None:
    """Run the command line, and exit."""
    signals.set_up()
    from surfw.cli.app import run

    sys.exit(run())
