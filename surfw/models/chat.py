"""Renders chat templates, which are untrusted programs that come with a model, in a process that can be killed.

A template may loop or produce output endlessly within a single Python operation that cannot be interrupted. It is
therefore rendered in a separate process, by transformers' own code, with limits on time, memory and output.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from surfw.config import GB, MB, format_size
from surfw.errors import ConfigurationError

_CPU_SECONDS = 5
_SECONDS = 20.0
"""Wall-clock limit; longer than the CPU limit, because the machine may be busy."""

_MEMORY_BYTES = GB
_TEXT_BYTES = 16 * MB
"""About four million tokens of English; tokenising takes many times the memory of the text."""

_RENDERER = Path(__file__).with_name("chat_renderer.py")
_RAW = "give the prompt as it is (raw)"


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, where: str, is_asked: bool = True
) -> dict[str, Any]:
    """Encode a conversation to the model's inputs.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: each with `role` and `content`.
        where: names the model in errors.
        is_asked: whether the model is to answer; False for a complete conversation to be scored.

    Raises:
        ConfigurationError: the template refuses the messages, or takes too long, or writes too much.
    """
    untyped: Any = tokenizer
    options: dict[str, Any] = {"add_generation_prompt": is_asked, "return_tensors": "pt", "return_dict": True}
    if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
        variables = untyped.special_tokens_map | {"add_generation_prompt": is_asked}
        text = _render(untyped.get_chat_template(), messages, variables, where)
        options |= {"chat_template": "{{ rendered }}", "rendered": text}
    return dict(untyped.apply_chat_template(list(messages), **options))


def _render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], where: str) -> str:
    """Render the messages with the template; see `chat_renderer` for the protocol with the process."""
    work = {
        "transformers": transformers.__path__[0],
        "path": sys.path,
        "memory_bytes": _MEMORY_BYTES,
        "cpu_seconds": _CPU_SECONDS,
        "template": template,
        "messages": messages,
        "variables": variables,
    }
    command = [sys.executable, "-I", str(_RENDERER)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each thread of numpy's would take memory
    try:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError as exc:
        raise ConfigurationError(
            f"the chat template of {where} could not be rendered: no process of Python ({sys.executable!r}) can be "
            f"started for it: {exc.strerror or exc}; {_RAW}"
        ) from exc
    with started as process:
        assert process.stdin is not None
        assert process.stdout is not None
        end = threading.Timer(_SECONDS, process.kill)
        end.start()
        try:
            with suppress(BrokenPipeError):  # it has exited: its output or exit code says why
                process.stdin.write(json.dumps(work, default=str).encode())
                process.stdin.close()
            said = process.stdout.read(_TEXT_BYTES + 2)
        finally:
            process.kill()
            end.cancel()
            code = process.wait()
    kind, text = said[:1], said[1:]
    if len(text) > _TEXT_BYTES:
        raise _endless(where, f"makes more than {format_size(_TEXT_BYTES)} of text")
    if kind == b"T":
        return text.decode(errors="surrogatepass")
    if kind == b"E":
        raise ConfigurationError(
            f"the chat template of {where} refuses the prompt ({text.decode(errors='replace')[:240]}); leave the "
            f"system message out, or {_RAW}"
        )
    if kind == b"M":
        raise _endless(where, f"needs more than {format_size(_MEMORY_BYTES)} of memory")
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        raise _endless(where, f"was not done after {_CPU_SECONDS} s of computing")
    raise ConfigurationError(
        f"the chat template of {where} could not be rendered: the process that does it ended with exit code {code}; "
        f"{_RAW}"
    )


def _endless(where: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"the chat template of {where} {what}; it is broken, or hostile: {_RAW}")
