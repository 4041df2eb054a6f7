"""The whole path for a LLaMA: chunk a checkpoint, serve it, and generate with three layers in memory.

    python examples/llama_example.py [MODEL]

MODEL is a hub id or a local directory; default: the small model that comes with surfw.
"""

import asyncio
import sys
import tempfile

from surfw import ModelChunker, StreamingLlamaModel, WeightServer, demo_checkpoint


async def main(model_name: str, prompt: str) -> None:
    """Chunk, serve, generate."""
    with tempfile.TemporaryDirectory() as folder:
        info = await ModelChunker(model_name, output_dir=folder).chunk_model()
        print(f"{info.name}: {info.layers} layers, {info.payload_bytes / 1e6:.1f} MB in {info.chunks} chunks")

        async with (
            WeightServer(model_path=folder, port=0, cache_size_mb=200) as server,
            StreamingLlamaModel(info.name, websocket_uri=server.url, cache_size=3) as model,
        ):
            print(prompt, end="", flush=True)
            async for text in model.stream(prompt, max_new_tokens=40):
                print(text, end="", flush=True)
            cache, times = model.get_cache_info(), model.get_inference_stats()
            print(f"\n{cache['hit_rate']:.0%} hits with {cache['cache_size']} layers kept, ", end="")
            print(f"{times['stall_seconds']:.2f} s stalled, {times['compute_seconds']:.2f} s computing")


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else str(demo_checkpoint())
    asyncio.run(main(name, "Weight streaming is"))
