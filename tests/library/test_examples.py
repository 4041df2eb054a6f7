"""Every example runs as its first lines say, in a separate process without a hub."""

import asyncio
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import openai
import pytest
import torch

from surfw import StreamingModel
from surfw.checkpoint import demo_checkpoint
from tests.cli.run import surfw
from tests.servers import serve
from tests.services import warm
from tests.services.s3 import S3Service

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TESTED = {
    "custom_backend", "custom_model", "fastapi_app", "fsdp_training", "image_and_sound", "inference_example",
    "llama_example", "llama_s3_example", "lora_training", "mixture", "openai_server",
}  # fmt: skip
START = """
import runpy, sys, transformers
transformers.logging.set_verbosity_warning()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs an example as Python runs a script, with transformers' usual messages."""
SENTENCE = "Weight streaming is a way to run a model whose weights do not fit into memory."


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """Start the process that starts them before the first test, so that it does not count as left behind."""
    for modules in (warm.MODELS, warm.COMMANDS):
        warm.run([sys.executable, "-c", ""], modules=modules)


def run(tmp_path: Path, name: str, *arguments: str, **environment: str) -> str:
    """Return an example's output; libraries must not print notices about surfw's calls."""
    environment = {"TRANSFORMERS_VERBOSITY": "warning"} | environment
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", START, str(EXAMPLES / f"{name}.py"), *arguments]
    done = warm.run(command, cwd=tmp_path, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "deprecated" not in done.stderr
    return done.stdout


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_a_llama(tmp_path: Path) -> None:
    shown = run(tmp_path, "llama_example")
    assert shown.startswith("demo: 8 layers, 3.5 MB in 10 chunks\n")
    assert SENTENCE in shown
    assert re.search(r"\n\d+% hits with 3 layers kept, [\d.]+ s stalled, [\d.]+ s computing\n$", shown)


def test_a_lora_that_is_trained(tmp_path: Path) -> None:
    shown = run(tmp_path, "lora_training")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+), ", shown)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 5
    assert "Weights come by sea." in shown


def test_a_llama_of_ones_own(tmp_path: Path) -> None:
    from tests.checkpoints import save_llama

    assert run(tmp_path, "llama_example", str(save_llama(tmp_path / "mine"))).startswith("mine: 4 layers, ")


def test_a_model_that_two_ranks_train(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "fsdp_training.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)\n", done.stdout)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 5
    assert re.search(r"rank 0 read [\d.]+ MB of 3\.\d MB\n", done.stdout)
    assert "Weights come by sea." in done.stdout
    assert (tmp_path / "trained" / ".metadata").exists()


def test_a_mixture(tmp_path: Path) -> None:
    small = ("--layers", "2", "--experts", "8", "--chosen", "2", "--hidden", "128", "--width", "32")
    assert re.fullmatch(r"mine: [\d.]+ GB\n", run(tmp_path, "mixture", "mine", *small))
    with StreamingModel.open(tmp_path / "mine") as model:
        assert len(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)[0]) == 6


def test_a_llama_in_s3(tmp_path: Path, s3: S3Service) -> None:
    shown = run(
        tmp_path,
        "llama_s3_example",
        SURFW_EXAMPLE_BUCKET=s3.bucket(),
        SURFW_EXAMPLE_ENDPOINT=s3.endpoint,
        AWS_ACCESS_KEY_ID=s3.key,
        AWS_SECRET_ACCESS_KEY=s3.secret,
    )
    assert shown.startswith("demo is in s3://surfw-")
    assert SENTENCE in shown


def test_inference(tmp_path: Path) -> None:
    shown = run(tmp_path, "inference_example")
    assert "demo: LlamaForCausalLM with 8 layers\nwarm: model.layers.0, model.layers.1, model.layers.2\n" in shown
    assert "twice the same: True\n" in shown
    assert re.search(r"\ncache: [1-9]\d* hits, [1-9]\d* misses, 3\.\d MB\ntimes: 4 inferences of \d+ ms\n$", shown)


def test_models_that_take_no_text(tmp_path: Path) -> None:
    assert re.fullmatch(r"image: LABEL_[012]\nsound: begins with token \d+\n", run(tmp_path, "image_and_sound"))


def test_a_backend_of_ones_own(tmp_path: Path) -> None:
    shown = run(tmp_path, "custom_backend")
    assert shown.startswith("The dictionary holds ")
    assert SENTENCE in shown


def test_a_model_class_of_ones_own(tmp_path: Path) -> None:
    assert run(tmp_path, "custom_model") == (
        "checkpoint: 6 layers in 8 chunks\nequal to the resident model: True; similar to itself: 1.000\n"
    )


@contextmanager
def service(tmp_path: Path, name: str) -> Iterator[str]:
    """An example that serves HTTP, as its first lines say; its stderr has no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"{name}:app", "--app-dir", str(EXAMPLES), "--port", str(port)]
    process = warm.start(command, cwd=tmp_path, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "Uvicorn running on" in line:
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) in {0, -signal.SIGINT}
        process.stderr.close()
    assert "Traceback" not in rest, rest


def test_a_web_service(tmp_path: Path) -> None:
    with service(tmp_path, "fastapi_app") as url:
        with urllib.request.urlopen(
            f"{url}/generate?prompt=Weight+streaming+is&max_new_tokens=40", timeout=60
        ) as answer:
            assert f"Weight streaming is{answer.read().decode()}".startswith(SENTENCE)
        with urllib.request.urlopen(f"{url}/stats", timeout=60) as answer:
            assert b'"total_inferences":1' in answer.read()
        address = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(address) as caller:  # hang up during the answer
            caller.sendall(b"GET /generate?prompt=A&max_new_tokens=200 HTTP/1.1\r\nHost: x\r\n\r\n")
            caller.recv(1)
        with urllib.request.urlopen(f"{url}/stats", timeout=60) as answer:
            assert answer.status == 200


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_container_starts_from_weights_that_it_only_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measurement of cold starts runs once, with processes that have their imports done."""
    here = EXAMPLES / "serverless"
    cold_start = runpy.run_path(str(here / "cold_start.py"))["main"].__globals__
    checkpoint, caches = str(demo_checkpoint()), list[tuple[dict[str, bytes], dict[str, bytes]]]()
    time_service = cold_start["time_service"]

    def timed(source: str, cache: Path) -> float:
        before = _contents(cache)
        seconds = time_service(source, cache)
        caches.append((before, _contents(cache)))
        return float(seconds)

    def start(command: list[str], *, env: dict[str, str]) -> warm.Process:
        started.append((command, env))
        return warm.start(command, env=env)

    def run(command: list[str], **_: object) -> None:
        done = warm.run(command)
        assert done.returncode == 0, done.stderr

    started: list[tuple[list[str], dict[str, str]]] = []
    assert surfw(tmp_path, "chunk", checkpoint, "--name", "toy", "-q").returncode == 0
    monkeypatch.setitem(cold_start, "subprocess", SimpleNamespace(Popen=start, run=run, PIPE=subprocess.PIPE))
    monkeypatch.setitem(cold_start, "time_service", timed)
    with serve(tmp_path / "store") as server:
        command = ["cold_start.py", server.url, Path(checkpoint).as_uri(), "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", command)
        cold_start["main"]()
    shown = capsys.readouterr().out
    for way in ("warm disk cache, read-only home", "download, then transformers"):
        assert re.search(rf"^{way}: first token after [\d.]+ s", shown, re.MULTILINE)
    ((before, after),) = caches
    assert before == after
    ((command, variables),) = started
    assert not Path(variables["HOME"]).parent.is_dir()

    dockerfile = (here / "Dockerfile").read_text()
    (lines,) = re.findall(r"^ENV ((?:.*\\\n)*.*)", dockerfile, re.MULTILINE)
    given = dict(one.split("=", 1) for one in lines.replace("\\\n", " ").split())
    assert {name for name in given if name.startswith("SURFW_")} == {
        "SURFW_SOURCE", "SURFW_MODEL", "SURFW_CACHE_DIR", "SURFW_OFFLINE"
    }  # fmt: skip
    assert {"SURFW_CACHE_DIR", "SURFW_OFFLINE", "SURFW_SOURCE"} <= set(variables)
    for name in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        assert all((EXAMPLES.parent / one).exists() for one in name.split())
    (torch,) = re.findall(r"torch==\S+", dockerfile)
    assert f"\n{torch}\n" in (EXAMPLES.parent / ".ci" / "tried.txt").read_text()


def test_clients_of_openai(tmp_path: Path) -> None:
    """OpenAI's client: sixteen concurrent streams, one that hangs up, and requests for things that do not exist."""

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        pieces = await client.completions.create(
            model="demo", prompt="Weight streaming is", max_tokens=30 + index % 3, stream=True
        )
        text, ends = "", []
        async for piece in pieces:
            text += piece.choices[0].text
            ends.append(piece.choices[0].finish_reason)
            if index == 5:
                await pieces.close()
                return ""
        assert ends[-1] in {"length", "stop"}
        assert set(ends[:-1]) == {None}
        return f"Weight streaming is{text}"

    async def main(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            texts = await asyncio.gather(*(ask(client, index) for index in range(16)))
            assert len({text for text in texts if text}) <= 3
            assert all(SENTENCE.startswith(text[:60]) for text in texts)
            whole = await client.completions.create(model="demo", prompt="Weight streaming is", max_tokens=30)
            assert f"Weight streaming is{whole.choices[0].text}" == texts[0]
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 30
            said = await client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Weight streaming is"}], max_tokens=30, stop=" run"
            )
            assert said.choices[0].finish_reason == "stop"
            assert said.choices[0].message.content == " a way to"
            sampled = [
                await client.completions.create(model="demo", prompt="A", max_tokens=9, temperature=1.0, seed=7)
                for _ in range(2)
            ]
            assert sampled[0].choices[0].text == sampled[1].choices[0].text
            with pytest.raises(openai.NotFoundError, match="this server has demo"):
                await client.completions.create(model="other", prompt="A")
            with pytest.raises(openai.UnprocessableEntityError):
                await client.completions.create(model="demo", prompt="A", max_tokens=0)

    with service(tmp_path, "openai_server") as url:
        asyncio.run(main(url))
