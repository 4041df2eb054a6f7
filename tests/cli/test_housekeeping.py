"""`surfw list`, `show`, `rm`, `prune` and `verify`, and the options of `chunk` that do the same, in real processes."""

import json
from pathlib import Path

import pytest

from surfw import WeightClient
from surfw.source import ChunkSource, Read
from tests.cli.run import complaint, surfw
from tests.servers import serve
from tests.stores import make_store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose default store has two models."""
    make_store(tmp_path / "store", "org/first", (5000, 6000))
    make_store(tmp_path / "store", "second", (7000,), seed=1)
    return tmp_path


def test_a_store_is_kept_in_order(home: Path) -> None:
    facts = json.loads(surfw(home, "chunk", "--list", "--json").stdout)
    assert facts.keys() == {
        "store", "models", "unfinished", "stored_bytes", "unneeded_blobs", "unneeded_bytes", "left_alone", "complaints",
    }  # fmt: skip
    first, second = facts["models"]
    assert first == {
        "name": "org/first", "class_name": "ToyModel", "dtype": "uint8", "codecs": ["none"], "layers": 2,
        "chunks": 2, "payload_bytes": 11000, "stored_bytes": 11000 + 2 * 4096 + 29, "shared_bytes": 29, "origin": None,
        "base": None,
    }  # fmt: skip
    assert facts["stored_bytes"] == first["stored_bytes"] + second["stored_bytes"] - 29
    assert (facts["unneeded_blobs"], facts["unneeded_bytes"]) == (0, 0)
    shown = surfw(home, "chunk", "--list").stdout.splitlines()
    assert shown[0].split() == ["model", "class", "dtype", "layers", "size", "shared"]
    assert shown[1].split() == ["org/first", "ToyModel", "uint8", "2", "19.2", "kB", "29", "B"]
    assert shown[-1] == f"2 models, 30.3 kB in {home}/store"

    removed = surfw(home, "chunk", "--remove", "org/first")
    assert removed.stdout == "org/first: removed; its blobs stay until 'surfw prune'\n"
    assert (
        surfw(home, "chunk", "--list").stdout.splitlines()[-1]
        == "2 blobs of no model, 19.2 kB: 'surfw prune' removes them"
    )
    told = json.loads(surfw(home, "chunk", "--prune", "--dry-run", "--json").stdout)
    assert told == {
        "store": f"{home}/store", "blobs": 2, "blob_bytes": 11000 + 2 * 4096, "leftover_bytes": 0, "left_alone": [],
        "dry_run": True,
    }  # fmt: skip
    done = surfw(home, "chunk", "--prune")
    assert done.stdout == f"2 blobs, 19.2 kB, removed from {home}/store\n"
    assert len(list((home / "store").glob("blobs/*/*"))) == 3
    verified = json.loads(surfw(home, "chunk", "--verify", "second", "--json").stdout)
    assert verified == {
        "store": f"{home}/store", "models": ["second"], "parts": 3, "read_bytes": 7029, "damage": [], "undigested": [],
    }  # fmt: skip
    assert surfw(home, "chunk", "--list").stdout.splitlines()[-1] == f"1 model, 11.1 kB in {home}/store"
    again = complaint(surfw(home, "chunk", "--remove", "org/first"))
    assert again == f"{home}/store has no model 'org/first'; it has: second"
    for option in ("--remove", "--verify"):
        path = complaint(surfw(home, "chunk", option, "./second"))
        assert path == f"{home}/store has no model './second' (a model's name is wanted here, no path); it has: second"


def test_what_is_damaged_is_named_and_the_exit_code_says_so(home: Path) -> None:
    blobs = sorted((home / "store").glob("blobs/*/*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(blobs[-1].read_bytes())
    data[-1] ^= 1
    blobs[-1].write_bytes(data)
    done = surfw(home, "chunk", "--verify")
    key = blobs[-1].relative_to(home / "store")
    assert done.stdout.splitlines() == [
        f"second, layers.0 ({key}): block 0 is damaged (1 of 1 blocks are)",
        f"2 models, 5 chunks and files, 18.0 kB read in {home}/store: 1 damaged",
    ]
    assert complaint(done).startswith(f"1 part in {home}/store damaged or missing, such as layers.0 of second")
    assert surfw(home, "chunk", "--verify", "org/first").returncode == 0
    told = surfw(home, "chunk", "--verify", "--json")
    assert told.returncode == 1
    assert [one["part"] for one in json.loads(told.stdout)["damage"]] == ["layers.0"]


def test_a_damaged_manifest_is_named_and_the_others_are_listed(home: Path) -> None:
    manifest = home / "store/models/second.json"
    manifest.write_bytes(b"{")
    done, as_json = surfw(home, "list"), surfw(home, "list", "--json")
    assert "org/first" in done.stdout
    assert "org/first" in as_json.stdout
    about = f"1 manifest or lease in {home}/store not understood"
    assert complaint(done) == f"{about}; the list says which"
    assert complaint(as_json).startswith(f"{about}, such as models/second.json: the manifest from")
    assert (done.stdout + done.stderr).count("models/second.json") == 1
    manifest.write_bytes((home / "store/models/org/first.json").read_bytes())
    said = f"models/second.json in {home}/store is the manifest of 'org/first'"
    assert f"not understood, so that nothing can be pruned: {said}\n" in surfw(home, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name a checkpoint to chunk: a hub id such as org/name, a directory, or a storage URL"),
        (["--list", "--prune"], "--prune: does not go with --list; give one of them"),
        (["./model", "--prune"], "MODEL: does not go with --prune; give one of them"),
        (["--list", "--dry-run"], "does not go with --list; give one of them"),
        (["--verify", "--name", "x"], "does not go with --verify, as it is for chunking; give one of them"),
        (["--list", "--in-place"], "does not go with --list, as it is for chunking; give one of them"),
        (["--prune", "--on-missing", "error"], "does not go with --prune, as it is for chunking; give one of them"),
    ],
)
def test_what_makes_no_sense_together(tmp_path: Path, arguments: list[str], text: str) -> None:
    done = surfw(tmp_path, "chunk", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in " ".join(done.stderr.split())


def test_a_place_that_is_no_store(tmp_path: Path) -> None:
    for option in ("--list", "--prune", "--verify"):
        said = complaint(surfw(tmp_path, "chunk", option, "--store", str(tmp_path / "x")))
        assert said.startswith(
            f"{tmp_path}/x is not a surfw store yet: nothing was chunked into it; 'surfw chunk MODEL"
        )
    assert not (tmp_path / "x").exists()


def test_the_commands_do_what_the_options_of_chunk_do(home: Path) -> None:
    same = [
        (["list"], ["chunk", "--list"]),
        (["verify", "second"], ["chunk", "--verify", "second"]),
        (["prune", "--dry-run"], ["chunk", "--prune", "--dry-run"]),
        (["rm", "third"], ["chunk", "--remove", "third"]),
    ]
    for command, option in same:
        for more in ([], ["--json"]):
            one, other = surfw(home, *command, *more, "-q"), surfw(home, *option, *more)
            assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr), command
    assert surfw(home, "rm", "org/first").stdout == "org/first: removed; its blobs stay until 'surfw prune'\n"
    assert surfw(home, "prune").stdout == f"2 blobs, 19.2 kB, removed from {home}/store\n"
    assert surfw(home, "list").stdout.splitlines()[-1] == f"1 model, 11.1 kB in {home}/store"


def test_the_last_part_of_a_name_is_enough_to_look_and_not_to_remove(home: Path) -> None:
    for command in ("show", "verify"):
        part, full = surfw(home, command, "first", "--json"), surfw(home, command, "org/first", "--json")
        assert (part.returncode, part.stdout) == (0, full.stdout)
    assert complaint(surfw(home, "rm", "first")).endswith("; did you mean org/first?")
    assert len(json.loads(surfw(home, "list", "--json").stdout)["models"]) == 2


def test_show_says_what_a_model_is_made_of(home: Path) -> None:
    facts = json.loads(surfw(home, "show", "org/first", "--json").stdout)
    listed = json.loads(surfw(home, "list", "--json").stdout)["models"][0]
    assert {name: facts.pop(name) for name in listed} == listed
    assert facts == {
        "store": f"{home}/store", "digest": facts["digest"], "model": "org/first", "class": "ToyModel",
        "key_id": None, "signed_by": None, "identity": facts["identity"],
        "form_bytes": {"none": 11000},
        "files": [{"name": "tokenizer.json", "bytes": 21}, {"name": "vocab.txt", "bytes": 8}],
        "parts": [
            {"name": "layers.0", "kind": "layer", "tensors": 1, "payload_bytes": 5000, "bytes": 5000},
            {"name": "layers.1", "kind": "layer", "tensors": 1, "payload_bytes": 6000, "bytes": 6000},
        ],
    }  # fmt: skip
    shown = surfw(home, "show", "org/first").stdout
    assert "ToyModel, uint8" in shown
    assert [line.split() for line in shown.splitlines()[-2:]] == [
        ["layers.0", "layer", "1", "5.0", "kB"], ["layers.1", "layer", "1", "6.0", "kB"],
    ]  # fmt: skip
    assert facts["digest"] in shown
    assert complaint(surfw(home, "show", "third")) == f"{home}/store has no model 'third'; it has: org/first, second"


def test_removing_what_a_server_reads_is_a_warning(home: Path) -> None:
    with serve(home / "store") as served, WeightClient(served.url) as client:
        port = served.url.rpartition(":")[2]
        assert surfw(home, "rm", "second", SURFW_PORT=port).stderr == "", "nobody is connected"
        client.run(lambda source: read(source, "org/first"))
        other = surfw(home, "rm", "x", "--store", str(home / "other"), SURFW_PORT=port)
        assert "warning" not in other.stderr
        lease = home / "store/leases/x.json"
        lease.parent.mkdir(exist_ok=True)
        lease.write_text("{}")
        refused = surfw(home, "rm", "org/first", SURFW_PORT=port)
        assert "leases/x.json" in complaint(refused)
        assert "warning" not in refused.stderr, "what is refused harms nobody"
        lease.unlink()
        removed = surfw(home, "rm", "org/first", SURFW_PORT=port)
        assert removed.returncode == 0
        assert removed.stderr == (
            f"surfw: warning: the server at {served.url} serves this store, and 1 client of it may be reading "
            "org/first; what they run will fail\n"
        )


async def read(source: ChunkSource, model: str) -> None:
    """Read a chunk of a model."""
    manifest = await source.manifest(model)
    chunk = manifest.chunks[0]
    size = chunk.forms[0].stored_bytes
    await source.fetch(manifest, [Read(chunk, chunk.forms[0], 0, size, memoryview(bytearray(size)))])
