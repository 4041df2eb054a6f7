"""Planted bugs: a plausible mistake replaces a line of surfw, in a copy of the package."""

import shutil
from pathlib import Path
from typing import NamedTuple

import surfw


class Plant(NamedTuple):
    """A bug: a module, the original text, and its replacement."""

    module: str
    right: str
    wrong: str


PLANTS = {
    "manifest": Plant(  # a text's blocks are cut without a check that it is a text
        "manifest/parser.py",
        '            blocks = bytes.fromhex(document["blocks"])\n',
        '            blocks = bytes.fromhex(document["blocks"].encode("ascii").decode())[: 1 << 20]\n'
        "            assert len(blocks) % 32 == 0\n",
    ),
    "safetensors": Plant(  # true and false count as integers
        "safetensors_header.py",
        "all(type(size) is int and size >= 0 for size in value)",
        "all(size >= 0 for size in value if not isinstance(size, str))",
    ),
    "client-messages": Plant(  # a list counts as a text
        "wire/messages.py",
        "    return tuple(map(_text(_ID_LENGTH), value))",
        "    return tuple(value[0][0] and one for one in value)",
    ),
    "gguf": Plant(  # memory for the number of values that a file claims
        "checkpoint/gguf.py",
        "            found = super()._get(",
        "            bytearray(int(count))\n            found = super()._get(",
    ),
    "server-messages": Plant(  # a frame of a run that has ended
        "wire/sessions.py",
        "        if self._run is None:\n"
        '            raise RemoteProtocolError("binary data that no message announced")\n',
        "",
    ),
}  # fmt: skip


def plant(name: str, folder: Path) -> Path:
    """Copy the package with a bug in this parser; return the folder to put first on the path."""
    bug, package = PLANTS[name], Path(surfw.__file__).parent
    shutil.copytree(package, folder / "surfw", ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    module = folder / "surfw" / bug.module
    text = module.read_text()
    assert text.count(bug.right) == 1, f"{bug.module} has changed: the plant for {name} has to follow"
    module.write_text(text.replace(bug.right, bug.wrong))
    return folder
