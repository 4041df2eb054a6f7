"""`infer --trace` and `stats --run`, in real processes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import tracing
from surfw.cli.traced import writing_trace
from surfw.models import StreamingModel
from tests.checkpoints import save_llama
from tests.cli.run import complaint, surfw
from tests.servers import serve


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a LLaMA in its default store, in two forms."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "tiny")
    done = surfw(home, "chunk", str(home / "tiny"), "--codec", "lossless")
    assert done.returncode == 0, done.stderr
    return home


def traced(home: Path, source: str, *options: str) -> dict[str, Any]:
    """The trace of a run with this source."""
    file = home / "run.json"
    made = ("--prompt", "Weights", "--max-new-tokens", "3", "--cache-layers", "1", "--trace", str(file))
    done = surfw(home, "infer", source, "--model", "tiny", *made, *options)
    assert done.returncode == 0, done.stderr
    trace: dict[str, Any] = json.loads(file.read_text())
    return trace


def check_tiles(trace: dict[str, Any]) -> None:
    """The main thread's spans do not overlap, and cover all of the time but 2 %."""
    main = sorted((e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 1), key=lambda e: e["ts"])
    for one, following in pairwise(main):
        assert one["ts"] + one["dur"] <= following["ts"] + 0.01
    covered = sum(e["dur"] for e in main) / 1e6
    assert 0.98 <= covered / trace["otherData"]["wall_seconds"] <= 1.0001


def test_a_trace_tiles_the_time_of_a_run(home: Path) -> None:
    store = traced(home, str(home / "store"), "--codec", "lossless")
    with serve(home / "store") as served:
        over_server = traced(home, served.url)
    for trace in (store, over_server):
        check_tiles(trace)
        spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
        layers = {e["args"]["layer"] for e in spans if e["cat"] == "compute" and "layer" in e["args"]}
        assert {f"model.layers.{number}" for number in range(4)} <= layers
        assert [e["args"]["token"] for e in spans if e["cat"] == "token"] == [0, 1, 2]
        kinds = {e["cat"] for e in spans}
        assert {"connect", "import", "prepare", "fetch", "verify", "compute"} <= kinds  # and "stall", if it had to wait
        background = {e["cat"] for e in spans if e["tid"] > 2}
        assert background <= {"fetch", "verify", "decode", "copy"}
    assert any(e.get("cat") == "decode" for e in store["traceEvents"])


def test_a_trace_is_shown(home: Path) -> None:
    traced(home, str(home / "store"))
    facts = json.loads(surfw(home, "stats", "--run", str(home / "run.json"), "--json").stdout)
    assert facts["tokens"] == 3
    assert [one["passes"] for one in facts["layers"]].count(3) == len(facts["layers"])
    shown = surfw(home, "stats", "--run", str(home / "run.json")).stdout
    assert "3 tokens" in shown
    assert "waiting for weights" in shown
    assert "model.layers.3" in shown


def test_copies_to_a_device_have_their_track(home: Path) -> None:
    with (
        tracing.recording(tracing.Trace()) as trace,
        StreamingModel.open(home / "store", "tiny", device="simulated", cache_size=1) as model,
    ):
        model(torch.tensor([[1, 2, 3]]))
    layers = {f"model.layers.{number}" for number in range(4)}
    copies = [one for one in trace.others if one.kind == "copy"]
    assert {one.about["tier"] for one in copies} == {"device"}
    assert layers <= {one.about["layer"] for one in copies}
    assert layers <= {one.about.get("layer") for one in trace.main if one.kind == "compute"}


def test_a_file_that_cannot_be_written_is_refused_at_once(home: Path) -> None:
    said = complaint(surfw(home, "infer", str(home / "nosuch"), "a", "--trace", str(home / "no" / "run.json")))
    assert "run.json (--trace) cannot be written: No such file or directory" in said
    clash = surfw(home, "stats", "--watch", "--run", "x")
    assert clash.returncode == 2
    assert "--run does not go with --watch" in clash.stderr


def test_what_a_run_fails_with_is_not_said_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="something else"), writing_trace(tmp_path / "run.json"):
        raise OSError("something else")
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"], "it is written all the same"
