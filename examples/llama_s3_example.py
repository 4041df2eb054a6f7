"""A model in S3: chunk it into a bucket, serve it from there, and generate.

    export SURFW_EXAMPLE_BUCKET=my-bucket
    python examples/llama_s3_example.py [MODEL]

MODEL is a hub id or a local directory; default: the small LLaMA that comes with surfw. Credentials and region are
resolved as in every AWS tool: from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, from `AWS_PROFILE`, or from the
machine's role. `SURFW_EXAMPLE_ENDPOINT` is the URL of an S3 server other than Amazon's, such as http://127.0.0.1:9000.
"""

import asyncio
import os
import sys

from surfw import ModelChunker, S3Backend, StreamingModel, WeightServer, demo_checkpoint


async def main(checkpoint: str) -> None:
    """Chunk a model into S3, serve it from there, and generate text."""
    backend = S3Backend(
        os.environ["SURFW_EXAMPLE_BUCKET"],
        prefix="surfw-example",
        endpoint_url=os.environ.get("SURFW_EXAMPLE_ENDPOINT"),
    )
    chunker = ModelChunker(checkpoint, storage_backend=backend)
    info = await chunker.chunk_model()
    print(f"{info.name} is in {info.store}")

    prompt = "Weight streaming is"
    print(prompt, end="", flush=True)
    async with (
        WeightServer(storage_backend=backend, port=0) as server,
        await StreamingModel.open_async(server.url, model=info.name) as model,
    ):
        async for text in model.stream(prompt, max_new_tokens=40):
            print(text, end="", flush=True)
    print()
    await backend.close()


if __name__ == "__main__":
    if "SURFW_EXAMPLE_BUCKET" not in os.environ:
        sys.exit("set SURFW_EXAMPLE_BUCKET to the name of a bucket that you may write to")
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else str(demo_checkpoint())))
