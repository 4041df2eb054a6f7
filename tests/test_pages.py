"""The pages are linked: the README leads to each of them, and no link is dead."""

import re
import subprocess

import pytest

from tests import pages
from tests.pages import PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
LONGEST_README = 260


def links(page: str) -> list[str]:
    """The repository's files that a page links to, as paths from its root, with the part after `#`."""
    text = re.sub(r"^```.*?^```$", "", pages.read(page), flags=re.MULTILINE | re.DOTALL)
    found = []
    for target in LINK.findall(text):
        if "://" not in target:
            path, mark, anchor = target.partition("#")
            place = (ROOT / page).parent / path if path else ROOT / page
            found.append(str(place.resolve().relative_to(ROOT.resolve())) + mark + anchor)
    return found


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", pages.read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_list() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert set(tracked.stdout.split()) <= set(PAGES)


def test_the_readme_is_short() -> None:
    assert len(pages.read("README.md").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES[1:])
def test_the_readme_links_every_page_once(page: str) -> None:
    assert [one.partition("#")[0] for one in links("README.md")].count(page) == 1


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(path), target


def test_errors_in_the_readme_are_those_of_troubleshooting() -> None:
    rows = pages.read("README.md").partition("| stderr says |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`…]+)", rows, re.MULTILINE)
    assert len(quoted) >= 5
    for text in quoted:
        assert text in pages.read("surfw/TROUBLESHOOTING.md")


def test_it_is_known_what_to_do_with_every_block() -> None:
    unknown = [f"{one}: {one.kind or 'no kind'}" for one in pages.blocks() if one.kind not in pages.KINDS]
    assert not unknown
