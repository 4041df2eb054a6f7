"""`python -m surfw.bench.peers.download PLACE IDS`: fetch a checkpoint's files, load them, and print one token's id.

This is how transformers alone is used. If PLACE is a URL, the files are downloaded into a temporary folder, several at
a time; a local folder is loaded in place.
"""

import sys
import tempfile
from pathlib import Path

import fsspec


def main() -> None:
    """Fetch, load, and print the token's id."""
    place, ids = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="surfw-bench-") as scratch:
        folder = _fetch(place, scratch) if "://" in place else place

        import torch
        from transformers import AutoConfig

        from surfw.bench.peers.generation import model_class

        model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype="auto")
        prompt = torch.tensor([[int(one) for one in ids.split(",")]])
        tokens = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        sys.stdout.write(f"{tokens[0, -1].item()}\n")


def _fetch(url: str, folder: str) -> str:
    files, place = fsspec.url_to_fs(url)
    names = [name for name in files.ls(place, detail=False) if Path(name).suffix in {".json", ".safetensors"}]
    files.get(names, [str(Path(folder) / Path(name).name) for name in names])
    return folder


if __name__ == "__main__":
    main()
