"""Every argument of the processor is used, or refused by its name."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor, tiny_tokenizer

from prefixvlm import PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor

PROCESSOR = tiny_processor()
IMAGE = PROCESSOR.image_token
P = PROCESSOR.num_image_tokens
PICTURE = Image.new("RGB", (16, 16), (90, 30, 30))
CHAT = [{"role": "user", "content": "a question"}]


def stored(**kwargs) -> PrefixVLMProcessor:
    """A processor whose tokenizer was made with these arguments."""
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= kwargs
    return PrefixVLMProcessor(siglip_image_processor(16), tokenizer, num_image_tokens=P)


def widths(processor=PROCESSOR, **kwargs) -> list[int]:
    return [len(row) for row in processor(text=["abc", "abcdef"], **kwargs)["input_ids"]]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": True, "text_kwargs": {"padding": False}},
        {"padding": "longest", "text_kwargs": {"padding": "max_length"}, "max_length": 9},
        {"text_kwargs": {"max_length": 9}, "max_length": 8, "padding": "max_length"},
        {"return_tensors": "pt", "common_kwargs": {"return_tensors": "np"}, "padding": True},
        {"text_kwargs": {"return_tensors": "pt"}, "images_kwargs": {"return_tensors": "np"}, "padding": True},
        {"images_kwargs": {"do_normalize": False}, "do_normalize": True},
        {"images_kwargs": {"image_mean": [0.5, 0.5, 0.5]}, "image_mean": np.zeros(3)},
    ],
    ids=str,
)
def test_what_is_given_twice_is_refused(kwargs):
    with pytest.raises(ValueError, match=r"^[a-z_]+ is given twice, as .* and as .*; give it once"):
        PROCESSOR(images=[PICTURE] * 2, text=["abc", "abcdef"], **kwargs)
    with pytest.raises(ValueError, match="is given twice"):
        PROCESSOR.apply_chat_template([CHAT, CHAT], tokenize=True, **kwargs)


def test_the_same_said_twice_is_said_once():
    assert widths(padding=True, text_kwargs={"padding": True}, common_kwargs={"padding": None}) == [6, 6]
    ids = PROCESSOR.apply_chat_template(CHAT, tokenize=True, return_tensors="np", processor_kwargs={"return_tensors": "np"})
    assert isinstance(ids, np.ndarray)
    with pytest.raises(ValueError, match="return_tensors is given twice, as 'np' and as 'pt'"):
        PROCESSOR.apply_chat_template(CHAT, tokenize=True, return_tensors="np", processor_kwargs={"return_tensors": "pt"})


REFUSED = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_overflowing_tokens": True,
    "return_token_type_ids": True,
    "return_length": True,
    "stride": 3,
    "is_split_into_words": True,
    "text_pair": ["b", "c"],
    "text_target": "b",
    "text_pair_target": "b",
    "do_center_cropp": True,
    "input_data_format": "channels_first",
    "do_convert_rgb": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused_by_name(name):
    group = "text_kwargs" if name in list(REFUSED)[:10] else "images_kwargs"
    for kwargs in ({name: REFUSED[name]}, {group: {name: REFUSED[name]}}):
        with pytest.raises(TypeError, match=rf"{name}\b"):
            PROCESSOR(images=[PICTURE] * 2, text=["abc", "abcdef"], **kwargs)
        with pytest.raises(TypeError, match=rf"{name}\b"):
            PROCESSOR(images=[PICTURE] * 2, **kwargs)
        with pytest.raises(TypeError, match=rf"{name}\b"):
            PROCESSOR.apply_chat_template(CHAT, tokenize=True, **kwargs)
    if isinstance(REFUSED[name], bool | int):
        assert widths(**{name: not REFUSED[name]} if group == "text_kwargs" else {}) == [3, 6]


def test_what_the_image_processor_does_not_know_is_refused():
    processor = tiny_processor()

    class Resizer:
        def preprocess(self, images, size=None, return_tensors=None):
            return {}

    processor.image_processor = Resizer()
    with pytest.raises(TypeError, match=r"argument\(s\) do_center_crop, do_pad; leave"):
        processor(images=PICTURE, do_pad=True, do_center_crop=True)


@pytest.mark.parametrize("name", ["paddding", "do_resise", "foo"])
def test_misspelt_names_are_refused_in_any_group(name):
    for kwargs in ({name: 1}, {"text_kwargs": {name: 1}}, {"images_kwargs": {name: 1}}, {"common_kwargs": {name: 1}}):
        with pytest.raises(TypeError, match=name):
            PROCESSOR(images=PICTURE, text="a", **kwargs)
        with pytest.raises(TypeError, match=name):
            PROCESSOR.apply_chat_template(CHAT, tokenize=True, **kwargs)
    with pytest.raises(TypeError, match=name):
        PrefixVLMProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer, **{name: 1})


def test_what_a_template_does_not_use_is_refused():
    with pytest.raises(TypeError, match="argument tools"):
        PROCESSOR.apply_chat_template(CHAT, tools=[{"name": "search"}])
    with pytest.raises(TypeError, match="argument enable_thinking"):
        PROCESSOR.apply_chat_template(CHAT, enable_thinking=True)
    plain = PROCESSOR.apply_chat_template(CHAT)
    assert PROCESSOR.apply_chat_template(CHAT, tools=None, documents=[], enable_thinking=False) == plain
    template = "{% if enable_thinking %}think{% endif %}{{ messages[0]['content'] }}"
    thinking = PROCESSOR.apply_chat_template(CHAT, chat_template=template, enable_thinking=True)
    assert thinking.startswith("think")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": True},
        {"return_tensors": "pt"},
        {"images": [PICTURE]},
        {"do_resize": False},
        {"return_labels": True},
        {"return_labels": True, "tokenize": True},
        {"return_assistant_tokens_mask": True, "tokenize": True},
        {"add_special_tokens": True, "tokenize": True},
        {"sanitize_control_tokens": False, "tokenize": True},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_what_a_rendered_text_would_drop_is_refused(kwargs):
    with pytest.raises(ValueError, match=r"tokenize=True|add_special_tokens|sanitize_control_tokens"):
        PROCESSOR.apply_chat_template(CHAT, **kwargs)


def test_what_transformers_5_says_by_default_is_taken():
    plain = PROCESSOR.apply_chat_template(CHAT, tokenize=True)
    assert PROCESSOR.apply_chat_template(CHAT, tokenize=True, sanitize_control_tokens=True) == plain
    assert PROCESSOR.apply_chat_template(CHAT, tokenize=True, add_special_tokens=False) == plain


def test_the_defaults_of_the_tokenizer_are_used():
    """As in transformers' own processors."""
    assert widths(stored(padding="max_length", max_length=8)) == [8, 8]
    assert widths(stored(padding=True)) == [6, 6]
    assert widths(stored(padding=True), padding=False) == [3, 6]
    assert widths(stored(truncation=True, max_length=4)) == [3, 4]
    assert widths(stored(truncation=True, max_length=4), max_length=5) == [3, 5]
    assert widths(stored(pad_to_multiple_of=4), padding=True) == [8, 8]
    assert widths(stored(stride=0, max_length=None)) == widths(stored(stride=5)) == [3, 6]
    assert isinstance(stored(return_tensors="np")(text="abc")["input_ids"], np.ndarray)
    right = stored(padding_side="left")
    right.tokenizer.padding_side = "right"  # what the tokenizer says now counts more
    assert right(text=["a", "bc"], padding=True)["attention_mask"][0] == [1, 0]
    for name in ("return_offsets_mapping", "is_split_into_words"):
        with pytest.raises(TypeError, match=f"tokenizer was made with {name}"):
            widths(stored(**{name: True}))


def test_a_length_alone_cuts_as_in_transformers(caplog):
    expected = PROCESSOR.tokenizer("abcdef", max_length=4)["input_ids"]
    assert PROCESSOR(text="abcdef", max_length=4)["input_ids"] == [expected]
    assert widths(max_length=4, padding=True) == [6, 6]  # here transformers needs to be told to cut
    assert widths(max_length=4, truncation=False) == [3, 6]
    with pytest.raises(ValueError, match="only_second"):
        widths(max_length=4, truncation="only_second")
    with pytest.raises(ValueError, match="longest_last"):
        widths(max_length=4, truncation="longest_last")


def test_masks_of_attention_and_of_images():
    kwargs = {"images": [[PICTURE], []], "text": ["a", "bcdefg"], "padding": True, "padding_side": "right"}
    encoded = PROCESSOR(**kwargs, return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(encoded["mm_token_type_ids"], (encoded["input_ids"] == PROCESSOR.image_token_id).long())
    assert "attention_mask" not in PROCESSOR(**kwargs, return_attention_mask=False)
    assert PROCESSOR(**kwargs, return_attention_mask=True).keys() == PROCESSOR(**kwargs).keys()


def test_texts_of_another_kind_are_refused():
    for text in (5, [5], [["split", "words"]], [None], b"bytes"):
        with pytest.raises(TypeError, match="must be a string or a list of strings"):
            PROCESSOR(text=text)


# images and their places in conversations


HOLE = {"type": "image"}


def user(*parts) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


MISMATCHES = {
    "a place and no image": (user(HOLE, "a"), None, "1 .* 0 image"),
    "a place and an empty list": (user(HOLE, "a"), [], "1 .* 0 image"),
    "more places": (user(HOLE, HOLE, "a"), [PICTURE], "2 .* 1 image"),
    "more images": (user(HOLE, "a"), [PICTURE, PICTURE], "1 .* 2 image"),
    "images and no place": (user("a"), [PICTURE], "0 .* 1 image"),
    "an image typed": (user("a", IMAGE), [PICTURE], "0 .* 1 image"),
    "a second place": (user({"type": "image", "image": PICTURE}, HOLE, "a"), None, "2 .* 1 image"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_images_and_places_of_a_conversation_must_match(name):
    messages, images, numbers = MISMATCHES[name]
    with pytest.raises(ValueError, match=numbers):
        PROCESSOR.apply_chat_template(messages, images=images, tokenize=True)
    fine = user(HOLE, "b")
    groups = [[PICTURE], images or []]
    with pytest.raises(ValueError, match=f"Text 2 has {numbers}" if images else "image"):
        PROCESSOR.apply_chat_template([fine, messages], images=groups, tokenize=True)


def test_a_template_that_drops_an_image_is_refused():
    template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=r"Conversation 1 .* has 2 image\(s\), but the chat template wrote 0"):
            PROCESSOR.apply_chat_template(user(HOLE, "a", HOLE), chat_template=template, tokenize=tokenize)
