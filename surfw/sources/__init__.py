"""Sources in front of sources: each is a `ChunkSource`, and adds one behaviour."""
