"""A GGUF file at the command line: chunked, run, and refused if a folder is required."""

import json
from pathlib import Path

from gguf import GGMLQuantizationType

from tests.chunking.test_gguf import llama, write
from tests.cli.run import complaint, surfw


def test_a_file_is_chunked_under_its_own_name_and_runs(tmp_path: Path) -> None:
    file = write(tmp_path / "toy-Q8_0.gguf", "llama", llama(), GGMLQuantizationType.Q8_0)
    planned = surfw(tmp_path, "chunk", str(file), "--dequantize", "bfloat16", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert (json.loads(planned.stdout)["name"], json.loads(planned.stdout)["dtype"]) == ("toy-Q8_0", "bfloat16")
    done = surfw(tmp_path, "chunk", str(file), "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "toy-Q8_0"
    answer = surfw(tmp_path, "infer", "toy-Q8_0", "he", "--max-new-tokens", "3", "--ignore-eos", "--json")
    assert len(json.loads(answer.stdout)["token_ids"]) == 3, answer.stderr
    text = f"{file} is a GGUF file, expected a folder; surfw chunk {file} makes dense weights of it"
    assert complaint(surfw(tmp_path, "infer", str(file), "he")) == text
