"""The entry point of the process: sets up signal handling before anything slow is imported."""

import sys

from surfw.cli import signals


def main() -> None:
    """Run the command line, and exit with its code."""
    signals.set_up()
    from surfw.cli.app import run

    sys.exit(run())
