"""Checkpoints in S3 and on a web server: only headers are read before the weights are used."""

import asyncio
import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from surfw import ModelChunker
from surfw.chunking import prepare_model
from surfw.errors import CheckpointError, ConfigurationError, ModelError, StorageError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.server import WeightServer
from surfw.storage.base import ChangedObjectError
from tests.adapters import save_adapter
from tests.checkpoint.fake_hub import COMMIT, MODEL, serve
from tests.checkpoints import save_llama
from tests.cli.run import SURFW, environment
from tests.in_place.disk import written
from tests.services.http import http_server
from tests.services.s3 import S3Service

IDS = torch.arange(3, 12)[None]
SHARD = "model-00002-of-00006.safetensors"


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    path = save_llama(tmp_path / "llama", hidden=256)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, max_shard_size="2MB")
    (path / "model.safetensors").unlink()
    return path


def resident(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(path))(IDS).logits)


def s3_options(s3: S3Service) -> dict[str, str]:
    return {
        "endpoint_url": s3.endpoint, "aws_access_key_id": s3.key, "aws_secret_access_key": s3.secret,
        "region": "us-east-1",
    }  # fmt: skip


def run(streaming: StreamingModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(streaming(input_ids=IDS).logits)


def test_from_s3_by_a_server_and_without_one(llama: Path, s3: S3Service, tmp_path: Path) -> None:
    bucket = s3.bucket()
    for file in llama.iterdir():
        s3.client.put_object(Bucket=bucket, Key=f"models/{file.name}", Body=file.read_bytes())
    url, options = f"s3://{bucket}/models", s3_options(s3)
    want = resident(llama)

    async def main() -> None:
        async with (
            WeightServer(model_path=url, port=0, storage_options=options) as server,
            StreamingModel(server.url, cache_size=1) as streaming,
        ):
            assert torch.equal((await streaming.forward_async(input_ids=IDS)).logits, want)

    asyncio.run(main())
    assert written(tmp_path / "home") < 100_000
    with StreamingModel.open(url, cache_size=1, prefetch=False, storage_options=options) as streaming:
        assert streaming.manifest.is_known
        assert torch.equal(run(streaming), want)
        assert streaming.tokenizer("Weights").input_ids
        s3.client.put_object(Bucket=bucket, Key=f"models/{SHARD}", Body=(llama / SHARD).read_bytes()[:-1] + b"?")
        with pytest.raises(ChangedObjectError, match=rf"{SHARD} in {url} was changed: .*; start the server again"):
            run(streaming)


def test_from_a_web_server(llama: Path, tmp_path: Path) -> None:
    want = resident(llama)
    with (
        http_server(tmp_path, tmp_path / "http.log") as server,
        StreamingModel.open(f"{server}/llama", cache_size=1, prefetch=False) as streaming,
    ):
        assert streaming.manifest.name == "llama"
        assert torch.equal(run(streaming), want)
        (llama / SHARD).write_bytes((llama / SHARD).read_bytes()[:-1] + b"?")
        with pytest.raises(ChangedObjectError, match=rf"{SHARD} in {server}/llama was changed"):
            run(streaming)
    assert written(tmp_path / "home") < 100_000


def test_an_adapter_from_s3_and_a_web_server_is_that_of_its_folder(s3: S3Service, tmp_path: Path) -> None:
    base, adapter = save_llama(tmp_path / "base", layers=2), tmp_path / "lora"
    save_adapter(base, adapter, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    bucket = s3.bucket()
    for file in adapter.iterdir():
        s3.client.put_object(Bucket=bucket, Key=f"adapters/lora/{file.name}", Body=file.read_bytes())
    ModelChunker(base, tmp_path / "store").chunk_model_sync()
    with http_server(tmp_path, tmp_path / "http.log") as server:
        found = set()
        for place, options in {
            str(adapter): {}, f"file://{adapter}": {}, f"{server}/lora/": {},
            f"s3://{bucket}/adapters/lora": s3_options(s3),
        }.items():  # fmt: skip
            chunker = ModelChunker(place, tmp_path / "store", base="base", storage_options=options)
            found.add(chunker.chunk_model_sync().digest)
        assert len(found) == 1
        for place, said in {
            "base": f"{server}/base is no adapter: there is no adapter_config.json",
            "store": f"{server}/store is a surfw store, not an adapter: it is chunked already; copy adapters from it",
        }.items():
            with pytest.raises(CheckpointError, match=f"^{said}"):
                ModelChunker(f"{server}/{place}", tmp_path / "store", base="base").chunk_model_sync()
        with pytest.raises(UnsupportedModelError, match=f"^{server}/lora is an adapter .* surfw chunk {server}/lora"):
            prepare_model(f"{server}/lora")
        (adapter / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
        (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
        with pytest.raises(UnsupportedModelError, match=r"has an adapter .* beside the weights in model.safetensors"):
            prepare_model(f"{server}/lora")
    (only,) = (tmp_path / "store" / "models").glob("lora.json")
    assert "chat_template.jinja" in only.read_text()


def test_a_url_with_secrets_comes_into_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"https://\*\*\*@example.com/x holds secrets, which would come into"):
        prepare_model("https://user:hush@example.com/x")


def test_what_is_no_checkpoint_is_named_by_its_address(tmp_path: Path) -> None:
    for name in ("nothing", "store", "damaged", "config-only"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "surfw.json").write_text("{}")
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "damaged" / "model.safetensors").touch()
    (tmp_path / "config-only" / "config.json").write_text("{}")
    with http_server(tmp_path, tmp_path / "http.log") as server:
        for name, said in {
            "nothing": " is not a checkpoint: there is no config.json; name the place of what save_pretrained wrote",
            "store": " is a surfw store, not a checkpoint: it is chunked already; give it to --store or --source",
            "damaged": "/config.json is not JSON",
            "config-only": " has no weights that surfw reads: expected model.safetensors",
        }.items():
            with pytest.raises(ModelError, match=f"^{server}/{name}{said}"):
                prepare_model(f"{server}/{name}")
    with pytest.raises(StorageError, match=f"^config.json in {server}/x: the server cannot be reached"):
        prepare_model(f"{server}/x")


def test_from_the_hub_by_ranges_of_one_commit(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "tiny", layers=3)
    kept = {name: value for name, value in environment(tmp_path).items() if not name.startswith("HF_")}
    arguments = ["--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--ignore-eos", "--json"]
    found = []
    with serve({path.name: path.read_bytes() for path in checkpoint.iterdir()}) as hub:
        env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "*"}
        for place in (f"hf://{MODEL}", str(checkpoint)):
            done = subprocess.run(
                [SURFW, "infer", "--source", place, *arguments], env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            found.append(json.loads(done.stdout)["token_ids"])
        assert "model.safetensors" in hub.served
    assert found[0] == found[1]
    assert not list((tmp_path / "hub").rglob("*.safetensors")), "nothing was downloaded"
    (manifest,) = (
        path.read_text() for path in (tmp_path / "in-place").rglob("tiny.json") if COMMIT in path.read_text()
    )
    assert f"hf://{MODEL}@{COMMIT}" in manifest
