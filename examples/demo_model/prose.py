"""The text that the demo model learns: the corpus in this folder, and the prose of the repository's README.

`train.py` uses this first. Only `read_corpus` reads files. A *lesson* is one training example: a cue, which the model
reads without learning it, and the text that it learns to write after the cue.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = ("What is", "What are", "How does", "Why", "What happens with", "Do you know")
REQUESTS = ("Explain", "Describe", "Tell me about", "Write about", "I would like to hear about", "The")

# A word that starts with a digit, an option, a path, a dotted name, or a character that prose does not need.
NOT_PLAIN = re.compile(r"""\b\d|_|--|\w[./]\w|[^\w\s.,;:!?'"()-]""")


@dataclass(frozen=True)
class Lesson:
    """One training example: the loss ignores `cue`; `text` is learned and ends where a paragraph ends."""

    cue: str
    text: str


# --- reading ---------------------------------------------------------------------------------------------------------


def sentences_of(paragraph: str) -> list[str]:
    """Split a paragraph after each end of a sentence that a capital letter or the project's name follows."""
    return re.split(r"(?<=[.!?]) (?=[A-Z]|surfw\b)", paragraph)


def prose_of_markdown(page: str, *, max_words: int = 60) -> list[str]:
    """Return the plain paragraphs of a Markdown page: no code, tables, HTML, headings or images.

    Paragraphs of more than `max_words` words are split at the end of a sentence. Text that does not end like a sentence
    is left out, and so is text with paths, options, symbols or figures, because figures become outdated.
    """
    page = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1[^\n]*$", "", page)
    page = re.sub(r"(?s)<!--.*?-->|</?[a-zA-Z][^>]*>", "", page)
    page = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", page)
    page = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", page)
    page = re.sub(r"(?m)^ *(#|\||>|=+ *$|-+ *$).*$", "", page)
    page = re.sub(r"(?m)^ *([-*+]|\d+\.) +", "\n\n", page)  # each list item is a paragraph of its own
    page = re.sub(r"[*`]", "", page)

    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", page):
        taken: list[str] = []
        for sentence in sentences_of(" ".join(block.split())):
            if taken and len(" ".join([*taken, sentence]).split()) > max_words:
                paragraphs.append(" ".join(taken))
                taken = []
            taken.append(sentence)
        paragraphs.append(" ".join(taken))
    return [p for p in paragraphs if 8 <= len(p.split()) <= max_words and p[-1] in ".!?" and not NOT_PLAIN.search(p)]


def read_corpus(folder: Path, readme: Path) -> tuple[list[str], dict[str, str]]:
    """Return all paragraphs, and the SHA-256 of each file's prose (`README.md` only if it exists)."""
    blocks = {path.name: path.read_text("utf-8").split("\n\n") for path in sorted(folder.glob("*.txt"))}
    if readme.exists():
        blocks[readme.name] = prose_of_markdown(readme.read_text("utf-8"))
    prose = {name: [" ".join(block.split()) for block in taken if block.strip()] for name, taken in blocks.items()}
    digests = {name: hashlib.sha256("\n\n".join(taken).encode()).hexdigest() for name, taken in prose.items()}
    return [paragraph for taken in prose.values() for paragraph in taken], digests


# --- lessons ---------------------------------------------------------------------------------------------------------


class Teacher:
    """Turns paragraphs into lessons that also teach the model to continue unfamiliar prompts in sensible English.

    A model that has only seen whole paragraphs can only continue those: one unknown word at the start derails it. The
    other kinds of lessons teach it to return to what it knows.
    """

    def __init__(self, paragraphs: list[str], chance: random.Random) -> None:
        """Create a teacher; `chance` is the only source of randomness, so the same seed gives the same lessons."""
        self._chance = chance
        self._words = [word.strip('.,?!:"') for paragraph in paragraphs for word in paragraph.split()]
        self._kinds = (self._plain, self._later, self._spliced, self._asked)
        self._shares = (0.45, 0.10, 0.25, 0.20)

    def lesson(self, paragraph: str) -> Lesson:
        """Make one lesson from this paragraph, of a random kind."""
        (kind,) = self._chance.choices(self._kinds, self._shares)
        return kind(paragraph)

    def _plain(self, paragraph: str) -> Lesson:
        """The whole paragraph, sometimes starting with a lowercase letter, as people type."""
        if self._chance.random() < 0.1:
            paragraph = paragraph[0].lower() + paragraph[1:]
        return Lesson("", paragraph)

    def _later(self, paragraph: str) -> Lesson:
        """The paragraph from a random sentence on, because a prompt may start there."""
        sentences = sentences_of(paragraph)
        return Lesson("", " ".join(sentences[self._chance.randrange(len(sentences)) :]))

    def _spliced(self, paragraph: str) -> Lesson:
        """Unrelated words, then the paragraph from a random word on: teaches the model to follow the last words."""
        words = paragraph.split()
        start = self._chance.randrange(len(words) - 4)
        known = start + self._chance.randint(1, 3)
        cue = [*self._strangers(self._chance.randint(1, 6)), *words[start:known]]
        return Lesson(" ".join(cue), " " + " ".join(words[known:]))

    def _asked(self, paragraph: str) -> Lesson:
        """A question or request with words of the paragraph, then the paragraph: teaches it to answer questions."""
        question = self._chance.random() < 0.5
        opening = self._chance.choice(QUESTIONS if question else REQUESTS)
        telling = [word.strip('.,?!:"') for word in paragraph.split()[:16] if len(word) > 4 or word.isupper()]
        subject = self._chance.sample(telling, min(len(telling), self._chance.randint(1, 3)))
        cue = [opening, *self._strangers(self._chance.randint(0, 2)), *subject]
        if self._chance.random() < 0.25:
            cue += self._strangers(1)
        return Lesson(" ".join(cue), f"{'?' if question else '.'} {paragraph}")

    def _strangers(self, count: int) -> list[str]:
        """Random words of the corpus; about a third have their letters shuffled."""
        words = self._chance.choices(self._words, k=count)
        return ["".join(self._chance.sample(w, len(w))) if self._chance.random() < 1 / 3 else w for w in words]
