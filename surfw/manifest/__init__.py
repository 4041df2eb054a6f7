"""The durable facts of a chunked model: what its chunks hold, where their bytes lie, and in which order they run.

A manifest is immutable, is JSON on disk, and knows neither torch nor network nor storage. The format is versioned and
documented in the README. Its rules, checked whenever one is parsed:

- A chunk's identity is the BLAKE3 of its tensor payload: the tensors' bytes, in the manifest's order, without gaps.
- A chunk lists *forms*. A form's stored bytes are digested per block of 1 MiB, so that any run of blocks can be
  verified alone. For codec `none` the stored bytes are the payload itself.
- Locations (object and byte range) belong to the storage. They never cross the wire: see `Manifest.public`.
"""

from surfw.manifest.digests import block_digests, digest_blocks, payload_digest
from surfw.manifest.facts import (
    DTYPE_BITS,
    FORMAT,
    VERSION,
    Chunk,
    Form,
    Location,
    Manifest,
    ModelFile,
    TensorInfo,
    Use,
    nbytes,
)
from surfw.manifest.parser import check_model_name, parse_manifest

__all__ = [
    "DTYPE_BITS",
    "FORMAT",
    "VERSION",
    "Chunk",
    "Form",
    "Location",
    "Manifest",
    "ModelFile",
    "TensorInfo",
    "Use",
    "block_digests",
    "check_model_name",
    "digest_blocks",
    "nbytes",
    "parse_manifest",
    "payload_digest",
]
