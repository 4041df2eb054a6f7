"""Test helpers for code that extends surfw: a suite for storage backends, and a proxy that injects network faults.

It needs pytest. See `backends` and `faults` for how to use them.
"""

from surfw.testing.backends import KEY, OBJECTS, BrokenStream, ReadOnlyStorageBackendSuite, StorageBackendSuite
from surfw.testing.faults import Fault, FaultProxy

__all__ = [
    "KEY", "OBJECTS", "BrokenStream", "Fault", "FaultProxy", "ReadOnlyStorageBackendSuite", "StorageBackendSuite",
]  # fmt: skip
