"""S3 on a real server: behaves like every storage, isolates its buckets, and gives clear errors for usual mistakes."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError, NotFoundError, SurfwError
from surfw.models import StreamingModel
from surfw.storage import FilesystemBackend, S3Backend, StorageBackend
from surfw.storage.store_source import open_storage_source
from surfw.testing import StorageBackendSuite
from tests.checkpoints import save_llama
from tests.services.processes import free_port
from tests.services.proxy import proxy_to
from tests.services.s3 import S3Service
from tests.storage.own_suite import OwnBackendSuite


def connect(s3: S3Service, bucket: str, prefix: str = "", **options: Any) -> S3Backend:
    """A backend with the server's address and its owner's keys by default."""
    known = {"endpoint_url": s3.endpoint, "aws_access_key_id": s3.key, "aws_secret_access_key": s3.secret}
    return S3Backend(bucket, prefix, **known | options)


class TestS3(OwnBackendSuite):
    @pytest.fixture
    def backend(self, s3: S3Service) -> StorageBackend:
        return connect(s3, s3.bucket(), "some/prefix")


class TestS3WithoutPrefix(StorageBackendSuite):
    @pytest.fixture
    def backend(self, s3: S3Service) -> StorageBackend:
        return connect(s3, s3.bucket())


def test_objects_lie_under_the_prefix(s3: S3Service) -> None:
    bucket = s3.bucket()
    asyncio.run(connect(s3, bucket, "/a/b/").save("models/x.json", b"{}"))
    listed = s3.client.list_objects_v2(Bucket=bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["a/b/models/x.json"]
    assert connect(s3, bucket, "/a/b/").url == f"s3://{bucket}/a/b"
    assert asyncio.run(connect(s3, bucket, "a").list()) == ["b/models/x.json"]
    assert asyncio.run(connect(s3, bucket, "c").list()) == []


def test_what_others_write_is_seen_at_once(s3: S3Service) -> None:
    bucket = s3.bucket()
    one, other = connect(s3, bucket), connect(s3, bucket)
    assert (asyncio.run(one.list()), asyncio.run(one.exists("x"))) == ([], False)
    asyncio.run(other.save("x", b"1"))
    assert (asyncio.run(one.list()), asyncio.run(one.exists("x"))) == (["x"], True)
    asyncio.run(other.save("x", b"22"))
    assert asyncio.run(one.size("x")) == 2


def test_a_large_object_in_parts(s3: S3Service) -> None:
    backend = connect(s3, s3.bucket())
    data = bytes(range(256)) * (105 << 12)  # more than twice s3fs' part of 50 MiB
    asyncio.run(backend.save("x", data))
    assert asyncio.run(backend.load("x")) == data
    assert asyncio.run(backend.load_range("x", 52428700, 52428900)) == data[52428700:52428900]


OPERATIONS = {
    "load": lambda backend: backend.load("x"),
    "size": lambda backend: backend.size("x"),
    "exists": lambda backend: backend.exists("x"),
    "list": lambda backend: backend.list(),
    "range": lambda backend: backend.load_range("x", 0, 1),
    "save": lambda backend: backend.save("x", b"1"),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Any:
    """Each operation that may fail."""
    return OPERATIONS[request.param]


@pytest.fixture
def bucket(s3: S3Service) -> str:
    """A bucket that holds `x`."""
    name = s3.bucket()
    s3.client.put_object(Bucket=name, Key="x", Body=b"payload")
    return name


def failure(backend: S3Backend, operation: Any) -> str:
    """Check the operation's error: one line, with the place and without secrets, and no 'not found'."""
    with pytest.raises(SurfwError) as caught:
        asyncio.run(operation(backend))
    text = str(caught.value)
    assert not isinstance(caught.value, NotFoundError)
    assert text.startswith(backend.url)
    assert "\n" not in text
    assert "secret-" not in text
    return text


def test_no_such_bucket(s3: S3Service, operation: Any) -> None:
    assert "there is no bucket surfw-nowhere; make it" in failure(connect(s3, "surfw-nowhere", "p"), operation)


def test_an_unknown_access_key(s3: S3Service, bucket: str, operation: Any) -> None:
    backend = connect(s3, bucket, aws_access_key_id="nobody", aws_secret_access_key="secret-1")
    assert "wrong credentials: the access key is not known there" in failure(backend, operation)


def test_a_wrong_secret_key(s3: S3Service, bucket: str, operation: Any) -> None:
    backend = connect(s3, bucket, aws_secret_access_key="secret-1")
    assert "wrong credentials: the secret key does not belong to the access key" in failure(backend, operation)


def test_no_permission(s3: S3Service, bucket: str, operation: Any) -> None:
    stranger = s3.stranger
    backend = connect(s3, bucket, aws_access_key_id=stranger.key, aws_secret_access_key=stranger.secret)
    assert f"permission denied; these credentials may not do this in bucket {bucket}" in failure(backend, operation)


def test_an_endpoint_where_nobody_listens(operation: Any) -> None:
    where = f"http://127.0.0.1:{free_port()}"
    backend = S3Backend("bucket", endpoint_url=where, aws_access_key_id="k", aws_secret_access_key="secret-1")
    assert f"{where} cannot be reached (EndpointConnectionError)" in failure(backend, operation)


def test_an_endpoint_of_the_environment_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", where)
    said = failure(S3Backend("bucket", anonymous=True), OPERATIONS["exists"])
    assert f"{where} cannot be reached (EndpointConnectionError); check the address and the network; a server" in said
    assert said.endswith("that is not Amazon's is named by endpoint_url or AWS_ENDPOINT_URL")


@pytest.mark.parametrize("name", ["exists", "load"])
def test_tls_with_an_endpoint_that_has_none(s3: S3Service, name: str) -> None:
    where = s3.endpoint.replace("http:", "https:")
    said = failure(connect(s3, "bucket", endpoint_url=where), OPERATIONS[name])
    assert f"no safe connection to {where} (SSLError: it does not speak TLS as it should; try {s3.endpoint}" in said


def test_a_bad_profile(bucket: str, s3: S3Service, operation: Any) -> None:
    backend = S3Backend(bucket, endpoint_url=s3.endpoint, profile_name="nobody")
    assert "The config profile (nobody) could not be found" in failure(backend, operation)


def test_a_clock_that_is_wrong(s3: S3Service, bucket: str) -> None:
    script = (
        "import asyncio, datetime, sys\n"
        "import botocore.auth\n"
        "botocore.auth.get_current_datetime = (\n"
        "    lambda: datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - datetime.timedelta(hours=1)\n"
        ")\n"
        "from surfw.storage import S3Backend\n"
        "backend = S3Backend(sys.argv[1])\n"
        "for work in (backend.load, backend.exists, backend.list):\n"
        "    try: asyncio.run(work('x'))\n"
        "    except Exception as exc: print(exc)\n"
    )
    environment = os.environ | {
        "AWS_ENDPOINT_URL": s3.endpoint, "AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, bucket], capture_output=True, text=True, check=True, env=environment
    )
    said = "this machine's clock differs from the server's by too much for a signature; set the clock"
    assert done.stdout.splitlines() == [f"s3://{bucket}: {said}"] * 3


def test_encryption_and_who_pays_are_asked_for(s3: S3Service) -> None:
    name = s3.bucket()
    with proxy_to(s3.endpoint) as proxy:
        given = {"sse": "aws:kms", "sse_kms_key_id": "my-key", "requester_pays": True}
        backend = connect(s3, name, endpoint_url=proxy.endpoint, **given)
        with contextlib.suppress(SurfwError):  # the gateway does not know this key
            asyncio.run(backend.save("x", b"1"))
        with pytest.raises(NotFoundError):
            asyncio.run(backend.load("y"))
        assert proxy.asked("PUT /", "x-amz-server-side-encryption: aws:kms", "key-id: my-key", "payer: requester")
        assert proxy.asked("GET /", "x-amz-request-payer: requester")
        assert not proxy.asked("GET /", "x-amz-server-side-encryption")


def test_nothing_is_signed_where_nobody_is_named(s3: S3Service) -> None:
    name = s3.bucket()
    s3.client.put_object(Bucket=name, Key="x", Body=b"public", ACL="public-read")
    with proxy_to(s3.endpoint) as proxy:
        backend = S3Backend(name, endpoint_url=proxy.endpoint, anonymous=True)
        assert asyncio.run(backend.load("x")) == b"public"
        assert proxy.asked("GET /")
        assert not proxy.asked("Authorization")


@pytest.mark.parametrize(("style", "host"), [("virtual", "bucket.s3.example.org"), ("path", "s3.example.org")])
def test_the_bucket_is_in_the_host_or_in_the_path(style: Any, host: str) -> None:
    backend = S3Backend(
        "bucket", endpoint_url="http://s3.example.org", addressing_style=style, region_name="eu-central-1",
        aws_access_key_id="k", aws_secret_access_key="secret-1",
    )  # fmt: skip
    assert urlsplit(backend.fs.sign("bucket/x")).hostname == host
    asyncio.run(backend.close())


def test_no_credentials_at_all(
    bucket: str, s3: S3Service, operation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert "no usable credentials were found" in failure(S3Backend(bucket, endpoint_url=s3.endpoint), operation)


def test_credentials_and_endpoint_are_found_in_the_environment(
    bucket: str, s3: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    assert asyncio.run(S3Backend(bucket).load("x")) == b"payload"


def test_credentials_are_found_in_a_profile(
    bucket: str, s3: S3Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[mine]\naws_access_key_id={s3.key}\naws_secret_access_key={s3.secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    backend = S3Backend(bucket, endpoint_url=s3.endpoint, profile_name="mine", region_name="us-east-1")
    assert asyncio.run(backend.load("x")) == b"payload"


def test_backends_share_no_credentials(s3: S3Service, bucket: str) -> None:
    good = connect(s3, bucket)
    assert asyncio.run(good.load("x")) == b"payload"
    assert "wrong credentials" in failure(connect(s3, bucket, aws_secret_access_key="secret-1"), OPERATIONS["load"])
    assert asyncio.run(good.load("x")) == b"payload"
    assert good.fs is not connect(s3, bucket).fs


def test_a_closed_backend_has_no_connection_and_opens_one_when_needed(s3: S3Service, bucket: str) -> None:
    backend = connect(s3, bucket)
    port = urlsplit(s3.endpoint).port

    def connections() -> int:
        gc.collect()
        found = psutil.Process().net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.raddr.port == port for one in found)

    before = connections()
    asyncio.run(backend.load("x"))
    assert asyncio.run(backend.list()) == ["x"]
    assert connections() == before + 2, "one to read, one for the rest"
    asyncio.run(backend.close())
    assert connections() == before
    assert asyncio.run(backend.load("x")) == b"payload"
    asyncio.run(backend.close())
    assert connections() == before


@pytest.mark.parametrize("name", ["", "ab", "s3://bucket", "bucket/prefix", "a b c", ".abc", "a" * 256, "bücket"])
def test_a_name_that_is_no_buckets(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a bucket's name; expected the name alone"):
        S3Backend(name)


@pytest.mark.parametrize("prefix", ["..", "a/../b", "a//b", "a b", "s3://x"])
def test_a_prefix_that_leads_elsewhere(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=r"prefix .* is refused; write one such as models/mine"):
        S3Backend("bucket", prefix)


@pytest.mark.parametrize(
    "given",
    [
        {"aws_access_key_id": "k"},
        {"aws_secret_access_key": "secret-1"},
        {"aws_session_token": "secret-1"},
        {"aws_access_key_id": "k", "aws_session_token": "secret-1"},
    ],
)
def test_half_of_the_credentials(given: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="credentials for s3://bucket are incomplete") as caught:
        S3Backend("bucket", **given)
    assert "secret-" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:9000", "ftp://host", "http://"])
def test_an_endpoint_that_is_no_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"endpoint_url .* is not understood; write one such as http://"):
        S3Backend("bucket", endpoint_url=url)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigurationError, match="endpoint_url must not hold credentials") as caught:
        S3Backend("bucket", endpoint_url="http://user:secret-1@host")
    assert "secret-" not in str(caught.value)


def test_a_model_from_s3_says_what_it_says_from_a_folder(s3: S3Service, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 77, 3, 120]])
    answers = []
    bucket = s3.bucket()
    for make in (lambda: connect(s3, bucket, "models"), lambda: FilesystemBackend(tmp_path / "store")):
        with prepare_model(str(tmp_path / "llama")) as prepared:
            asyncio.run(write_model(prepared, make()))
        with StreamingModel.open(lambda make=make: open_storage_source(make()), "llama", cache_size=1) as model:
            answers.append(model.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)
