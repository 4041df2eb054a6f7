"""The guide's table of formats equals what surfw does with each of them."""

from tests import pages, regenerate


def test_the_table_of_formats_is_as_it_is_now() -> None:
    text = pages.read(regenerate.CHECKPOINTS)
    assert "<!-- formats -->" in text
    assert text == regenerate.with_formats(text), "run python -m tests.regenerate"
