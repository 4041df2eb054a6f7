"""What the demo model learns from a Markdown page, and how a paragraph becomes a lesson."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo_model" / "prose.py"

PAGE = """\
# A heading that is not prose

<p align="center"><img src="wave.svg"></p>

surfw runs models whose weights are **elsewhere**, as [the design](docs/design.md) says.
It needs only `surfw serve` and a client.

```bash
surfw infer --prompt "this is code and must not be learned at all."
```

| a table | has no sentences in it at all, even if they look like some. |
|---|---|

- The first point of a list is a sentence of its own.
- too short.
- A paragraph with figures, such as 3.2 GB in 4 seconds, would only grow old.
- A paragraph that names a path/of/a/file or an --option is not plain English.

What does not end like a sentence is left out of the corpus
"""


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model_prose", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module by its name
    spec.loader.exec_module(module)
    return module


def test_of_a_markdown_page_only_the_prose_remains(prose: ModuleType) -> None:
    assert prose.prose_of_markdown(PAGE) == [
        "surfw runs models whose weights are elsewhere, as the design says. It needs only surfw serve and a client.",
        "The first point of a list is a sentence of its own.",
    ]


def test_a_long_paragraph_is_cut_between_sentences(prose: ModuleType) -> None:
    sentence = "Every one of these sentences has nine words, surely."
    assert prose.prose_of_markdown(" ".join([sentence] * 5), max_words=20) == [
        f"{sentence} {sentence}",
        f"{sentence} {sentence}",
        sentence,
    ]


def test_every_lesson_ends_like_its_paragraph_and_the_seed_decides_which_it_is(prose: ModuleType) -> None:
    paragraph = "A chunk is the served unit of a model. It holds one layer, and one digest proves it."
    teachers = [prose.Teacher([paragraph], random.Random(5)) for _ in range(2)]
    lessons = [[teacher.lesson(paragraph) for _ in range(200)] for teacher in teachers]
    assert lessons[0] == lessons[1]
    assert len(set(lessons[0])) > 20
    assert all(lesson.text.endswith("proves it.") for lesson in lessons[0])
    assert {bool(lesson.cue) for lesson in lessons[0]} == {True, False}
