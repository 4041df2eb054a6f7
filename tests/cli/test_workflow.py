"""The workflow for GitHub Actions is valid YAML, and its steps work."""

import os
import subprocess
from pathlib import Path

import yaml

from tests.cli.run import SURFW, environment
from tests.pages import ROOT


def test_the_step_that_compares_saves_first_and_compares_then(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "surfw.yml").read_text())
    steps = {one["name"]: one["run"] for one in workflow["jobs"]["surfw"]["steps"] if "run" in one}
    assert steps["Install"] == "pip install surfw"
    assert (ROOT / "examples" / "ci" / "smoke.sh").name in steps["Chunk, serve, infer"]
    path = os.pathsep.join([str(Path(SURFW).parent), os.environ["PATH"]])
    for what in ("bench.json", "report.html"):
        env = environment(tmp_path, ROUNDS="2", PATH=path)
        done = subprocess.run(["sh", "-ec", steps["Compare"]], cwd=tmp_path, env=env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / what).stat().st_size > 0
