"""Which of a chunk's forms is read."""

from dataclasses import replace

import pytest

from surfw.codec import choose_form, for_run, packed_codec
from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Form
from tests.toys import toy_chunk, toy_manifest

CHUNK, _ = toy_chunk("layers.0", [("U8", (10,))])
(PLAIN,) = CHUNK.forms
INT8, INT4 = (Form(codec, 10, PLAIN.digest, PLAIN.blocks, kinds=("raw",)) for codec in ("int8", "int4"))
NORM, _ = toy_chunk("norm", [("U8", (10,))])


def test_the_form_of_a_known_codec_is_taken_wherever_it_stands() -> None:
    assert choose_form(CHUNK) is PLAIN
    assert choose_form(replace(CHUNK, forms=(replace(PLAIN, codec="future"), PLAIN))) is PLAIN


def test_a_chunk_in_unknown_forms_only_is_refused() -> None:
    forms = (replace(PLAIN, codec="future"), replace(PLAIN, codec="int1"))
    with pytest.raises(
        ManifestError, match=r"chunk layers\.0 is stored as future, int1; this surfw decodes none, lossless"
    ):
        choose_form(replace(CHUNK, forms=forms))


@pytest.mark.parametrize(
    ("stored", "codec", "read"),
    [
        ((PLAIN,), "auto", PLAIN),
        ((PLAIN, INT8, INT4), "auto", PLAIN),
        ((PLAIN, INT8, INT4), "none", PLAIN),
        ((PLAIN, INT8, INT4), "lossless", PLAIN),
        ((PLAIN, INT8, INT4), "int4", INT4),
        ((INT4, INT8), "auto", INT8),  # the more exact one
        ((INT4,), "auto", INT4),
        ((INT4,), "int4", INT4),
    ],
)
def test_what_is_not_exact_is_read_where_it_is_asked_for_or_all_there_is(
    stored: tuple[Form, ...], codec: str, read: Form
) -> None:
    manifest = toy_manifest([replace(CHUNK, forms=stored), NORM])
    run = for_run(manifest, codec, where="here")
    assert [chunk.forms for chunk in run.chunks] == [(read,), NORM.forms]
    assert packed_codec(run) == (read.codec if read is not PLAIN else None)
    assert for_run(run, codec, where="here") is run


@pytest.mark.parametrize(
    ("stored", "codec", "says"),
    [
        (
            (PLAIN,),
            "int4",
            "not as int4; store it so: surfw chunk toy --from ws://x --store STORE --codec n",
        ),
        (
            (PLAIN, INT4),
            "int8",
            r"as it is \(none\) and as int4 in ws://x, not as int8; .* none,int4,int8 \(STORE is the",
        ),
        ((INT4,), "int8", "not as int8; ask for one of these"),
        ((INT4,), "none", r"toy is stored as int4 in ws://x, not as it is \(none\); ask for one of these"),
        ((INT4,), "lossless", "not as lossless; ask for one of these"),
    ],
)
def test_nothing_else_is_read_than_what_was_asked_for(stored: tuple[Form, ...], codec: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        for_run(toy_manifest([replace(CHUNK, forms=stored), NORM]), codec, where="ws://x")


def test_two_packed_codecs_are_never_mixed() -> None:
    other = replace(CHUNK, name="layers.1")
    manifest = toy_manifest([replace(CHUNK, forms=(INT8, INT4)), replace(other, forms=(INT4,)), NORM])
    run = for_run(manifest, "auto", where="here")
    assert [chunk.forms for chunk in run.chunks] == [(INT4,), (INT4,), NORM.forms]
    with pytest.raises(ConfigurationError, match="toy is stored as int4 in here, not as int8; ask for one of these"):
        for_run(manifest, "int8", where="here")
    manifest = toy_manifest([replace(CHUNK, forms=(INT8,)), replace(other, forms=(INT4,)), NORM])
    for codec in ("auto", "none", "int8"):
        says = (
            "no form that toy has in here holds all of its weights: layers.1 is not there as int8 and layers.0 is not "
            "there as int4; chunk its checkpoint again"
        )
        with pytest.raises(ConfigurationError, match=says):
            for_run(manifest, codec, where="here")
