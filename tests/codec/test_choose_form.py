"""Of a chunk's forms, the one that can be decoded here."""

from dataclasses import replace

import pytest

from surfw.codec import CODECS, choose_form
from surfw.errors import ManifestError
from tests.toys import toy_chunk

CHUNK, _ = toy_chunk("layers.0", [("U8", (10,))])
(PLAIN,) = CHUNK.forms


def test_the_form_of_a_known_codec_is_taken_wherever_it_stands() -> None:
    assert CODECS == ("none", "lossless")
    assert choose_form(CHUNK) is PLAIN
    assert choose_form(replace(CHUNK, forms=(replace(PLAIN, codec="future"), PLAIN))) is PLAIN


def test_a_chunk_in_unknown_forms_only_is_refused() -> None:
    forms = (replace(PLAIN, codec="future"), replace(PLAIN, codec="int1"))
    with pytest.raises(
        ManifestError, match=r"chunk layers\.0 is stored as future, int1; this surfw decodes none, lossless"
    ):
        choose_form(replace(CHUNK, forms=forms))
