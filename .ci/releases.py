"""The tests with the lowest and the newest releases that pyproject.toml allows, instead of those of `tried.txt`.

Run after the README's test command, in a checkout that has its `.venv`.

`lowest`: the libraries whose insides surfw uses (tests/test_insides.py), each in the lowest release that is allowed,
and all others, torch among them, as they are installed. Runs the tests of the places that use them.

`newest`: what is newer than `tried.txt` is named first. If nothing is, there is nothing to do. Deprecations of other
packages are reported, and fail no test. Where tests fail, and fail again, each newer release is tried alone, with what
it needs; those that fail are named, and the exit code is 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRIED = ROOT / ".ci" / "tried.txt"
REPORT_ONLY = [f"-Wdefault::{kind}" for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
LEFT_OUT = ["--ignore=tests/test_house.py"]  # linters: a newer one has newer rules
AT_ONCE = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]

USED_INSIDE = ("botocore", "s3fs", "transformers", "websockets")
PLACES = [
    "tests/test_insides.py", "tests/skeleton", "tests/client", "tests/server/test_server.py",
    "tests/models/test_many.py",
    "tests/storage/test_s3.py", "tests/storage/test_s3_ranges.py", "tests/storage/test_http.py",
]  # fmt: skip
"""Tests of the places that use insides of these libraries."""


def plain(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def tried() -> dict[str, str]:
    """The releases of `tried.txt`, by name."""
    lines = (line.partition("#")[0].strip() for line in TRIED.read_text().splitlines())
    return {plain(name): version for name, version in (line.split("==") for line in lines if line)}


def lowest() -> dict[str, str]:
    """The lowest releases that pyproject.toml allows of the libraries whose insides are used, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = (re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", line) for line in project["dependencies"])
    allowed = {plain(bound[1]): bound[2] for bound in bounds if bound}
    return {name: allowed[name] for name in USED_INSIDE}


def newest() -> dict[str, str]:
    """What pip would install today, by name."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip = [ROOT / ".venv/bin/python", "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", report.name, ".[test]"], cwd=ROOT, check=True)
        found = json.load(report)["install"]
    versions = {plain(one["metadata"]["name"]): one["metadata"]["version"].partition("+")[0] for one in found}
    return {name: version for name, version in versions.items() if name not in {"surfw", "setuptools"}}


def install_over(venv: Path, versions: dict[str, str]) -> Path:
    """A virtual environment with these releases, and all else from `.venv`; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", venv], check=True)
    python, mine = venv / "bin" / "python", ROOT / ".venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    here, there = (subprocess.check_output([one, "-c", ask], text=True).strip() for one in (python, mine))
    (Path(here) / "over.pth").write_text(f"{ROOT}\n{there}\n")
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    subprocess.run([mine, "-m", "pip", "--python", python, "install", "-q", *wanted], check=True)
    return python


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


def test_lowest() -> None:
    """Test with the lowest releases."""
    low = lowest()
    print(f"lowest: testing with {', '.join(f'{name} {version}' for name, version in low.items())}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        python = install_over(Path(folder) / "lowest", low)
        if failed := run_tests(python, *AT_ONCE, *PLACES):
            sys.exit(f"lowest: {len(failed)} tests fail, such as {failed[0]}; raise the bound in pyproject.toml")


def test_newest() -> None:
    """Test with the newest releases."""
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
        failed = run_tests(python, *AT_ONCE, *LEFT_OUT)
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
    test_lowest()
    test_newest()
