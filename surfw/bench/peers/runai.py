"""Run:ai Model Streamer, which reads safetensors objects from S3, in its own process.

`python -m surfw.bench.peers.runai` reads the objects named on stdin, one URL per line, and prints the seconds and the
bytes as JSON. Credentials are passed in the environment, never on the command line.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time

from surfw.bench.process import describe_end
from surfw.errors import SurfwError
from surfw.storage import S3Backend

_PATIENCE_SECONDS = 600


def find_streamer() -> bool:
    """Whether the streamer and its S3 extension are installed."""
    return all(importlib.util.find_spec(name) for name in ("runai_model_streamer", "runai_model_streamer_s3"))


def stream_objects(objects: list[str], backend: S3Backend) -> float:
    """Return the seconds that it takes to read all tensors of the objects into memory, without imports.

    Raises:
        SurfwError: the streamer fails.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "surfw.bench.peers.runai"],
            input="\n".join(objects),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=False,
            env=os.environ | _environment(backend),
        )
    except subprocess.TimeoutExpired as exc:
        raise SurfwError(f"Run:ai Model Streamer was not ready after {_PATIENCE_SECONDS} s") from exc
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise SurfwError(f"Run:ai Model Streamer {describe_end(done.returncode, done.stderr)}")
    return float(json.loads(lines[-1])["seconds"])


def _environment(backend: S3Backend) -> dict[str, str]:
    """Return the endpoint and credentials as the environment variables that the streamer reads."""
    fs = backend.fs
    known = {
        "AWS_ACCESS_KEY_ID": fs.key,
        "AWS_SECRET_ACCESS_KEY": fs.secret,
        "AWS_SESSION_TOKEN": fs.token,
        "AWS_REGION": fs.client_kwargs.get("region_name"),
    }
    endpoint = backend.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        known |= {
            "RUNAI_STREAMER_S3_ENDPOINT": endpoint,
            "AWS_ENDPOINT_URL": endpoint,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    return {name: value for name, value in known.items() if value}


def main() -> None:
    """Read the objects named on stdin, and print the result."""
    from runai_model_streamer import SafetensorsStreamer

    objects = sys.stdin.read().split("\n")
    start, size = time.perf_counter(), 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(objects)
        for _, tensor in streamer.get_tensors():
            size += tensor.numel() * tensor.element_size()
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": size}), flush=True)  # noqa: T201 - its result


if __name__ == "__main__":
    main()
