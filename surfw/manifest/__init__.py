"""The durable facts of a chunked model: what its chunks hold, where their bytes lie, and in which order they run.

A manifest is immutable, is JSON on disk, and knows neither torch nor network nor storage. The format is versioned and
documented in `surfw/storage/FORMAT.md`. Its rules, checked whenever one is parsed:

- In a store, a line with its BLAKE3 stands before the JSON: see `parse_stored_manifest`.
- A chunk's identity is the BLAKE3 of its tensor payload: the tensors' bytes, in the manifest's order, without gaps.
- A chunk lists *forms*. A form's stored bytes are digested per block of 1 MiB, so that any run of blocks can be
  verified alone. For codec `none` the stored bytes are the payload itself; for `lossless` they are its parts of
  1 MiB, each compressed alone, whose stored sizes are listed (format version 3). `int8` and `int4` hold quantised
  weights; how each tensor is held is listed, and where it lies follows from that (format version 4).
- Stored bytes may be encrypted, all with one key, after they were coded (format version 5). Digests are of what is
  stored, so that nobody needs the key to verify, serve or copy it.
- An adapter has a manifest of its own, which names its base and the weights that it belongs to (format version 6).
- The experts of a mixture are chunks of their own, of the kind `expert` (format version 7): see
  `surfw.manifest.experts`.
- It may be signed, by whoever made the model: see `surfw.signing`.
- The locations and files of a model that was not copied lie in another storage, its *origin*, and each object is
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
