"""Sources that wrap other sources: each is a `ChunkSource` that adds one behaviour."""
