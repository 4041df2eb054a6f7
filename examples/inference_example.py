"""Ways to run a model: a forward, concurrent asynchronous forwards, prefetching, generation, and statistics.

    python examples/inference_example.py [SOURCE] [MODEL]

SOURCE is a server (ws://host:port) or a store; default: a temporary store with the model that comes with surfw.
"""

import asyncio
import sys
import tempfile

import torch

from surfw import ModelChunker, StreamingModel, demo_checkpoint


async def main(source: str, name: str | None) -> None:
    """Open a model and run it."""
    async with StreamingModel(source, model=name, cache_size=4) as model:
        print(f"{model.manifest.name}: {type(model.model).__name__} with {len(model.layers)} layers")
        print("warm:", ", ".join(await model.warmup([0, 1, 2])))

        batch = model.tokenizer(["Weights arrive", "A layer is"], return_tensors="pt", padding=True)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = await model.forward_async(**inputs, enable_prefetch=True)
        print("logits:", tuple(output.logits.shape), output.logits.dtype)

        both = await asyncio.gather(model.forward_async(**inputs), model.forward_async(**inputs))
        print("twice the same:", torch.equal(both[0].logits, both[1].logits))

        await model.prefetch_next_layers(current_layer=2, prefetch_count=2)
        model.cache_size = 8  # can be changed at run time
        tokens = await model.generate_async(**inputs, max_new_tokens=12, do_sample=False)
        print("generated:", model.tokenizer.batch_decode(tokens, skip_special_tokens=True))

        cache, times = model.get_cache_info(), model.get_inference_stats()
        print(f"cache: {cache['hits']} hits, {cache['misses']} misses, {cache['memory_usage_mb']:.1f} MB")
        print(f"times: {times['total_inferences']} inferences of {times['avg_inference_time'] * 1000:.0f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
    else:
        with tempfile.TemporaryDirectory() as store:
            ModelChunker(demo_checkpoint(), output_dir=store).chunk_model_sync()
            asyncio.run(main(store, None))
