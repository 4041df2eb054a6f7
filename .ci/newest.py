"""The tests with the newest releases that pyproject.toml allows, in place of those of `tried.txt`.

Run after the README's test command, in a checkout that has its `.venv`. What is newer is named first. Where nothing is,
there is nothing to do. Deprecations of other packages are reported, and fail no test. Where tests fail, and fail again,
each newer release is tried alone, with what it needs: those that fail are told by its name, and the exit code is 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRIED = ROOT / ".ci" / "tried.txt"
REPORT_ONLY = [f"-Wdefault::{kind}" for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
LEFT_OUT = ["--ignore=tests/test_house.py"]  # linters: a newer one has newer rules


def plain(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def tried() -> dict[str, str]:
    """The releases of `tried.txt`, by name."""
    lines = (line.partition("#")[0].strip() for line in TRIED.read_text().splitlines())
    return {plain(name): version for name, version in (line.split("==") for line in lines if line)}


def newest() -> dict[str, str]:
    """What pip would install today, by name."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip = [ROOT / ".venv/bin/python", "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", report.name, ".[test]"], cwd=ROOT, check=True)
        found = json.load(report)["install"]
    versions = {plain(one["metadata"]["name"]): one["metadata"]["version"].partition("+")[0] for one in found}
    return {name: version for name, version in versions.items() if name not in {"surfw", "setuptools"}}


def install(venv: Path, versions: dict[str, str]) -> Path:
    """A virtual environment with surfw and these releases; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    constraints = venv / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", ".[test]", "-c", constraints], cwd=ROOT, check=True)
    return python


def run_tests(python: Path, *arguments: str) -> list[str]:
    """Run tests; the ids of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [python, "-m", "pytest", "-q", "-rfE", *REPORT_ONLY, "-p", "no:cacheprovider", *arguments]
        with log.open("w") as out:
            done = subprocess.run(command, cwd=ROOT, stdout=out, check=False)
        text = log.read_text()
    print(text, flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", text, re.MULTILINE)
    if done.returncode and not failed:
        sys.exit(f"newest: pytest ended with exit code {done.returncode}; see above")
    return failed


def main() -> None:
    """Do it."""
    old, new = tried(), newest()
    newer = {name: version for name, version in new.items() if old.get(name) != version}
    if not newer:
        print("newest: the newest releases that are allowed are those of .ci/tried.txt; nothing more to test")
        return
    names = {name: f"{name} {old.get(name, '(not there)')} -> {version}" for name, version in newer.items()}
    print(f"newest: testing with {'; '.join(names.values())}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        python = install(Path(folder) / "newest", new)
        demo = subprocess.run([python.parent / "surfw", "infer", "--prompt", "Weight streaming is"], check=False)
        failed = run_tests(python, "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", *LEFT_OUT)
        if failed:
            failed = run_tests(python, *failed)  # what fails only once says nothing of a release
        if not failed and not demo.returncode:
            print("newest: all tests pass with them; put them into .ci/tried.txt with the next change")
            return
        for name, what in names.items():
            alone = install(Path(folder) / "alone", old)
            subprocess.run([alone, "-m", "pip", "install", "-q", f"{name}=={newer[name]}"], check=True)
            broken = run_tests(alone, *failed) if failed else []
            if broken:
                print(f"newest: {what} breaks {len(broken)} tests, such as {broken[0]}", flush=True)
    sys.exit(
        f"newest: surfw does not work with {'; '.join(names.values())} (see above for which); follow the new release, "
        "or allow an older one in pyproject.toml"
    )


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    main()
