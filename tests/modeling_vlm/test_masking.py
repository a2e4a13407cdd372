"""The mask function against the rule of the design, written a second time as plain loops."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import image_numbers, rule_mask

from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES
from prefixvlm.modeling_vlm.masking_prefix_vlm import as_additive, attention_mask_4d, image_index

layouts = st.text(alphabet="wI", min_size=1, max_size=6)  # "wIIw": a word, two images side by side, a word


@st.composite
def rows_with_images(draw):
    """A batch of rows of one length: (P, image numbers of each row)."""
    image_tokens = draw(st.integers(1, 4))
    rows = [image_numbers(row, image_tokens) for row in draw(st.lists(layouts, min_size=1, max_size=3))]
    width = max(map(len, rows))
    # shorter rows are filled with text, in front or behind, so that images begin at any place
    return image_tokens, [
        [0] * (width - len(row)) + row if draw(st.booleans()) else row + [0] * (width - len(row)) for row in rows
    ]


@given(rows_with_images())
@settings(deadline=None)
def test_images_are_separated_by_counting(drawn):
    image_tokens, rows = drawn
    expected = torch.tensor(rows)
    assert torch.equal(image_index(expected > 0, image_tokens), expected)


@given(drawn=rows_with_images(), mode=st.sampled_from(ATTENTION_MODES), data=st.data())
@settings(max_examples=300, deadline=None)
def test_mask_is_the_rule(drawn, mode, data):
    rows = drawn[1]
    width = len(rows[0])
    # padding may lie on the left, on the right and in between, also where an image stands
    flags = st.lists(st.booleans(), min_size=width, max_size=width)
    valid = data.draw(st.none() | st.lists(flags, min_size=len(rows), max_size=len(rows)), label="valid")
    numbers = st.lists(st.integers(0, 2), min_size=width, max_size=width)
    documents = data.draw(st.none() | st.lists(numbers, min_size=len(rows), max_size=len(rows)), label="documents")
    start = data.draw(st.integers(0, width - 1), label="query_start")
    length = data.draw(st.none() | st.integers(1, width - start), label="query_length")

    mask = attention_mask_4d(
        torch.tensor(valid) if valid else torch.ones(len(rows), width, dtype=torch.bool),
        torch.tensor(rows),
        mode,
        torch.arange(start, width if length is None else start + length),
        document_ids=torch.tensor(documents) if documents else None,
    )
    assert mask.dtype == torch.bool
    assert mask.shape == (len(rows), 1, length or width - start, width)
    assert mask.any(-1).all()  # a query that sees nothing gives NaN
    for index, row in enumerate(rows):
        whole = rule_mask(mode, row, valid and valid[index], documents and documents[index])
        assert torch.equal(mask[index, 0], whole[start : width if length is None else start + length])


def test_adjacent_images_stay_apart_in_prefix_mode():
    images = torch.tensor([[1, 1, 2, 2, 0]])
    mask = attention_mask_4d(torch.ones(1, 5, dtype=torch.bool), images, "prefix")[0, 0]
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask.int().tolist() == expected


def test_the_picture_in_the_docstring_is_what_the_function_does():
    picture = [re.findall(r"(?:[x.] ){4}[x.]", line) for line in attention_mask_4d.__doc__.splitlines()]
    picture = [line for line in picture if line]
    assert [len(line) for line in picture] == [3] * 5
    one_image = torch.tensor([[1, 1, 0, 0, 0]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    for column, mode in enumerate(("causal", "prefix", "bidirectional")):
        drawn = torch.tensor([[mark == "x" for mark in line[column].split()] for line in picture])
        assert torch.equal(attention_mask_4d(valid, one_image, mode)[0, 0], drawn), mode
    # the text beside it: as prefix; with a second image all rows see it too, even the earlier ones
    all_images = attention_mask_4d(valid, one_image, "prefix_all_images")
    assert torch.equal(all_images, attention_mask_4d(valid, one_image, "prefix"))
    later_image = attention_mask_4d(valid, torch.tensor([[1, 1, 0, 2, 2]]), "prefix_all_images")[0, 0]
    assert later_image[:, 3:].all()
    assert not later_image[:2, 2].any()


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="no attention mode 'sideways'"):
        attention_mask_4d(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), "sideways")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_form_is_zero_where_allowed_and_the_most_negative_number_elsewhere(dtype):
    mask = torch.tensor([[True, False], [True, True]])
    added = as_additive(mask, dtype)
    assert added.dtype == dtype
    assert torch.equal(added == 0, mask)
    assert added[0, 1] == torch.finfo(dtype).min
    assert torch.isfinite(added).all()
