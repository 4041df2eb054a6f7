"""A private store for a checkpoint that is served in place, made by a child process: this one never loads torch."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from surfw import errors
from surfw.config import display_url
from surfw.errors import ConfigurationError, SurfwError


async def make_private_store(place: str, options: Mapping[str, Any]) -> Path:
    """The folder of a store whose one model is the checkpoint at a place: a folder or a storage URL.

    Raises:
        SurfwError: what the child process raised, or that it did not come to its end.
    """
    command = (sys.executable, "-P", "-m", "surfw.chunking.in_place")  # -P: no module is taken from the current folder
    try:
        work = json.dumps({"place": place, "options": dict(options)}).encode()
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(
            f"the storage options of {display_url(place)} cannot be handed to another process ({exc}); give plain "
            "values, or run surfw chunk --in-place, and serve that store"
        ) from exc
    # In a session of its own: a terminal's Ctrl-C ends this process, which then ends that one.
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    try:
        written, _ = await child.communicate(work)
    except BaseException:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        raise
    try:
        answer = json.loads(written)
    except ValueError as exc:
        raise SurfwError(
            f"the process that reads {display_url(place)} ended with exit code {child.returncode}; what it wrote "
            "before says why, or run surfw chunk --in-place, and serve that store"
        ) from exc
    if "store" in answer:
        return Path(answer["store"])
    kind: type[SurfwError] = getattr(errors, answer["error"], SurfwError)
    raise (kind if kind.__init__ is SurfwError.__init__ else SurfwError)(answer["text"])
