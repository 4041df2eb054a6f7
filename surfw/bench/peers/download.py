"""`python -m surfw.bench.peers.download PLACE IDS`: fetch a checkpoint's files, load them, and print a token's id.

What people do with transformers alone. From a URL the files go into a folder that is removed afterwards, several at a
time; those of a folder are loaded where they are.
"""

import sys
import tempfile
from pathlib import Path

import fsspec


def main() -> None:
    """Do it."""
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
