import dataclasses

import numpy as np
import pytest

from mmada_jax.tokens.vocab import LLADA, SPECIAL_TOKENS, Vocab


def test_codes_and_ids_are_inverse():
    codes = np.arange(LLADA.codebook_size).reshape(2, -1)
    ids = LLADA.image_ids(codes)
    assert ids.dtype == np.int32 and len(np.unique(ids)) == codes.size
    np.testing.assert_array_equal(LLADA.image_codes(ids), codes)


def test_image_ids_stand_behind_the_text_and_inside_the_rows():
    first, last = LLADA.image_ids([0, LLADA.codebook_size - 1])
    special = {getattr(LLADA, name) for name in SPECIAL_TOKENS}
    assert len(special) == len(SPECIAL_TOKENS)
    assert max(special) < first and last < LLADA.rows


@pytest.mark.parametrize("code", [-1, LLADA.codebook_size])
def test_codes_outside_the_codebook_are_errors(code):
    with pytest.raises(ValueError, match=f"image code {code} is outside"):
        LLADA.image_ids([0, code])


@pytest.mark.parametrize("code", [-1, LLADA.codebook_size])
def test_other_ids_are_no_codes(code):
    # The mask too, and the padding rows behind the codes.
    with pytest.raises(ValueError, match="is no image token"):
        LLADA.image_codes([LLADA.image_offset, LLADA.image_offset + code])


def test_the_codes_must_fit_into_the_rows():
    rows = LLADA.image_offset + LLADA.codebook_size
    assert dataclasses.replace(LLADA, rows=rows).rows == rows
    with pytest.raises(ValueError, match=f"need {rows} embedding rows, but rows={rows - 1}"):
        dataclasses.replace(LLADA, rows=rows - 1)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
@pytest.mark.parametrize("id", [-1, LLADA.image_offset])
def test_special_tokens_are_text(name, id):
    with pytest.raises(ValueError, match=f"special token {name}={id}"):
        dataclasses.replace(LLADA, **{name: id})


def test_every_id_of_a_vocabulary_is_checked():
    numbers = {"image_offset", "codebook_size", "rows"}
    assert {f.name for f in dataclasses.fields(Vocab)} == numbers | set(SPECIAL_TOKENS)
