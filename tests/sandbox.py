"""Run the commands of the pages in a folder with the files that they name, and with their own home and port.

Names on the pages that stand for the reader's own things are replaced:

- `./my-model` is the model that comes with surfw, and `./my-fine-tune` the same with other weights in one layer;
- `./my-adapter` is a LoRA adapter over `./my-model`, in peft's format;
- `ws://host:8765` is a server on the sandbox's port, and so is the default port, through `SURFW_PORT`;
- `s3://bucket` is a bucket, if an S3 server is given;
- `surfw serve` runs in the background, as in another terminal, until the page ends or serves something else.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import save_file

from surfw.checkpoint import demo_checkpoint
from tests.cli.run import SURFW, environment
from tests.services import warm
from tests.services.processes import free_port

NEEDS_A_NETWORK = re.compile(r"(python3 -m venv|(\S*/)?pip install|git clone) ")
"""Commands that install something; they are not run here. `.ci/run` runs the README's test command."""
_LIGHT = {"stats", "config", "list", "show", "rm", "prune", "verify", "--list", "--remove", "--prune", "--help", "-h"}
"""Words of commands that do not need torch."""
_CONTINUED = re.compile(r"\\\n\s*")
_REVISION = re.compile(r"\b\d+ \d{19} \d+\b")
"""Identifies the contents of a local file."""
_POLL_SECONDS = 0.05


def write_adapter(folder: Path, rank: int = 4) -> None:
    """Write an adapter of one module of the model that comes with surfw; its zeros change no answer."""
    folder.mkdir()
    module = "base_model.model.model.layers.3.self_attn.q_proj"
    width = json.loads((demo_checkpoint() / "config.json").read_text())["hidden_size"]
    shapes = {"lora_A": (rank, width), "lora_B": (width, rank)}
    tensors = {f"{module}.{role}.weight": np.zeros(shape, np.float32) for role, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@dataclass(frozen=True)
class Done:
    """A command's output, stdout and stderr together, and its exit code."""

    shown: str
    code: int


def commands(text: str) -> list[str]:
    """Return the commands of an `sh` block, without comments."""
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in _CONTINUED.sub(" ", text).splitlines())
    return [line for line in lines if line]


class Sandbox:
    """A folder for the commands of one page, empty at first."""

    def __init__(self, folder: Path, *, places: Mapping[str, str] | None = None, **variables: str) -> None:
        """`places` replaces words of the commands; all commands get the variables."""
        self.folder = folder
        port = free_port()
        self._ready = f"http://127.0.0.1:{port}/readyz"
        self._places = {"host:8765": f"127.0.0.1:{port}", **(places or {})}
        self._shown = {
            str(folder / "home"): "~",
            str(folder): "/work",
            f":{port}": ":8765",
            f"port {port}": "port 8765",
        }
        self._environment = environment(
            folder / "home", HOME=str(folder / "home"), SURFW_PORT=str(port), NO_COLOR="1", **variables
        )
        self._exported: dict[str, str] = {}
        self._server: warm.Process | None = None
        (folder / "home").mkdir()
        for name in ("my-model", "my-fine-tune"):
            shutil.copytree(demo_checkpoint(), folder / name)
        write_adapter(folder / "my-adapter")
        weights = folder / "my-fine-tune" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")

    def __enter__(self) -> Self:
        """Start no process yet."""
        return self

    def new_shell(self) -> None:
        """Forget the variables that commands have set."""
        self._exported.clear()

    def stop(self) -> None:
        """End the background processes."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait(20)
            self._server = None

    def __exit__(self, *_: object) -> None:
        """End the background processes."""
        self.stop()

    def run(self, command: str) -> Done:
        """Run a command to its end, or `surfw serve` until it is ready."""
        for written, place in self._places.items():
            command = command.replace(written, place)
        command = command.removeprefix("export ")
        done = Done("", 0)
        for stage in re.split(r" \| (?=surfw )", command):
            words = shlex.split(stage)
            while words and "=" in words[0]:
                self._exported |= dict([words.pop(0).split("=", 1)])
            if not words:
                continue
            if words[:2] == ["surfw", "serve"] and "--help" not in words:
                done = self._serve(words[1:])
            elif words[0] == "surfw":
                done = self._surfw(words[1:], done.shown)
            else:
                done = self._other(stage, done.shown)
        return Done(self._there(done.shown), done.code)

    def _surfw(self, arguments: list[str], told: str) -> Done:
        process = warm.start(
            [SURFW, *arguments], modules=warm.COMMANDS if _LIGHT & set(arguments) else warm.MODELS, cwd=self.folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self._environment | self._exported,
        )  # fmt: skip
        shown, _ = process.communicate(told, timeout=120)
        return Done(shown, process.wait())

    def _other(self, stage: str, told: str) -> Done:
        done = subprocess.run(
            ["sh", "-c", stage], cwd=self.folder, env=self._environment | self._exported, input=told,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        return Done(done.stdout, done.returncode)

    def _serve(self, arguments: list[str]) -> Done:
        before, log = self._server, self.folder / "server.log"
        with log.open("w") as output:
            server = warm.start(
                [SURFW, *arguments], modules=warm.COMMANDS, cwd=self.folder, env=self._environment | self._exported,
                stdin=subprocess.DEVNULL, stdout=output.fileno(), stderr=subprocess.STDOUT,
            )  # fmt: skip
        while server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self._ready, timeout=10) as answer:
                if answer.status == 200 and before is None:
                    self._server = server
                    return Done("", 0)
            time.sleep(_POLL_SECONDS)
        return Done(log.read_text(), server.wait())

    def _there(self, shown: str) -> str:
        """Return the output with this machine's places and ports replaced."""
        for place, written in self._shown.items():
            shown = shown.replace(place, written)
        return _REVISION.sub("INODE TIME SIZE", shown)
