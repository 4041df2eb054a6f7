"""Valid documents to start from: a manifest of each version, and other generated inputs."""

import json
from collections.abc import Iterator
from dataclasses import replace

from surfw.manifest import (
    SEAL_BYTES,
    Base,
    Chunk,
    Form,
    Location,
    Manifest,
    ModelFile,
    Origin,
    Pin,
    TensorInfo,
    payload_digest,
)
from surfw.manifest.parts import packed_bytes, plan_parts
from tests.toys import toy_chunk, toy_manifest


def manifests() -> Iterator[Manifest]:
    """One of each version of the format."""
    (chunk, _), (head, _) = toy_chunk("layers.0", [("BF16", (2, 3)), ("I32", ())]), toy_chunk("head", [("F32", (2,))])
    (form,) = chunk.forms
    plain = toy_manifest([chunk, replace(head, kind="part")])
    yield replace(
        plain,
        config={"model_type": "toy", "sizes": [1, 2.5, None, True], "nested": {"text": "ü\n"}},
        generation_config={"eos_token_id": 2},
        ties={"lm_head.weight": "layers.0.t0"},
        files=(ModelFile("tokenizer.json", 3, payload_digest(b"abc"), "blobs/aa/abc.json"),),
        chunks=(replace(chunk, forms=(replace(form, locations=(Location("blobs/a", 8, 8 + form.stored_bytes),)),)),),
        order=(plain.order[0],),
    )
    place = Location("model.safetensors", 8, 8 + form.stored_bytes)
    pins = {"model.safetensors": Pin(64, '"etag"'), "vocab.txt": Pin(9, "then, 9 bytes")}
    unread = replace(form, digest="", blocks=b"", locations=(place,))
    yield replace(
        plain,
        chunks=(replace(chunk, forms=(unread,)),),
        order=(plain.order[0],),
        files=(ModelFile("vocab.txt", 9, payload_digest(b"v"), "vocab.txt"),),
        origin=Origin("s3://bucket/model", pins),
    )
    size = chunk.payload_bytes - 3
    coded = Form("lossless", size, payload_digest(b"coded"), bytes(32), frames=(size,))
    yield replace(plain, chunks=(replace(chunk, forms=(form, coded)), head))
    matrix, _ = toy_chunk("layers.0", [("BF16", (64, 64)), ("F32", (3,))])
    size = packed_bytes(plan_parts(matrix.tensors, ("int4", "raw")))
    packed = Form("int4", size, payload_digest(b"packed"), bytes(32), kinds=("int4", "raw"))
    yield toy_manifest([replace(matrix, forms=(packed,))])
    sealed = replace(form, seals=bytes(SEAL_BYTES))
    yield replace(toy_manifest([replace(chunk, forms=(sealed,))]), key_id="0123456789abcdef" * 2)
    slices = (
        TensorInfo("layers.0.experts.up[0]", "U8", (2, 4), 0),
        TensorInfo("layers.0.experts.down[0]", "U8", (4,), 8),
    )
    held = Form("none", 12, payload_digest(bytes(12)), bytes(32))
    expert = Chunk("layers.0.experts[0]", "expert", payload_digest(bytes(12)), 12, slices, (held,))
    yield replace(plain, chunks=(*plain.chunks, expert))
    yield replace(plain, base=Base("org/base", "0" * 64), config={"r": 8, "lora_alpha": 16, "peft_type": "LORA"})


def statistics() -> bytes:
    """The statistics of a server with all features."""
    client = {
        "number": 3, "name": "surfw/1", "address": "[::1]:9", "connected_seconds": 2.5, "model": "org/m",
        "in_flight": 1, "bytes_sent": 99,
    }  # fmt: skip
    return json.dumps(
        {
            "server": {"version": "1.0", "uptime_seconds": 3.5},
            "models": ["org/m", "demo"],
            "cache": {
                "hits": 1, "misses": 2, "coalesced": 0, "hit_rate": 0.25, "bytes": 8, "capacity_bytes": 9,
                "evictions": 0, "policy": "schedule",
            },
            "requests": {"total": 3, "in_flight": 1, "latency_seconds": {"p50": 0.1, "p95": 0.2, "p99": 0.3}},
            "bytes_sent": 12, "bytes_read": 13, "clients": 1,
            "storage": {"url": "s3://bucket", "healthy": True},
            "resources": {"rss_bytes": 5, "cpu_percent": 1.5},
            "connections": [client],
            "events": [{"time": 1.5, "kind": "joined", "text": "one came"}],
            "cache_shortage": {"model": "demo", "pass_bytes": 9, "cache_mb": 1},
            "redis": {"url": "redis://h", "reachable": False, "hits": 1, "bypassed": "away", "bypassed_seconds": 2.0},
            "sending": {"slow_clients": 0, "max_bytes_per_second": 5},
        },
        separators=(",", ":"),
    ).encode()  # fmt: skip
