"""Write the forms of one chunk, each into a file, and encode them as journal entries."""

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from surfw.chunking.plan import ChunkPlan, PlannedChunk
from surfw.codec import PACKED_CODECS
from surfw.codec.lossless import FRAME_BYTES, decode_frame, decoders, encode_frame, item_bytes_of
from surfw.encryption import EncryptionKey, Sealer
from surfw.manifest import (
    Digester,
    Digests,
    Form,
    Location,
    decode_line,
    encode_line,
    packed_bytes,
    plan_parts,
    read_digests,
)
from surfw.safetensors_header import encode_header
from surfw.storage.store import blob_key

LEAST_GAIN = 0.1
"""Next to a plain form, a coded one is kept only if it is smaller by at least this share.

A chunk of less than one frame gets no coded form: requesting it takes longer than reading it.
"""

_SAMPLES, _DECODINGS = 8, 5
_ENCODERS = min(4, os.cpu_count() or 1)


class PayloadSource(Protocol):
    """A source of payloads. Methods are called in a thread, with increasing `start` for each chunk."""

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        """Fill `destination` with a chunk's payload from byte `start`."""

    def read_form_into(self, chunk: PlannedChunk, form: Form, start: int, destination: memoryview) -> None:
        """Fill `destination` with verified bytes, from byte `start`, of a form that is copied."""


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk that was written: the BLAKE3 of its payload, and its forms."""

    id: str
    forms: tuple[Form, ...]


class _Stored:
    """Writes the stored bytes of one form into its file: encrypts them if there is a key, and digests them."""

    def __init__(self, file: int, key: EncryptionKey | None) -> None:
        self._file, self._digester = file, Digester()
        self._sealer = Sealer(key) if key else None
        self.size = 0

    def add(self, part: bytes | memoryview) -> None:
        self.size += len(part)
        for stored in (part,) if self._sealer is None else self._sealer.update(part):
            self._write(stored)

    def finish(self) -> tuple[Digests, bytes]:
        """Return the digests of the form, and the seals of its blocks."""
        for stored in self._sealer.finish() if self._sealer else ():
            self._write(stored)
        return self._digester.result(), self._sealer.seals if self._sealer else b""

    def _write(self, stored: bytes | memoryview) -> None:
        _write_all(self._file, memoryview(stored))
        self._digester.update(stored)


class _PackedFile:
    """The file of one packed form, encoded in its own thread."""

    def __init__(self, codec: str, planned: PlannedChunk, stored: _Stored) -> None:
        from surfw.codec.quantised import PackedEncoder  # here: imports numpy

        self._codec, self._kinds, self._stored = codec, planned.kinds(codec), stored
        parts = plan_parts([tensor.info for tensor in planned.tensors], self._kinds)
        self._encoder: PackedEncoder = PackedEncoder(parts, stored.add)
        self._thread = ThreadPoolExecutor(1, f"surfw-{codec}")

    def add(self, piece: memoryview) -> Future[None]:
        return self._thread.submit(self._encoder.update, piece)

    def finish(self) -> Form:
        """Finish encoding, and return the form."""
        self._thread.submit(self._encoder.finish).result()
        digests, seals = self._stored.finish()
        place = Location(_key(self._codec, digests, seals), 0, self._stored.size)
        return Form(self._codec, self._stored.size, *digests, (place,), kinds=self._kinds, seals=seals)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class FormFiles:
    """Writes one chunk's forms into files. Pieces are hashed and encoded in separate threads.

    With a key, all files are encrypted, including the plain form's, which then has no header.
    """

    def __init__(
        self, planned: PlannedChunk, scratch: Path, codecs: Sequence[str], key: EncryptionKey | None = None
    ) -> None:
        self._planned = planned
        self._infos = [tensor.info for tensor in planned.tensors]
        self._scratch = scratch
        self._codecs = codecs_of(planned, codecs)
        self._key = key
        self._payload = Digester()
        self._frames: list[int] = []
        self._size = 0
        self._pending: deque[tuple[list[Future[None]], list[Future[bytes | memoryview]]]] = deque()
        self._packed: list[_PackedFile] = []
        self._open = ExitStack()
        self._files: dict[str, int] = {}
        self._stored: dict[str, _Stored] = {}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._hashing = opened.enter_context(ThreadPoolExecutor(1, "surfw-hash"))
            self._encoding = opened.enter_context(ThreadPoolExecutor(_ENCODERS, "surfw-encode"))
            for codec in self._codecs:
                path = scratch_file(self._scratch, codec)
                self._files[codec] = file = opened.enter_context(path.open("wb", buffering=0)).fileno()
                self._stored[codec] = _Stored(file, self._key)
                if self._planned.kinds(codec) and not self._planned.copied(codec):
                    self._packed.append(_PackedFile(codec, self._planned, self._stored[codec]))
                    opened.callback(self._packed[-1].close)
            self._header = encode_header(self._infos)
            if "none" in self._files and self._key is None and not self._planned.copied("none"):
                _write_all(self._files["none"], memoryview(self._header))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def copied(self) -> list[Form]:
        """The forms that are copied unchanged: pass their bytes to `copy`."""
        return [form for codec in self._codecs if (form := self._planned.copied(codec))]

    @property
    def needs_payload(self) -> bool:
        """Whether any form has to be made from the payload."""
        return len(self.copied) < len(self._codecs)

    def copy(self, form: Form, piece: memoryview) -> None:
        """Write the next piece of a form that is copied."""
        self._stored[form.codec].add(piece)

    def add(self, piece: memoryview) -> None:
        """Write the next piece of the payload. Its memory must not change until it is settled."""
        encoded = []
        for at in range(0, len(piece) if "lossless" in self._files else 0, FRAME_BYTES):
            start = self._size + at
            item_bytes = item_bytes_of(self._infos, start, start + FRAME_BYTES)
            encoded.append(self._encoding.submit(encode_frame, piece[at : at + FRAME_BYTES], item_bytes))
        taken = [self._hashing.submit(self._payload.update, piece), *(packed.add(piece) for packed in self._packed)]
        if "none" in self._files and self._key is not None:
            taken.append(self._hashing.submit(self._stored["none"].add, piece))
        self._pending.append((taken, encoded))
        self._size += len(piece)
        if "none" in self._files and self._key is None:
            _write_all(self._files["none"], piece)

    def settle(self) -> None:
        """Wait until the oldest pending piece is hashed and its frames are written."""
        taken, encoded = self._pending.popleft()
        for coded in encoded:
            frame = coded.result()
            self._stored["lossless"].add(frame)
            self._frames.append(len(frame))
        for job in taken:
            job.result()

    def finish(self) -> Written:
        """Settle the remaining pieces, and return the chunk with the forms to keep."""
        while self._pending:
            self.settle()
        payload, forms = self._payload.result(), list[Form]()
        new = set(self._files).difference(form.codec for form in self.copied)
        if "none" in new:
            forms.append(self._finish_plain(payload))
        coded_bytes = sum(self._frames)
        if "lossless" in new and (not forms or coded_bytes <= (1 - LEAST_GAIN) * self._size):
            coded, seals = self._stored["lossless"].finish()
            place = Location(_key("lossless", coded, seals), 0, coded_bytes)
            forms.append(Form("lossless", coded_bytes, *coded, (place,), tuple(self._frames), seals=seals))
        forms += [packed.finish() for packed in self._packed]
        for form in self.copied:
            digests, seals = self._stored[form.codec].finish()
            seals = seals or form.seals
            place = Location(_key(form.codec, digests, seals), 0, form.stored_bytes)
            forms.append(replace(form, digest=digests.digest, blocks=digests.blocks, locations=(place,), seals=seals))
        chunk_id = payload.digest if self.needs_payload else self._planned.id
        return Written(self._key.hide(chunk_id) if self._key else chunk_id, tuple(forms))

    def _finish_plain(self, payload: Digests) -> Form:
        """Finish the form `none`: a safetensors file, or the encrypted payload."""
        if self._key is None:
            start, digests, seals = len(self._header), payload, b""
        else:
            start, (digests, seals) = 0, self._stored["none"].finish()
        place = Location(_key("none", digests, seals), start, start + self._size)
        return Form("none", self._size, *digests, (place,), seals=seals)


def codecs_of(planned: PlannedChunk, codecs: Sequence[str]) -> tuple[str, ...]:
    """Return the codecs in which a chunk will be written, before anything is encoded; `none` if no other applies.

    A chunk without matrices has no packed form. A small chunk has no compressed form next to the plain one. An
    encrypted chunk keeps the forms that it has.
    """
    if any(form.seals for form in planned.ready):
        return tuple(form.codec for form in planned.ready)
    is_small = planned.payload_bytes < FRAME_BYTES and "none" in codecs
    left_out = {"lossless"} if is_small else set[str]()
    left_out |= {codec for codec in PACKED_CODECS if not planned.kinds(codec)}
    return tuple(codec for codec in codecs if codec not in left_out) or ("none",)


def planned_form(planned: PlannedChunk, codec: str) -> Form:
    """Return a form of a chunk as known before anything is read. For a coded form, the size is an upper bound."""
    if kinds := planned.kinds(codec):
        size = packed_bytes(plan_parts([tensor.info for tensor in planned.tensors], kinds))
        return Form(codec, size, "", b"", kinds=kinds)
    return Form(codec, planned.payload_bytes, "", b"")


@dataclass(frozen=True, slots=True)
class CodedEstimate:
    """Estimated size and speed of the form `lossless`.

    Attributes:
        share: coded bytes ÷ payload bytes.
        stored_bytes: coded bytes of all chunks that are large enough for this form.
        decoded_per_second: payload bytes decoded per second.
    """

    share: float
    stored_bytes: int
    decoded_per_second: float


def estimate_coded(plan: ChunkPlan, payloads: PayloadSource) -> CodedEstimate:
    """Estimate a model's form `lossless` from one frame of each of its largest chunks."""
    largest = sorted((one for one in plan.chunks if one.payload_bytes), key=lambda one: one.payload_bytes)[-_SAMPLES:]
    frames: list[tuple[bytes | memoryview, memoryview]] = []
    for chunk in largest:
        sample = memoryview(bytearray(min(FRAME_BYTES, chunk.payload_bytes)))
        payloads.read_into(chunk, 0, sample)
        item_bytes = item_bytes_of([tensor.info for tensor in chunk.tensors], 0, len(sample))
        frames.append((encode_frame(sample, item_bytes), memoryview(bytearray(len(sample)))))
    payload_bytes = sum(len(sample) for _, sample in frames)
    share = sum(len(coded) for coded, _ in frames) / payload_bytes if payload_bytes else 1.0
    coding_bytes = sum(chunk.payload_bytes for chunk in plan.chunks if chunk.payload_bytes >= FRAME_BYTES)
    return CodedEstimate(share, round(coding_bytes * share), payload_bytes / _decode_seconds(frames))


def _decode_seconds(frames: Sequence[tuple[bytes | memoryview, memoryview]]) -> float:
    """Measure how long a run's decoder threads take for these frames: the minimum of several runs."""
    seconds = []
    with decoders() as threads:
        for _ in range(_DECODINGS):
            start = time.perf_counter()
            list(threads.map(lambda frame: decode_frame(*frame), frames))
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _key(codec: str, digests: Digests, seals: bytes) -> str:
    """Return the blob key of a form."""
    suffix = {"none": ".safetensors", "lossless": ".lossless"}.get(codec, ".packed")
    return blob_key(digests.digest, ".encrypted" if seals else suffix)


def scratch_file(scratch: Path, codec: str) -> Path:
    """Return the file of one form, named after the path `scratch` that all forms share."""
    return scratch.with_suffix(f".{codec}.tmp")


def encode_entry(name: str, codecs: Sequence[str], written: Written) -> bytes:
    """Encode a line of the journal: a chunk, the requested codecs, and the locations of its forms."""
    forms = [_encode_form(form) for form in written.forms]
    return encode_line({"chunk": name, "codecs": list(codecs), "id": written.id, "forms": forms})


def decode_entry(line: bytes) -> tuple[str, tuple[str, ...], Written]:
    """Decode a line of the journal: the name of a chunk, the requested codecs, and its forms.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: the line is damaged, or another version of surfw wrote it.
    """
    entry = decode_line(line)
    written = Written(entry["id"], tuple(_decode_form(form) for form in entry["forms"]))
    return entry["chunk"], tuple(entry["codecs"]), written


def _encode_form(form: Form) -> dict[str, Any]:
    (place,) = form.locations
    facts: dict[str, Any] = {"codec": form.codec, "object": place.object, "start": place.start, "stop": place.stop}
    facts |= Digests(form.digest, form.blocks).document()
    return facts | {"frames": form.frames, "kinds": form.kinds, "seals": form.seals.hex()}


def _decode_form(entry: dict[str, Any]) -> Form:
    place = Location(entry["object"], entry["start"], entry["stop"])
    size = place.stop - place.start
    digests, kinds = read_digests(entry, size), tuple(entry.get("kinds", ()))
    seals = bytes.fromhex(entry.get("seals", ""))
    return Form(entry["codec"], size, *digests, (place,), tuple(entry["frames"]), kinds, seals)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
