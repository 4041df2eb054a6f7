"""`bench storage`: every way reads every byte of the model."""

import asyncio
from pathlib import Path

import pytest

from surfw.bench.peers.runai import find_streamer
from surfw.bench.storage import bench_storage
from surfw.chunking import prepare_model, write_model
from surfw.chunking.in_place import write_in_place
from surfw.errors import ConfigurationError, NotFoundError
from surfw.storage import S3Backend
from surfw.storage.housekeeping import Housekeeping
from tests.checkpoints import save_llama
from tests.services.s3 import S3Service
from tests.stores import make_store


def test_rows_compare_with_plain_ranges_and_with_a_peer(s3: S3Service, tmp_path: Path) -> None:
    options = {"endpoint_url": s3.endpoint, "aws_access_key_id": s3.key, "aws_secret_access_key": s3.secret}
    bucket = s3.bucket()
    with prepare_model(str(save_llama(tmp_path / "tiny"))) as prepared:
        asyncio.run(write_model(prepared, S3Backend(bucket, "store", **options)))
        size = prepared.plan.payload_bytes
    result = bench_storage(f"s3://{bucket}/store", options=options, rounds=1)
    assert result.benchmark == "storage"
    plain = [row for row in result.rows if row.name.startswith("plain ranges")]
    peer = [row for row in result.rows if row.name == "Run:ai Model Streamer"]
    assert len(plain) == 5
    assert len(peer) == find_streamer()
    ours = [row for row in result.rows if row.name.startswith("surfw, against")]
    assert ours[0].baseline == max(row.value for row in plain) > 0
    assert [row.baseline for row in ours[1:]] == [row.value for row in peer]
    assert all(row.ratio == pytest.approx(row.value / (row.baseline or 0)) and row.verified for row in ours)
    assert result.rows[-1].value * 1e6 == pytest.approx(size)


def test_a_model_in_place_is_read_from_where_it_lies(
    s3: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENDPOINT_URL": s3.endpoint, "ACCESS_KEY_ID": s3.key, "SECRET_ACCESS_KEY": s3.secret}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    bucket = s3.bucket()
    for file in save_llama(tmp_path / "tiny").iterdir():
        s3.client.put_object(Bucket=bucket, Key=f"tiny/{file.name}", Body=file.read_bytes())
    with prepare_model(f"s3://{bucket}/tiny") as prepared:
        asyncio.run(write_in_place(prepared, S3Backend(bucket, "store")))
        size = prepared.plan.payload_bytes
    result = bench_storage(f"s3://{bucket}/store", rounds=1)
    assert result.rows[-1].value * 1e6 == pytest.approx(size)
    assert all(row.value > 0 for row in result.rows)
    (listed,) = asyncio.run(Housekeeping(S3Backend(bucket, "store")).contents()).models
    assert (listed.origin, listed.stored_bytes) == (f"s3://{bucket}/tiny", 0)
    s3.client.delete_object(Bucket=bucket, Key="tiny/model.safetensors")
    with pytest.raises(NotFoundError, match=r"^model\.safetensors in s3://.*/tiny: not found"):
        bench_storage(f"s3://{bucket}/store", rounds=1)


def test_a_folder_has_nothing_to_measure(tmp_path: Path) -> None:
    make_store(tmp_path)
    with pytest.raises(
        ConfigurationError, match="is not read over a network, expected a URL such as s3://bucket/prefix"
    ):
        bench_storage(str(tmp_path))
