"""Draw the README's picture, `surfw/cli/infer.svg`: a terminal during a real run of `surfw infer`.

Run `python -m tests.picture` in the repository's root. It needs tmux, whose screen is drawn with rich.
"""

import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.cli.run import environment
from tests.pages import ROOT

PICTURE = ROOT / "surfw" / "cli" / "infer.svg"
COMMAND = 'surfw infer --model demo --memory-budget 4MB --prompt "A layer is"'
_WIDTH, _HEIGHT = 84, 16
_RUNNING = re.compile(r"\d+/\d+ tokens")
_LOOKS = 600


def main() -> None:
    """Run the command, and draw the last screen before it ends."""
    screen = ""
    with tempfile.TemporaryDirectory() as home:
        name = f"picture-{time.time_ns()}"
        variables = environment(Path(home), TERM="xterm-256color", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
        shell = ["env", "-i", *(f"{key}={value}" for key, value in variables.items()), "PS1=$ ", "sh"]
        _tmux("new-session", "-d", "-s", name, "-x", str(_WIDTH), "-y", str(_HEIGHT), *shell)
        try:
            while not _tmux("capture-pane", "-p", "-t", name).strip():
                time.sleep(0.05)
            _tmux("send-keys", "-t", name, COMMAND, "Enter")
            for _ in range(_LOOKS):
                shown = _tmux("capture-pane", "-e", "-p", "-t", name)
                if _RUNNING.search(shown):
                    screen = shown
                if _tmux("capture-pane", "-p", "-t", name).rstrip().endswith("\n$"):
                    break
                time.sleep(0.05)
            screen = screen or shown
        finally:
            _tmux("kill-session", "-t", name)
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen.rstrip()))
    PICTURE.write_text(console.export_svg(title="surfw infer", unique_id="surfw"))


def _tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
