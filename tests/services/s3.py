"""An S3 server for the tests: the gateway of `ceph`, with fresh buckets and two accounts."""

import contextlib
import fcntl
import functools
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import botocore.loaders
import botocore.session
import pytest

from tests.services.ceph import OWNER, PROGRAMS, STRANGER, Account, ceph_gateway
from tests.services.processes import missing


@functools.cache
def _client(endpoint: str, key: str, secret: str) -> Any:
    return botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=key, aws_secret_access_key=secret
    )


_loaded = functools.cache(botocore.loaders.JSONFileLoader().load_file)


@pytest.fixture(scope="session")
def _botocore_reads_its_data_once() -> Iterator[None]:
    """Otherwise each session parses 1 MB of JSON about S3, which takes 0.1 s, and each backend makes two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders.JSONFileLoader, "load_file", lambda _, path: _loaded(path))
        yield


@dataclass(frozen=True)
class S3Service:
    """The server's address and its accounts.

    Attributes:
        endpoint: its URL.
        key: the access key of the account that owns the buckets.
        secret: that account's secret key.
        stranger: another account, without access to the buckets of the first.
    """

    endpoint: str
    key: str = OWNER.key
    secret: str = OWNER.secret
    stranger: Account = STRANGER

    @property
    def client(self) -> Any:
        """botocore's client, for operations that surfw lacks."""
        return _client(self.endpoint, self.key, self.secret)

    def bucket(self) -> str:
        """Create a bucket; return its name."""
        name = f"surfw-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory, _botocore_reads_its_data_once: None) -> Iterator[S3Service]:
    """A real S3 server with its data in memory. All tests and processes share it: use separate buckets."""
    from tests.conftest import require

    if absent := missing(*PROGRAMS, "setpriv"):
        require(f"{absent[0]} is not installed; apt-get install ceph-mon ceph-osd radosgw")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with ceph_gateway(tmp_path_factory.mktemp("ceph")) as endpoint:
            yield S3Service(endpoint)
        return
    # The first process starts the server, and stops it when no other uses it. All users hold a lock on `users`.
    shared = tmp_path_factory.getbasetemp().parent / "ceph.endpoint"
    with shared.with_suffix(".start").open("w") as starting, shared.with_suffix(".users").open("w") as users:
        fcntl.flock(starting, fcntl.LOCK_EX)
        with contextlib.ExitStack() as stack:
            is_first = not shared.exists()
            if is_first:
                shared.write_text(stack.enter_context(ceph_gateway(tmp_path_factory.mktemp("ceph"))))
            fcntl.flock(users, fcntl.LOCK_SH)
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield S3Service(shared.read_text())
            if is_first:
                fcntl.flock(users, fcntl.LOCK_EX)
                shared.unlink()
