"""Local files that others may have put there: only regular ones are opened, and none is read further than it may be.

A FIFO would wait for its writer, a device may have no end, a sparse file may be larger than any memory. What errors say
of a file that stands in a folder's place, and of who lacks rights, is here too.
"""

import errno
import os
import pwd
import stat
from pathlib import Path

from surfw.errors import ConfigurationError


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """A descriptor of a regular file, open for reading; a link to one is followed.

    Raises:
        OSError: there is none, it is something else, or it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # or opening a FIFO waits for its writer
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The contents of a regular file, which may have at most so many bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size} bytes, expected at most {most_bytes}", str(path))
        return file.read(size)


def describe_file(path: Path) -> str:
    """Say of a file that stands where a folder was expected what it is, and which folder to name instead."""
    if path.suffix.lower() == ".gguf":
        return f"{path} is a GGUF file, expected a folder; surfw chunk {path} makes dense weights of it"
    if path.suffix not in {".safetensors", ".bin", ".pt", ".pth"}:
        return f"{path} is a file, expected a folder; name the one that is meant"
    folder = path.parent
    if any((folder / settings).exists() for settings in ("config.json", "adapter_config.json")):
        return f"{path} is a file of weights, expected the folder that holds it: {folder}"
    return f"{path} is a file of weights, expected the folder of a checkpoint; {folder} has no config.json"


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder that `~` or `~user` at its beginning stands for.

    Raises:
        ConfigurationError: nobody of that name has a home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{path}: there is no home folder of {Path(path).parts[0]} on this machine; write the path in full, or ./ "
            "before a name that begins with ~"
        ) from None


def user_name() -> str:
    """Return who this process is when it asks for a file: a user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
