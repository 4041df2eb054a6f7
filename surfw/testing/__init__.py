"""For those who test what they write for surfw: a suite for storage backends, and a proxy that does what networks do.

It needs pytest. `backends` says how the suite is used, `faults` how the proxy is.
"""

from surfw.testing.backends import KEY, OBJECTS, BrokenStream, ReadOnlyStorageBackendSuite, StorageBackendSuite
from surfw.testing.faults import Fault, FaultProxy

__all__ = [
    "KEY", "OBJECTS", "BrokenStream", "Fault", "FaultProxy", "ReadOnlyStorageBackendSuite", "StorageBackendSuite",
]  # fmt: skip
