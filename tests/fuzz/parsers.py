"""All parsers of untrusted bytes, by name; each is created, with its imports, when it is used."""

from collections.abc import Callable, Mapping

from tests.fuzz import connections, documents, files
from tests.fuzz.parser import Parser

PARSERS: Mapping[str, Callable[[], Parser]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        connections.client_messages, connections.server_messages, connections.client_frames, connections.server_frames,
        connections.redis, documents.manifest, documents.digests, documents.safetensors, documents.statistics,
        documents.tokens, documents.settings, documents.adapter, documents.lossless, documents.seals, documents.ranges,
        files.config, files.gguf, files.key_file, files.disk_cache, files.store, files.prompts, files.recording,
    )
}  # fmt: skip
