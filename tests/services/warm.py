"""Processes of Python that begin where their imports end: forked from one that has imported everything already.

A command that imports torch, transformers and the code of a model takes four seconds of a CPU before it begins. Where
that is not what a test is about, the test runs its command here, as with `subprocess`: in a process of its own, with
streams, environment, working directory, session and signals of its own, which ends as every interpreter does.

Its modules are those of its ancestor, as they were after their import. What a module reads from the environment at its
import (huggingface_hub does: `HF_HOME`) is what the ancestor's environment had; so tests about imports, closed standard
streams, or the memory of a process start theirs with `subprocess`.

The ancestor runs this file as a script. When it forks it has one thread and has done nothing but imports, so that no
lock is held and no thread pool is lost. It ends with the process of the tests, and with it all that it has forked.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import types
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Self

COMMANDS = (
    "surfw.cli.main", "surfw.cli.app", "surfw.client", "surfw.storage.housekeeping.details", "surfw:WeightServer",
    "surfw:FilesystemBackend", "surfw:Housekeeping", "websockets.asyncio.client", "fsspec.implementations.local",
    "pydantic:TypeAdapter", "pydantic.types", "rich.live", "rich.progress",
)  # fmt: skip
"""What `serve`, `stats`, `config` and the housekeeping import, without torch: `module`, or `module:name`."""
MODELS = (
    *COMMANDS, "numcodecs",
    *(f"surfw:{name}" for name in ("ModelChunker", "StreamingModel", "StreamingLlamaModel", "StreamingBertModel")),
    *(f"transformers:{name}" for name in ("AutoModel", "AutoTokenizer", "BertForMaskedLM", "LlamaForCausalLM")),
)  # fmt: skip
"""What all others import: torch, transformers, and the code of two kinds of model."""
_MESSAGE_BYTES = 1 << 18


class Process:
    """A process that `start` has started; as a `subprocess.Popen` of text.

    Attributes:
        pid: its process id, which is also that of its session and process group.
        returncode: its exit code, or minus the signal that ended it; None until `poll` or `wait` found it ended.
    """

    def __init__(self, args: Sequence[str], status: IO[str], streams: Sequence[IO[str] | None]) -> None:
        self.args = list(args)
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = streams
        self._status = status
        told = status.readline()
        if not told:
            raise RuntimeError(f"the process that forks has ended, and cannot start {self.args}")
        self.pid = int(told)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in so many seconds.
        """
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _look(self, seconds: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
                told = self._status.readline()
                self._status.close()
                self.returncode = int(told) if told else -signal.SIGKILL
            return self.returncode

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002
        """Write to its stdin, read what it writes, and wait for its end.

        Raises:
            subprocess.TimeoutExpired: it did not end in so many seconds.
        """
        said = dict.fromkeys(("stdout", "stderr"), "")

        def read(name: str, stream: IO[str]) -> None:
            said[name] = stream.read()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name in said
            if (stream := getattr(self, name)) is not None and not stream.closed
        ]
        for reader in readers:
            reader.start()
        if self.stdin is not None and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(input or "")
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        self._close()
        return said["stdout"], said["stderr"]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.wait()

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Ancestor:
    """The process that forks. It imports when the first process is asked of it."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Threads of OpenBLAS, which numpy and scipy start at their import, are none of ours at a fork. The models
            # of these processes are so small that a second thread of torch costs more than it computes.
            env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=env,
            )  # fmt: skip

    def start(
        self,
        args: Sequence[str],
        streams: Sequence[int | None],
        env: Mapping[str, str],
        cwd: str | Path | None,
        *,
        controls: bool,
    ) -> Process:
        """Start a process; see `start`."""
        ours: list[IO[str] | None] = []
        with contextlib.ExitStack() as theirs:

            def end(of: int) -> int:
                theirs.callback(os.close, of)
                return of

            passed = []
            for number, stream in enumerate(streams):
                if stream == subprocess.PIPE:
                    reading, writing = os.pipe()
                    passed.append(end(writing if number else reading))
                    ours.append(open(reading if number else writing, "r" if number else "w"))  # noqa: SIM115, PTH123
                    continue
                ours.append(None)
                if stream == subprocess.DEVNULL:
                    passed.append(end(os.open(os.devnull, os.O_RDWR)))
                elif stream == subprocess.STDOUT:
                    passed.append(passed[1])
                else:
                    passed.append(number if stream is None else stream)
            reading, writing = os.pipe()
            passed.append(end(writing))
            job = _Job(list(args), dict(env), str(cwd or Path.cwd()), controls)
            socket.send_fds(self._control, [json.dumps(job._asdict()).encode()], passed)
        return Process(args, open(reading), ours)  # noqa: PTH123

    def end(self) -> None:
        """End it, and whatever it has forked that still runs."""
        self._control.close()
        self._process.wait()


@functools.cache
def _ancestor(modules: Sequence[str]) -> Ancestor:
    ancestor = Ancestor(modules)
    atexit.register(ancestor.end)
    return ancestor


def start(
    args: Sequence[str],
    *,
    modules: Sequence[str] = MODELS,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    controls: bool = False,
) -> Process:
    """Start a process as `subprocess.Popen(…, text=True, start_new_session=True)` would.

    Args:
        args: `sys.executable` with its options -W and then -c, -m or a file, and arguments; or a Python script alone.
        modules: `MODELS` or `COMMANDS`: what it finds imported.
        stdin: as for `Popen`, as are those that follow.
        stdout: …
        stderr: …
        env: …
        cwd: …
        controls: its stdin is a terminal, which is to be the one that controls it.
    """
    variables = os.environ if env is None else env
    return _ancestor(modules).start(args, (stdin, stdout, stderr), variables, cwd, controls=controls)


def run(
    args: Sequence[str],
    *,
    modules: Sequence[str] = MODELS,
    input: str | None = None,  # noqa: A002 - as subprocess names it
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float | None = 120,
) -> "subprocess.CompletedProcess[str]":
    """Run a process to its end, as `subprocess.run(…, capture_output=True, text=True)` would.

    Raises:
        subprocess.TimeoutExpired: it did not end in so many seconds, and was killed.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    process = start(
        args, modules=modules, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd
    )
    try:
        out, err = process.communicate(input, timeout)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


class _Job(NamedTuple):
    """What a forked process does."""

    args: list[str]
    env: dict[str, str]
    cwd: str
    controls: bool


def _fork_on_demand(control: socket.socket) -> _Job | None:
    """Fork for each message; returns the job in the process that has it to do, and None in the ancestor, at its end."""
    ends: dict[int, tuple[int, int]] = {}
    while True:
        for ready in select.select([control.fileno(), *ends], [], [])[0]:
            if ready in ends:
                pid, status = ends.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, f"{code}\n".encode())
                os.close(status)
                continue
            data, fds, *_ = socket.recv_fds(control, _MESSAGE_BYTES, 4)
            if not data:
                for pid, _ in ends.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                return None
            *streams, status = fds
            assert [*Path("/proc/self/task").iterdir()][1:] == [], "no other thread may be there at a fork"
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.write(status, f"{os.getpid()}\n".encode())  # now it can be signalled as a group
                control.close()
                for fd in (status, *ends, *(one for _, one in ends.values())):
                    os.close(fd)
                _take(streams)
                return _Job(**json.loads(data))
            for fd in streams:
                os.close(fd)
            ends[os.pidfd_open(pid)] = pid, status


def _take(streams: Sequence[int]) -> None:
    """Have these as the standard streams, as an interpreter that starts makes them."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115
        text = io.TextIOWrapper(
            stream, encoding="utf-8", errors="backslashreplace" if number == 2 else "strict",
            line_buffering=number == 2 or os.isatty(number),
        )  # fmt: skip
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _do(job: _Job) -> None:
    """Go on as a process that was started with these arguments does."""
    if job.controls:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.env)
    words = job.args[1:] if Path(job.args[0]).name.startswith("python") else list(job.args)
    while words[0] == "-W":
        action, _, category = words[1].partition("::")
        warnings.filterwarnings(action, category=getattr(sys.modules["builtins"], category))  # type: ignore[arg-type]
        words = words[2:]
    kind, here = words[0], types.ModuleType("__main__")
    sys.modules["__main__"] = here
    if kind == "-m":
        sys.argv[:] = words[1:]
        sys.path.insert(0, job.cwd)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    if kind == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        sys.path.insert(0, "")
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv[:] = words
        sys.path.insert(0, str(Path(kind).parent))
        here.__file__ = kind
        code = compile(Path(kind).read_bytes(), kind, "exec")
    exec(code, here.__dict__)


def _end(code: int) -> None:
    """End as an interpreter does, but leave what was imported to the system: to take it apart takes 0.3 s of a CPU."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)  # the interpreter says so, with an exit code of its own
    os._exit(code)


def _main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the tests, with which this one ends
    for place in sys.argv[2:]:
        module, _, name = place.partition(":")
        getattr(importlib.import_module(module), name or "__name__")
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch's own take its operators apart
    gc.collect()
    gc.freeze()
    job = _fork_on_demand(control)
    if job is None:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _do(job)
    except SystemExit as exc:
        if isinstance(exc.code, str) or "-W" in job.args:
            raise
        _end(int(exc.code or 0))
    if "-W" not in job.args:
        _end(0)


if __name__ == "__main__":
    _main()
