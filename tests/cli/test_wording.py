"""At the command line, the library's errors name options."""

from pathlib import Path

import pytest

import surfw
from surfw.cli.wording import PHRASES, with_options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("choose one with --model (model=): a, b", "choose one with --model: a, b"),
        ("or allow it with --insecure (insecure=True)", "or allow it with --insecure"),
        ("--on-missing uninitialized (on_missing='uninitialized')", "--on-missing uninitialized"),
        ("this one is missing (on_missing='uninitialized' makes it up)", "(--on-missing uninitialized makes it up)"),
        ("to go beyond it (memory_budget, --memory-budget)", "to go beyond it (--memory-budget)"),
        ("ask for fewer (max_new_tokens)", "ask for fewer (--max-new-tokens)"),
        ("with --token-file and --ssl-certfile (token=, ssl=), or", "with --token-file and --ssl-certfile, or"),
        ("but certificates were given (ssl=); expected", "but certificates were given; expected"),
        ("unknown dtype='fp8' in config.json", "unknown dtype='fp8' in config.json"),
        (
            "a.toml: max_new_tokens is 0 (a file of [tool.surfw])",
            "a.toml: max_new_tokens is 0 (a file of [tool.surfw])",
        ),
    ],
)
def test_arguments_become_options(text: str, said: str) -> None:
    assert with_options(text).endswith(said)


@pytest.mark.parametrize("phrase", PHRASES)
def test_the_library_still_says_so(phrase: str) -> None:
    package = Path(surfw.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "wording.py"]
    assert any(phrase in path.read_text() for path in files)
