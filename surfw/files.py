"""Safe access to untrusted local files: only regular files are opened, and reads are bounded.

A FIFO would block until it has a writer, a device may be endless, a sparse file may be larger than memory. This module
also has helpers for error messages about files.
"""

import errno
import os
import pwd
import stat
from pathlib import Path

from surfw.errors import ConfigurationError


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """Open a regular file for reading and return its descriptor; symbolic links are followed.

    Raises:
        OSError: the file does not exist, is not regular, or cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # else opening a FIFO may block
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a regular file of at most `most_bytes` bytes.

    Raises:
        OSError: as for `open_regular`, or the file is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size} bytes, expected at most {most_bytes}", str(path))
        return file.read(size)


def describe_file(path: Path) -> str:
    """Describe a file that was given instead of a folder, and suggest the folder to name."""
    if path.suffix.lower() == ".gguf":
        return f"{path} is a GGUF file, expected a folder; surfw chunk {path} makes dense weights of it"
    if path.suffix not in {".safetensors", ".bin", ".pt", ".pth"}:
        return f"{path} is a file, expected a folder; name the one that is meant"
    folder = path.parent
    if any((folder / settings).exists() for settings in ("config.json", "adapter_config.json")):
        return f"{path} is a file of weights, expected the folder that holds it: {folder}"
    return f"{path} is a file of weights, expected the folder of a checkpoint; {folder} has no config.json"


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Expand a leading `~` or `~user` to the home folder.

    Raises:
        ConfigurationError: the user is unknown or has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{path}: there is no home folder of {Path(path).parts[0]} on this machine; write the path in full, or ./ "
            "before a name that begins with ~"
        ) from None


def user_name() -> str:
    """Return the effective user's name, or the user id if it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
