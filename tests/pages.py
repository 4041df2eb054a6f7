"""The pages of documentation and their blocks of code; the tests and `regenerate.py` use this list.

The word after a block's fence says what happens with it:

| word | what the tests do |
|---|---|
| `python` | run it, one page's blocks after another (`tests/library/test_pages.py`) |
| `toml` | read it as a file of settings (`tests/cli/test_pages.py`) |
| `sh` | run its commands, one after another (`tests/cli/test_pages.py`) |
| `console` | run what follows `$`, and compare the output, which `regenerate.py` writes (`tests/sandbox.py`) |
| `text` | nothing: it is neither a command nor code |
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "surfw/cli/COMMANDS.md",
    "surfw/CONFIGURATION.md",
    "surfw/TROUBLESHOOTING.md",
    "surfw/USES.md",
    "surfw/runtime/MEMORY.md",
    "surfw/models/CHECKPOINTS.md",
    "surfw/distributed/GUIDE.md",
    "surfw/models/GUIDE.md",
    "surfw/server/GUIDE.md",
    "surfw/storage/GUIDE.md",
    "surfw/storage/FORMAT.md",
    "surfw/wire/PROTOCOL.md",
    "surfw/bench/MEASUREMENTS.md",
    "surfw/README.md",
    "tests/README.md",
    "examples/demo_model/README.md",
    "examples/serverless/README.md",
    "CHANGELOG.md",
)
"""All pages, by path; snippets run in this order."""
KINDS = ("python", "toml", "sh", "console", "text")

_BLOCK = re.compile(r"((?:^<!-- run: [^\n]* -->\n)*)^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"^<!-- (?!end|run: )[^\n]*-->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page's path from the repository's root.
        line: the line of its first fence, counted from 1.
        kind: the first word after the fence; one of `KINDS`.
        flags: the other words.
        text: the text between the fences.
        before: commands that are run first, and not shown: `<!-- run: COMMAND -->` above the fence.
        is_generated: whether it is between `<!-- name -->` and `<!-- end -->`, and is generated.
    """

    page: str
    line: int
    kind: str
    flags: tuple[str, ...]
    text: str
    before: tuple[str, ...] = ()
    is_generated: bool = False

    def __str__(self) -> str:
        """The block's place, for people."""
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """Read a page's text."""
    return (ROOT / page).read_text()


def blocks(*kinds: str) -> list[Block]:
    """The blocks of all pages, or only those of some kinds."""
    return [one for page in PAGES for one in blocks_of(page, read(page)) if not kinds or one.kind in kinds]


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of one page."""
    generated = [found.span(1) for found in _GENERATED.finditer(text)]
    for found in _BLOCK.finditer(text):
        kind, *flags = found[2].split() or [""]
        yield Block(
            page,
            text.count("\n", 0, found.start(2)) + 1,
            kind,
            tuple(flags),
            found[3],
            tuple(re.findall(r"<!-- run: (.*) -->", found[1])),
            any(start <= found.start() < stop for start, stop in generated),
        )
