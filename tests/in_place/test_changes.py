"""If a checkpoint changes after its model was opened or chunked, this is noticed before a weight is used."""

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
import torch

from surfw.chunking import prepare_model
from surfw.chunking.in_place import publish_place, write_in_place
from surfw.errors import IntegrityError, ManifestError, RefusedError
from surfw.models import StreamingModel
from surfw.server.served import make_private_store
from surfw.storage import FsspecBackend, Store, open_backend
from surfw.storage.base import ChangedObjectError
from surfw.storage.origins import PlacedOptions, private_stores
from tests.checkpoints import save_llama
from tests.servers import serve
from tests.storage.dict_backend import DictBackend


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    return save_llama(tmp_path / "llama")


@pytest.fixture
def store(llama: Path, tmp_path: Path) -> Path:
    """A store that refers to the checkpoint."""
    with prepare_model(str(llama)) as prepared:
        asyncio.run(write_in_place(prepared, open_backend(tmp_path / "store")))
    return tmp_path / "store"


def damage(shard: Path, *, keep_time: bool) -> None:
    """Flip bits in the middle of each MB of a shard."""
    before = shard.stat()
    with shard.open("r+b") as file:
        for at in range(before.st_size // 3, before.st_size, 10_000):
            file.seek(at)
            file.write(b"\xff")
    if keep_time:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def run(source: str) -> None:
    with StreamingModel.open(source, cache_size=1, prefetch=False) as streaming:
        streaming(input_ids=torch.tensor([[3, 4, 5]]))


def test_read_from_the_folder(llama: Path) -> None:
    text = r"model.safetensors was changed: its revision is .* expected .*start the server again, or run"
    with StreamingModel.open(str(llama), cache_size=1, prefetch=False) as streaming:
        damage(llama / "model.safetensors", keep_time=False)
        with pytest.raises(ChangedObjectError, match=text):
            streaming(input_ids=torch.tensor([[3, 4, 5]]))


def test_with_time_and_size_kept(llama: Path) -> None:
    run(str(llama))
    damage(llama / "model.safetensors", keep_time=True)
    with pytest.raises(IntegrityError, match="is damaged: block 0 has BLAKE3"):
        run(str(llama))


@pytest.mark.parametrize("keep_time", [False, True])
def test_of_a_running_server_and_of_one_that_is_started_again(llama: Path, store: Path, keep_time: bool) -> None:
    expected = IntegrityError if keep_time else RefusedError
    text = "is damaged" if keep_time else "was changed since; start the server again, or run surfw chunk --in-place"
    with serve(store) as served:
        with StreamingModel.open(served.url, prefetch=False) as streaming:
            assert streaming.manifest.is_known
        damage(llama / "model.safetensors", keep_time=keep_time)
        with pytest.raises(expected, match=text):
            run(served.url)
    with serve(store) as again, pytest.raises(expected, match=text):
        run(again.url)
    with pytest.raises(IntegrityError if keep_time else ChangedObjectError):
        run(str(store))


def test_a_store_elsewhere_gives_away_no_file_of_this_machine(llama: Path, store: Path) -> None:
    data = (store / "models" / "llama.json").read_bytes().partition(b"\n")[2]  # as without a digest
    text = r"says that its weights lie in '.*llama', which a store that is not on this machine may not say"
    with pytest.raises(ManifestError, match=text):
        Store(DictBackend({})).parse_manifest("llama", data)
    for scheme in ("local", "file", "simplecache::file", "memory"):
        other = data.replace(str(llama).encode(), f"{scheme}://{llama}".encode())
        with pytest.raises(ManifestError, match="which a store that is not on this machine may not say"):
            Store(FsspecBackend("memory://elsewhere")).parse_manifest("llama", other)
    with prepare_model(str(llama)) as prepared, pytest.raises(ManifestError, match="chunk the model without"):
        asyncio.run(write_in_place(prepared, DictBackend({})))


def test_a_digest_that_was_cut_off_is_found_out_again(llama: Path, tmp_path: Path) -> None:
    run(str(llama))
    (log,) = (tmp_path / "home" / "digests").iterdir()
    whole = log.read_bytes()
    log.write_bytes(whole[:-40])
    with StreamingModel.open(str(llama)) as streaming:
        unknown = [chunk for chunk in streaming.manifest.chunks if not chunk.forms[0].is_known]
        assert len(unknown) == 1
    run(str(llama))
    with StreamingModel.open(str(llama)) as streaming:
        assert streaming.manifest.is_known


@pytest.mark.parametrize("url", ["os.system://;touch {}/made", "local://{}", "simplecache::file://{}", "memory://x"])
def test_no_manifest_makes_this_machine_do_more_than_read_a_checkpoint(
    url: str, llama: Path, store: Path, tmp_path: Path
) -> None:
    data = (store / "models" / "llama.json").read_bytes().partition(b"\n")[2]  # as without a digest
    other = data.replace(str(llama).encode(), url.format(tmp_path).encode())
    with pytest.raises(ManifestError, match="which no manifest may say"):
        Store(open_backend(store)).parse_manifest("llama", other)
    assert not (tmp_path / "made").exists()


def test_storage_options_go_to_no_other_server(tmp_path: Path) -> None:
    secret = {"headers": {"Authorization": "x"}}
    assert PlacedOptions("https://here/store", secret).for_url("https://here/model") == secret
    assert PlacedOptions("hf://org/model", secret).for_url("hf://org/model@0123") == secret
    assert PlacedOptions(str(tmp_path), secret).for_url("s3://bucket/model") == secret
    for place, origin in (
        ("https://here/store", "https://there/model"),
        ("https://here/store", "s3://bucket/model"),
        ("s3://bucket/store", "https://there/model"),
        (str(tmp_path), "https://there/model"),
        ("https://here/store", str(tmp_path)),
    ):
        assert PlacedOptions(place, secret).for_url(origin) == {}


def test_code_beside_a_checkpoint_is_not_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "torch", "surfw"):
        (llama / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(llama)
    asyncio.run(make_private_store(".", {}))
    assert not (tmp_path / "ran").exists()


def test_a_place_that_means_another_folder_by_now_has_one_model(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "current"
    place.symlink_to(llama)
    asyncio.run(publish_place(str(place)))
    place.unlink()
    place.symlink_to(llama.rename(tmp_path / "newer"))
    store = asyncio.run(publish_place(str(place)))
    assert asyncio.run(Store(open_backend(store)).models()) == ["current"], "the name that was typed"


def test_a_home_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "file" / "home"))
    run(str(llama))
    with serve(llama) as served:
        run(served.url)
    folder = private_stores()
    assert folder == private_stores(), "one for the whole process"
    assert folder.parent == Path(tempfile.gettempdir())
    assert [path.name for path in folder.glob("*/models/*")] == ["llama.json"]
