"""The commands do what the pages say, in real processes."""

import json
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from surfw.config import parse_size
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, environment, surfw
from tests.conftest import require
from tests.servers import serve

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a LLaMA and a BERT in its default store."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "tiny")
    save_bert(home / "bert")
    for name in ("tiny", "bert"):
        done = surfw(home, "chunk", str(home / name))
        assert done.returncode == 0, done.stderr
    return home


def test_chunk_says_what_it_made(home: Path, tmp_path: Path) -> None:
    done = surfw(tmp_path, "chunk", str(home / "tiny"), "--name", "org/copy", "--json")
    facts = json.loads(done.stdout)
    assert facts["model"] == "org/copy"
    assert facts["layers"] == 4
    assert facts["payload_bytes"] == sum(chunk["bytes"] for chunk in facts["chunks"])
    shown = json.loads(surfw(tmp_path, "show", "org/copy", "--json").stdout)
    shared = {"model", "name", "class", "class_name", "dtype", "payload_bytes", "layers", "store", "digest"}
    assert {key: facts[key] for key in shared} == {key: shown[key] for key in shared}
    parts = [{key: one[key] for key in ("name", "kind", "tensors", "payload_bytes")} for one in facts["chunks"]]
    assert [{key: one[key] for key in parts[0]} for one in shown["parts"]] == parts
    assert (tmp_path / "store" / "models" / "org" / "copy.json").is_file()


def test_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    facts = json.loads(surfw(tmp_path, "chunk", str(home / "tiny"), "--dry-run", "--json").stdout)
    assert 0 < facts["least_budget_bytes"] < facts["payload_bytes"] + 3 * max(one["bytes"] for one in facts["chunks"])
    assert facts["kv_token_bytes"] == 4 * 2 * 2 * 16 * 4, "layers, keys and values, heads, numbers of each, bytes"
    shown = surfw(tmp_path, "chunk", str(home / "tiny"), "--dry-run").stdout
    assert "model.layers.3" in shown
    assert "Nothing was written" in shown
    in_place = surfw(tmp_path, "chunk", str(home / "tiny"), "--dry-run", "--in-place", "--dtype", "bfloat16")
    assert "Nothing was written" in in_place.stdout, "what has another precision is converted on arrival"
    assert not (tmp_path / "store").exists()


def test_infer_json_has_the_promised_keys(home: Path) -> None:
    done = surfw(home, "infer", "--source", str(home / "store"), "--model", "tiny", "--prompt", "Weights", "--json")
    facts = json.loads(done.stdout)
    assert facts.keys() == {
        "model", "source", "codec", "text", "token_ids", "prompt_tokens", "new_tokens", "load_seconds", "ttft_seconds",
        "tpot_seconds", "tokens_per_second", "cache", "time", "plan", "peak_rss_bytes",
    }  # fmt: skip
    assert facts["cache"].keys() == {
        "hits", "misses", "prefetched", "stalls", "hit_rate", "resident_bytes", "fetched_bytes", "decoded_bytes",
        "copied_bytes", "refetched_blocks", "kv_cache_bytes",
    }  # fmt: skip
    assert facts["plan"].keys() == {
        "codec", "limited_by", "budget_bytes", "reserved_bytes", "pinned", "streamed", "bytes_per_pass",
    }  # fmt: skip
    assert facts["time"].keys() == {"stall_seconds", "compute_seconds", "decode_seconds", "copy_seconds"}
    assert facts["new_tokens"] == len(facts["token_ids"]) > 1
    cache = facts["cache"]
    assert cache["misses"] == cache["prefetched"] + cache["stalls"]
    assert cache["hit_rate"] == pytest.approx(cache["hits"] / (cache["hits"] + cache["misses"]))
    assert 0 < facts["ttft_seconds"] < facts["new_tokens"] / facts["tokens_per_second"]
    assert facts["peak_rss_bytes"] > parse_size("50MB")


def test_infer_is_the_same_over_the_wire_and_from_the_store(home: Path) -> None:
    arguments = ["infer", "--model", "tiny", "--prompt-ids", "5,6,7", "--ignore-eos", "--max-new-tokens", "7", "--json"]
    with serve(home / "store") as served:
        runs = [
            json.loads(surfw(home, *arguments, "--source", source, "--cache-layers", layers).stdout)
            for source in (served.url, str(home / "store"))
            for layers in ("1", "4")
        ]
    assert {tuple(run["token_ids"]) for run in runs} == {tuple(runs[0]["token_ids"])}
    assert runs[0]["new_tokens"] == 7
    assert runs[0]["prompt_tokens"] == 3
    assert runs[0]["cache"]["fetched_bytes"] > runs[1]["cache"]["fetched_bytes"]


def test_plain_output(home: Path) -> None:
    store = str(home / "store")
    done = surfw(home, "infer", "--source", store, "--model", "tiny", "--prompt", "-", stdin="Weights arrive")
    facts = json.loads(
        surfw(home, "infer", "--source", store, "--model", "tiny", "--prompt", "Weights arrive", "--json").stdout
    )
    assert done.stdout == facts["text"] + "\n"
    assert "tok/s" in done.stderr
    assert "waited for the disk" in done.stderr
    quiet = surfw(home, "infer", "--source", store, "--model", "tiny", "--prompt", "Weights arrive", "-q")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")
    ids = surfw(
        home, "infer", "--source", store, "--model", "tiny", "--prompt-ids", "5,6", "-q", "--max-new-tokens", "3"
    )
    assert len(ids.stdout.split()) == 3


def test_sampling_is_seeded_and_greedy_is_the_default(home: Path) -> None:
    def text(*options: str) -> str:
        arguments = ["--source", str(home / "store"), "--model", "tiny", "--prompt", "Weights", "-q", *options]
        return surfw(home, "infer", *arguments).stdout

    greedy, again = text(), text()
    seeded, same, other = (text("--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2"))
    assert greedy == again
    assert seeded == same
    assert len({greedy, seeded, other}) == 3


def test_stop_texts_end_the_generation(home: Path) -> None:
    arguments = ["--source", str(home / "store"), "--model", "tiny", "--prompt", "Weights", "--ignore-eos", "--json"]
    free = json.loads(surfw(home, "infer", *arguments).stdout)
    middle = free["text"][len(free["text"]) // 2]
    stopped = json.loads(surfw(home, "infer", *arguments, "--stop", middle).stdout)
    assert stopped["new_tokens"] < free["new_tokens"]
    assert stopped["text"] == free["text"][: free["text"].index(middle)]


def test_explain_comes_before_the_run_and_changes_nothing_of_it(home: Path) -> None:
    arguments = [
        "infer",
        "--source",
        str(home / "store"),
        "--model",
        "tiny",
        "--prompt",
        "Weights",
        "--max-new-tokens",
        "4",
    ]
    plain = surfw(home, *arguments, "--cache-layers", "2")
    explained = surfw(home, *arguments, "--cache-layers", "2", "--explain")
    assert explained.stdout == plain.stdout
    lines = explained.stderr.splitlines()
    (budget,) = [line for line in lines if line.startswith("memory budget ")]
    assert budget.endswith("none: 2 layers and one more in flight, as --cache-layers says")
    assert lines.index(budget) < len(lines) - 1
    assert "4 tokens in" in lines[-1]
    facts = json.loads(surfw(home, *arguments, "--explain", "--json", SURFW_CACHE_LAYERS="2").stdout)
    assert (facts["explain"]["limited_by"], facts["explain"]["limited_from"]) == ("cache_layers", "variable")
    assert facts["explain"]["bytes_per_pass"] > 0
    assert facts["new_tokens"] > 0


def test_explain_alone_is_the_result(home: Path) -> None:
    arguments = ["infer", "--source", str(home / "store"), "--explain", "--model"]
    shown = surfw(home, *arguments, "tiny").stdout.splitlines()
    assert shown[0].startswith("memory budget ")
    assert "everything: 4 layers" in shown[1]
    assert shown[-2].split()[:4] == ["what", "limits", "it", "computing;"]
    facts = json.loads(surfw(home, *arguments, "bert", "--json").stdout)
    assert facts.keys() == {"model", "source", "explain"}
    assert (facts["explain"]["unit"], facts["explain"]["bytes_per_pass"]) == ("passes", 0)


def test_encoders(home: Path) -> None:
    store = str(home / "store")
    arguments = ["infer", "--source", store, "--model", "bert"]
    filled = json.loads(surfw(home, *arguments, "--prompt", "Weights [MASK] here", "--json").stdout)
    (prediction,) = filled["predictions"]
    assert len(prediction["candidates"]) == 5
    assert prediction["candidates"][0]["probability"] >= prediction["candidates"][1]["probability"]
    assert "token " in surfw(home, *arguments, "--prompt", "Weights [MASK] here").stdout
    embedded = json.loads(surfw(home, *arguments, "--prompt", "Weights", "--json").stdout)
    assert len(embedded["embedding"]) == 64
    assert "embedding of 64 values" in surfw(home, *arguments, "--prompt", "Weights").stdout


def test_source_from_the_environment_and_the_default_store(home: Path) -> None:
    arguments = ["infer", "--model", "tiny", "--prompt", "Weights", "--max-new-tokens", "2"]
    named = surfw(home, *arguments, SURFW_SOURCE=str(home / "store"))
    assert "named by SURFW_SOURCE" in named.stderr
    found = surfw(home, *arguments)
    assert "the default store" in found.stderr
    assert found.stdout == named.stdout


def test_stats(home: Path) -> None:
    with serve(home / "store") as served:
        assert "– / – / –" in surfw(home, "stats", served.url).stdout, "nothing was asked yet"
        surfw(home, "infer", "--source", served.url, "--model", "tiny", "--prompt", "Weights")
        facts = json.loads(surfw(home, "stats", served.url, "--json").stdout)
        shown = surfw(home, "stats", served.url).stdout
    assert facts.keys() == {
        "server", "models", "cache", "requests", "bytes_sent", "clients", "storage", "resources", "bytes_read",
        "connections", "events", "heat", "sending",
    }  # fmt: skip
    assert facts["models"] == ["bert", "tiny"]
    assert facts["bytes_sent"] > 0
    assert facts["requests"]["latency_seconds"].keys() == {"p50", "p95", "p99"}
    assert "bert, tiny" in shown
    assert "–" not in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly(number: signal.Signals, home: Path) -> None:
    server = subprocess.Popen(
        [SURFW, "serve", "--port", "0", "--announce"],
        env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"].replace("ws://", "http://")
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
        assert answer.status == 200
    server.send_signal(number)
    _, err = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in err


def test_the_script_for_ci(home: Path) -> None:
    if shutil.which("curl") is None:
        require("curl is not there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(SURFW).parent}:{environment(home)['PATH']}"
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / "ci" / "smoke.sh"), str(home / "tiny"), "Weights", port],
        env=environment(home, PATH=path), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["model"] == "smoke"
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", int(port))) != 0, "the server was stopped"


def test_infer_takes_a_model_and_a_prompt(home: Path) -> None:
    def run(*arguments: str, stdin: str = "") -> dict[str, object]:
        done = surfw(home, "infer", *arguments, "--max-new-tokens", "3", "--json", stdin=stdin, SURFW_PORT="1")
        assert done.returncode == 0, done.stderr
        facts: dict[str, object] = json.loads(done.stdout)
        return {name: facts[name] for name in ("model", "source", "text")}

    store = str(home / "store")
    tiny = run("--source", store, "--model", "tiny", "--prompt", "Weights")
    assert tiny["source"] == store
    assert run("tiny", "Weights") == tiny
    assert run("tiny", stdin="Weights\n") == tiny
    assert run("tiny", "-", stdin="Weights") == tiny
    assert run("tiny", "--prompt", "Weights") == tiny
    assert run(store, "Weights", "--model", "tiny") == tiny
    assert run(str(home / "tiny"), "Weights") == tiny | {"source": str(home / "tiny")}
    with serve(home / "store") as served:
        for address in (served.url, served.url.removeprefix("ws://"), served.url.replace("ws://", "http://")):
            assert run(address, "Weights", "--model", "tiny") == tiny | {"source": served.url}


def test_a_folder_that_is_called_as_a_model_of_the_store_does_not_hide_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)  # where tiny and bert are also folders
    arguments = ["-q", "--max-new-tokens", "1", "--json"]
    named = surfw(home, "infer", "tiny", "Weights", *arguments, SURFW_PORT="1")
    assert json.loads(named.stdout)["source"] == str(home / "store")
    other = surfw(tmp_path, "infer", "bert", "Weights", *arguments, SURFW_PORT="1")
    assert json.loads(other.stdout)["source"] == "bert", other.stderr


def test_what_changes_nothing_is_a_warning(home: Path) -> None:
    def warnings(*arguments: str) -> list[str]:
        done = surfw(home, "infer", *arguments, "-q", "--source", str(home / "store"), "--max-new-tokens", "1")
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    assert warnings("tiny", "Weights", "--seed", "5") == [
        "surfw: warning: the seed changes nothing without sampling; give --temperature, --top-p or --top-k to sample"
    ]
    assert warnings("tiny", "Weights", "--seed", "5", "--temperature", "1") == []
    assert warnings("bert", "Weights", "--temperature", "1", "--seed", "5") == [
        "surfw: warning: temperature and seed change nothing: bert is an encoder, and generates no tokens"
    ]
    (line,) = warnings("tiny", "--prompt-ids", ",".join(["5"] * 2050))
    assert line.startswith("surfw: warning: the prompt has 2050 tokens, and tiny was made for 2048 (max_pos")


def test_chunking_again_says_what_was_there_already(home: Path, tmp_path: Path) -> None:
    first = surfw(tmp_path, "chunk", str(home / "tiny"), "--json")
    assert json.loads(first.stdout)["unchanged_chunks"] == 0
    again = surfw(tmp_path, "chunk", str(home / "tiny"))
    assert again.stdout.endswith("; all chunks were there already\n")
    blob = max((tmp_path / "store").glob("blobs/*/*.safetensors"), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    mended = surfw(tmp_path, "chunk", str(home / "tiny"))
    count = len(json.loads(first.stdout)["chunks"])
    assert mended.stdout.endswith(f"; {count - 1} there already, 1 damaged in the store and replaced\n")
    shared = surfw(tmp_path, "chunk", str(home / "tiny"), "--name", "other", "--json")
    facts = json.loads(shared.stdout)
    assert (facts["unchanged_chunks"], facts["replaced_chunks"]) == (count, 0)
