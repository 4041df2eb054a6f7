"""The manifest of a chunked model: the contents of its chunks, the locations of their bytes, and the execution order.

A manifest is immutable, is stored as JSON, and is independent of torch, network and storage. The format is versioned
and documented in `surfw/storage/FORMAT.md`. Its rules, which are checked whenever a manifest is parsed:

- In a store, a line with its BLAKE3 precedes the JSON: see `parse_stored_manifest`.
- A chunk's id is the BLAKE3 of its tensor payload: the tensors' bytes, in the manifest's order, without gaps.
- A chunk lists *forms*. A form's stored bytes are digested per 1 MiB block, so that any range of blocks can be
  verified. For codec `none`, the stored bytes are the payload itself; for `lossless`, they are its 1 MiB parts, each
  compressed separately, whose stored sizes are listed (format version 3). `int8` and `int4` hold quantised weights; the
  kind of each tensor is listed, and determines its position (format version 4).
- Stored bytes may be encrypted, all with one key, after encoding (format version 5). Digests cover the encrypted
  bytes, so that verifying, serving and copying them requires no key.
- An adapter has its own manifest, which names its base and identifies the base's weights (format version 6).
- Each expert of a mixture may be a separate chunk, of kind `expert` (format version 7): see `surfw.manifest.experts`.
- A manifest may be signed by the publisher of the model: see `surfw.signing`.
- The locations and files of a model that was not copied lie in another storage, its *origin*, where each object is
  pinned to its revision. Digests may then be missing (format version 2) until all bytes of a chunk have been read.
- Locations (object and byte range) belong to the storage. They and the origin never cross the wire: see
  `Manifest.public`.
"""

from surfw.manifest.digests import (
    Digester,
    Digests,
    count_blocks,
    decode_line,
    digest_blocks,
    encode_line,
    is_digest,
    parse_digests,
    payload_digest,
    read_digests,
)
from surfw.manifest.experts import Experts, slice_name, split_name, stack_name
from surfw.manifest.facts import (
    ADAPTER_VERSION,
    CIPHER,
    CODED_VERSION,
    DTYPE_BITS,
    ENCRYPTED_VERSION,
    EXPERTS_VERSION,
    FORMAT,
    IN_PLACE_VERSION,
    PACKED_VERSION,
    SEAL_BYTES,
    VERSION,
    Base,
    Chunk,
    Form,
    Kind,
    Location,
    Manifest,
    ModelFile,
    Origin,
    Pin,
    Reason,
    TensorInfo,
    Use,
    nbytes,
    with_digests,
)
from surfw.manifest.parser import (
    check_model_name,
    encode_stored_manifest,
    has_digest,
    parse_manifest,
    parse_stored_manifest,
)
from surfw.manifest.parts import (
    GROUP,
    LEAST_WEIGHTS,
    PANEL,
    Part,
    fits,
    packed_bytes,
    parts_of,
    plan_parts,
    stored_bytes,
    why_exact,
)
from surfw.manifest.signature import Signature, state

__all__ = [
    "ADAPTER_VERSION", "CIPHER", "CODED_VERSION", "DTYPE_BITS", "ENCRYPTED_VERSION", "EXPERTS_VERSION", "FORMAT",
    "GROUP", "IN_PLACE_VERSION", "LEAST_WEIGHTS", "PACKED_VERSION", "PANEL", "SEAL_BYTES", "VERSION", "Base", "Chunk",
    "Digester", "Digests", "Experts", "Form", "Kind", "Location", "Manifest", "ModelFile", "Origin", "Part", "Pin",
    "Reason", "Signature", "TensorInfo", "Use", "check_model_name", "count_blocks", "decode_line", "digest_blocks",
    "encode_line", "encode_stored_manifest", "fits", "has_digest", "is_digest", "nbytes", "packed_bytes",
    "parse_digests", "parse_manifest", "parse_stored_manifest", "parts_of", "payload_digest", "plan_parts",
    "read_digests", "slice_name", "split_name", "stack_name", "state", "stored_bytes", "why_exact", "with_digests",
]  # fmt: skip
