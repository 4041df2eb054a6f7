"""A custom backend over a dictionary with one object, plain and wrapped by surfw."""

import pytest

from surfw.storage import StorageBackend, adapt_backend
from tests.storage.dict_backend import DictBackend

KEY = "blobs/ab/x"
DATA = bytes(range(256)) * 86


@pytest.fixture
def plain() -> DictBackend:
    return DictBackend({KEY: DATA})


@pytest.fixture
def adapted(plain: DictBackend) -> StorageBackend:
    return adapt_backend(plain)
