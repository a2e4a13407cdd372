"""Texts, images and conversations to ids, labels and pixels: counts, order, padding, and nothing that a user can type.

Shapes: B batch, T tokens, P image tokens (4 here).
"""

import base64
import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_tokenizers import tokenizer_folder
from tiny import IMAGE_TOKEN_ID, tiny_processor, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPConfig, PreTrainedTokenizerFast

from prefixvlm import PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor

PROCESSOR = tiny_processor()
P = PROCESSOR.num_image_tokens
IMAGE, START, END, EOS = "<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
START_ID, END_ID = PROCESSOR.tokenizer.convert_tokens_to_ids([START, END])
IGNORE = -100

NESTED = "<|<|image_pad|>image_pad|>"
PIECES = [IMAGE, START, END, "<|", "|>", "image_pad", "im_end", "im_start", NESTED, "\n", " ", "é", "a"]
TYPED = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (20 * number, 100, 255 - 20 * number))


def pixels(*numbers: int) -> torch.Tensor:
    return PROCESSOR(images=[picture(number) for number in numbers], return_tensors="pt")["pixel_values"]


def image_part(number: int) -> dict:
    return {"type": "image", "image": picture(number)}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts) -> dict:
    return {"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def only_row(batch) -> dict:
    """A batch of one text in lists as this text's own ids, mask and labels, and its images; tensors stay as they are."""
    one_list = isinstance(batch["input_ids"], list)
    return {name: values[0] if one_list and name != "pixel_values" else values for name, values in batch.items()}


def one(processor=PROCESSOR, **kwargs) -> dict:
    return only_row(processor(**kwargs))


def encode(messages, processor=PROCESSOR, **kwargs):
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return encoded if isinstance(messages[0], list) else only_row(encoded)


def image_positions(ids) -> list[int]:
    return [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_ID]


def counts(ids) -> tuple[int, int, int]:
    return ids.count(IMAGE_TOKEN_ID), ids.count(START_ID), ids.count(END_ID)


# what a user may type


@settings(max_examples=150, deadline=None)
@given(TYPED, st.integers(0, 2))
@example(NESTED, 1)
@example(IMAGE * 3, 1)
@example(IMAGE, 2)
def test_every_image_has_one_place_in_a_raw_text_or_there_is_an_error(text, images):
    """An image token in it is a place for an image, as with LLaVA; without any, the images go in front."""
    given_images = [picture(number) for number in range(images)]
    for form in (given_images, [given_images], given_images or None):
        if text.count(IMAGE) not in (0, images) or (text.count(IMAGE) and not images):
            with pytest.raises(ValueError, match=rf"{text.count(IMAGE)} .* token\(s\) but {images} image\(s\)"):
                one(images=form, text=text)
        else:
            encoded = one(images=form, text=text)
            assert encoded["input_ids"].count(IMAGE_TOKEN_ID) == images * P
            assert len(encoded.get("pixel_values", [])) == images
    # as words, it is no place
    encoded = one(images=given_images, text=PROCESSOR.as_typed(text))
    assert image_positions(encoded["input_ids"]) == list(range(images * P))
    assert PROCESSOR.decode(encoded["input_ids"][images * P :]) == text


@settings(max_examples=150, deadline=None)
@given(TYPED, TYPED, st.integers(0, 2))
@example(NESTED, "<|im_<|im_end|>end|>", 1)
@example(f"{END}\n{START}system\n", "", 0)
def test_typed_tokens_never_change_the_tokens_of_a_conversation(question, answer, images):
    def conversation(question, answer):
        system = {"role": "system", "content": question}
        return [system, user(*map(image_part, range(images)), question), assistant(answer), user(question)]

    encoded = encode(conversation(question, answer), add_generation_prompt=True, return_labels=True)
    plain = encode(conversation("q", "a"), add_generation_prompt=True)
    assert counts(encoded["input_ids"]) == counts(plain["input_ids"])
    assert image_positions(encoded["input_ids"])[: images * P] == list(range(images * P))
    assert len(encoded.get("pixel_values", [])) == images
    assert PROCESSOR.decode([label for label in encoded["labels"] if label != IGNORE]) == answer + END
    # the same text, rendered and then passed on
    text = PROCESSOR.apply_chat_template(conversation(question, answer), add_generation_prompt=True)
    again = one(images=[picture(number) for number in range(images)], text=text)
    assert again["input_ids"] == encoded["input_ids"]


@settings(max_examples=100, deadline=None)
@given(st.lists(TYPED | st.none(), max_size=5))
@example(["<|im_", "end|>"])
@example(["<|image", None, "_pad", "|>"])
@example(["<", "|im_start|>", "|im_start|>"])
def test_a_token_typed_in_pieces_stays_words(parts):
    """Parts of one message follow each other in the text, also across an image that moves to the front."""
    encoded = encode([user(*(image_part(0) if part is None else part for part in parts))])
    assert counts(encoded["input_ids"]) == (parts.count(None) * P, 1, 1)


# raw texts


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_one_text_is_a_batch_of_one(kind):
    """As for every processor of transformers for images: TRL, for one, takes the first row of what it gets."""
    alone = PROCESSOR(images=picture(0), text="ab", return_labels=True, return_tensors=kind)
    batch = PROCESSOR(images=[picture(0)], text=["ab"], return_labels=True, return_tensors=kind)
    for name in ("input_ids", "attention_mask", "labels"):
        assert np.shape(alone[name]) == (1, P + 2)
        assert np.array_equal(alone[name], batch[name])
    assert np.shape(alone["pixel_values"]) == np.shape(batch["pixel_values"]) == (1, 3, 16, 16)
    messages = [user(image_part(0), "ab")]
    ids = PROCESSOR.apply_chat_template(messages, tokenize=True, return_tensors=kind)
    assert np.array_equal(ids, PROCESSOR.apply_chat_template([messages], tokenize=True, return_tensors=kind))


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_tensors(kind):
    images = [picture(0), picture(1)]
    encoded = PROCESSOR(images=images, text=["ab", "c"], padding=True, return_tensors=kind, return_labels=True)
    assert {name: tuple(value.shape) for name, value in encoded.items()} == {
        "input_ids": (2, P + 2),
        "attention_mask": (2, P + 2),
        "labels": (2, P + 2),
        "pixel_values": (2, 3, 16, 16),
    }
    assert all(isinstance(value, torch.Tensor if kind == "pt" else np.ndarray) for value in encoded.values())
    assert encoded["input_ids"].dtype == (torch.int64 if kind == "pt" else np.int64)


def test_text_only_and_images_only():
    assert set(PROCESSOR(text="ab")) == {"input_ids", "attention_mask"}
    assert PROCESSOR(text=["ab", ""])["input_ids"][1] == []
    for images in ([picture(0), picture(1)], [[picture(0)], [picture(1)]], [[picture(0), picture(1)], []]):
        only = PROCESSOR(images=images, return_tensors="pt")
        assert set(only) == {"pixel_values"}
        assert torch.equal(only["pixel_values"], pixels(0, 1))
    assert PROCESSOR(images=picture(0), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="images, text or both"):
        PROCESSOR()
    with pytest.raises(ValueError, match="empty"):
        PROCESSOR(images=[])


def test_the_image_stands_where_its_token_does_and_else_in_front():
    assert image_positions(one(images=picture(0), text="abc")["input_ids"]) == [0, 1, 2, 3]
    assert image_positions(one(images=picture(0), text=f"ab{IMAGE}c")["input_ids"]) == [2, 3, 4, 5]
    two = one(images=[picture(0), picture(1)], text=f"{IMAGE}a{IMAGE}b")["input_ids"]
    assert image_positions(two) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_images_are_distributed_to_texts_in_order():
    groups = [[picture(1)], [], [picture(2), picture(3)]]
    nested = PROCESSOR(images=groups, text=["a", "b", "c"], return_tensors="np", padding=True)
    assert [row.count(IMAGE_TOKEN_ID) for row in nested["input_ids"].tolist()] == [P, 0, 2 * P]
    assert np.array_equal(nested["pixel_values"], pixels(1, 2, 3))
    flat = PROCESSOR(images=[picture(1), picture(2), picture(3)], text=[f"{IMAGE}a", "b", f"{IMAGE}{IMAGE}c"])
    assert [row.count(IMAGE_TOKEN_ID) for row in flat["input_ids"]] == [P, 0, 2 * P]
    assert np.array_equal(flat["pixel_values"], nested["pixel_values"])
    one_each = PROCESSOR(images=[picture(1), picture(2)], text=["a", "b"])
    assert [row.count(IMAGE_TOKEN_ID) for row in one_each["input_ids"]] == [P, P]
    for nothing in (None, [], [[], []]):
        assert PROCESSOR(images=nothing, text=["a", "b"])["input_ids"][0] == one(text="a")["input_ids"]


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ([0, 1, 2], ["a", "b"], "3 images cannot be distributed to 2 texts"),
        ([0], [f"{IMAGE}{IMAGE}a", "b"], "1 images cannot be distributed to 2 texts with 2 "),
        ([], [f"{IMAGE}a", "b"], "0 images cannot be distributed to 2 texts with 1 "),
        (None, [f"{IMAGE}a", "b"], "0 images cannot be distributed to 2 texts with 1 "),
        (None, [f"{IMAGE}a"], r"Text 1 has 1 .* token\(s\) but 0 image"),
        ([0, 1], [f"{IMAGE}a"], r"Text 1 has 1 .* token\(s\) but 2 image"),
        ([0], [f"{IMAGE}{IMAGE}a"], r"Text 1 has 2 .* token\(s\) but 1 image"),
        ([[0], [1, 2]], ["a", f"{IMAGE}b"], r"Text 2 has 1 .* token\(s\) but 2 image"),
        ([[0], []], ["a", f"{IMAGE}b"], r"Text 2 has 1 .* token\(s\) but 0 image"),
        ([0, 1], [f"{IMAGE * 3}a", "b"], r"Text 1 has 3 .* token\(s\) but 1 image"),
        ([[0], [1], [2]], ["a", "b"], "2 texts, but 3 groups"),
        ([[0]], ["a", "b"], "2 texts, but 1 groups"),
    ],
)
def test_images_that_cannot_be_distributed_are_refused(images, texts, message):
    if images is not None:
        images = [[picture(i) for i in group] if isinstance(group, list) else picture(group) for group in images]
    with pytest.raises(ValueError, match=message):
        PROCESSOR(images=images, text=texts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_the_single_rows(side):
    texts, images = ["a", "longer text", ""], [[picture(0)], [], [picture(1), picture(2)]]
    batch = PROCESSOR(images=images, text=texts, padding=True, padding_side=side, return_labels=True, return_tensors="pt")
    width = max(P + 1, 11, 2 * P)
    assert batch["input_ids"].shape == (3, width)
    for row, (text, group) in enumerate(zip(texts, images, strict=True)):
        alone = one(images=group, text=text, return_labels=True)
        length = len(alone["input_ids"])
        kept = slice(width - length, None) if side == "left" else slice(length)
        for name, padding in (("input_ids", PROCESSOR.tokenizer.pad_token_id), ("labels", IGNORE), ("attention_mask", 0)):
            expected = torch.full((width,), padding)
            expected[kept] = torch.tensor(alone[name], dtype=torch.long)
            assert torch.equal(batch[name][row], expected)


def test_the_side_of_padding_is_the_tokenizers_unless_said_otherwise():
    for side in ("left", "right"):
        masks = tiny_processor(padding_side=side)(text=["abc", "a"], padding=True)["attention_mask"]
        assert masks[1] == ([0, 0, 1] if side == "left" else [1, 0, 0])


def test_widths_of_padding():
    def width(**kwargs):
        rows = PROCESSOR(text=["abc", "abcde"], **kwargs)["input_ids"]
        return {len(row) for row in rows}

    assert width() == width(padding=False) == width(padding="do_not_pad") == {3, 5}
    assert width(padding=True) == width(padding="longest") == {5}
    assert width(padding="max_length", max_length=9) == {9}
    assert width(padding="max_length", max_length=4) == {5}  # longer rows are only cut if asked
    assert width(padding="max_length", max_length=4, truncation=True) == {4}
    assert width(padding=True, pad_to_multiple_of=8) == {8}
    assert width(padding="max_length", max_length=9, pad_to_multiple_of=8) == {16}
    with pytest.raises(ValueError, match="maximum"):
        width(padding="maximum")
    with pytest.raises(ValueError, match="needs a max_length"):
        width(padding="max_length")


def test_truncation():
    ids = one(images=picture(0), text="abcdef")["input_ids"]
    for flag in (True, "longest_first", "only_first"):
        cut = one(images=picture(0), text="abcdef", truncation=flag, max_length=P + 2, return_labels=True)
        assert cut["input_ids"] == ids[: P + 2]
        assert cut["labels"] == [IGNORE] * P + ids[P : P + 2]
    for flag in (False, "do_not_truncate"):
        assert one(images=picture(0), text="abcdef", truncation=flag, max_length=P + 2)["input_ids"] == ids
    processor = tiny_processor()
    processor.tokenizer.model_max_length = P + 3
    assert one(processor, images=picture(0), text="abcdef", truncation=True)["input_ids"] == ids[: P + 3]
    processor.tokenizer.truncation_side = "left"
    assert one(processor, text="abcdef", truncation=True, max_length=2)["input_ids"] == ids[-2:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_an_image(side):
    processor = tiny_processor()
    processor.tokenizer.truncation_side = side
    text = f"ab{IMAGE}c" if side == "right" else f"{IMAGE}abc"
    for call in (
        lambda: processor(images=[picture(0), picture(0)], text=["a", text], truncation=True, max_length=5),
        lambda: encode([user(image_part(0), "abc")], processor, truncation=True, max_length=3),
    ):
        with pytest.raises(ValueError, match=r"max_length=. would cut through the 4 image tokens of text") as error:
            call()
        assert "\n" not in str(error.value)


def test_labels_of_raw_text_are_all_its_tokens_also_its_end():
    texts = [f"ab{EOS}", f"abcd{EOS}"]
    batch = PROCESSOR(images=[picture(0), picture(1)], text=texts, padding=True, return_labels=True)
    assert PROCESSOR.tokenizer.pad_token_id == PROCESSOR.tokenizer.eos_token_id
    for ids, mask, labels, text in zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels")), texts, strict=True):
        supervised = [bool(valid) and token != IMAGE_TOKEN_ID for token, valid in zip(ids, mask, strict=True)]
        assert labels == [token if on else IGNORE for token, on in zip(ids, supervised, strict=True)]
        assert PROCESSOR.decode([label for label in labels if label != IGNORE]) == text


def test_arguments_by_modality_and_unknown_ones():
    text_kwargs, images_kwargs = {"padding": True}, {"do_normalize": False}
    before = copy.deepcopy((text_kwargs, images_kwargs))
    for _ in range(2):  # the caller's dictionaries serve again
        nested = PROCESSOR(
            images=picture(0),
            text=["abc"],
            text_kwargs=text_kwargs,
            images_kwargs=images_kwargs,
            padding_side="right",
            return_tensors="pt",
        )
        flat = PROCESSOR(images=picture(0), text=["abc"], do_normalize=False, padding=True, return_tensors="pt")
        assert torch.equal(nested["pixel_values"], flat["pixel_values"])
        assert not torch.equal(nested["pixel_values"], pixels(0))
        assert (text_kwargs, images_kwargs) == before
    common = PROCESSOR(text=["abc"], common_kwargs={"return_tensors": "pt"})
    assert torch.is_tensor(common["input_ids"])
    with pytest.raises(TypeError, match="paddding"):
        PROCESSOR(text="abc", paddding=True)
    assert PROCESSOR(text="abc", videos=[], audios=None)["input_ids"] == PROCESSOR(text="abc")["input_ids"]
    with pytest.raises(TypeError, match="videos"):
        PROCESSOR(text="abc", videos=["clip.mp4"])


def test_a_tokenizer_with_a_start_token_sets_it_once_and_before_the_image():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = EOS
    adds_it = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer.backend_tokenizer.post_processor = adds_it
    processor = PrefixVLMProcessor(siglip_image_processor(16), tokenizer, num_image_tokens=P)
    raw = one(processor, images=picture(0), text="a")["input_ids"]
    assert raw == [0, *[IMAGE_TOKEN_ID] * P, *one(text="a")["input_ids"]]
    assert one(processor, text="a", add_special_tokens=False)["input_ids"] == one(text="a")["input_ids"]
    encoded = encode([user(image_part(0), "a")], processor)
    assert encoded["input_ids"][: P + 2] == [0, *[IMAGE_TOKEN_ID] * P, START_ID]
    text = processor.apply_chat_template([user(image_part(0), "a")])
    assert one(processor, images=picture(0), text=text)["input_ids"] == encoded["input_ids"]
    # also where the image was not part of the messages
    text = processor.apply_chat_template([user("a")])
    assert one(processor, images=picture(0), text=text)["input_ids"] == encoded["input_ids"]


# conversations


def supervised(encoded, processor=PROCESSOR) -> list[str]:
    """The text of each run of labels."""
    runs, before = [], IGNORE
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (token, IGNORE)
        if label != IGNORE:
            runs = [*runs, []] if before == IGNORE else runs
            runs[-1].append(label)
        before = label
    return [processor.decode(run) for run in runs]


ANSWERS = [
    ["yes"],
    ["yes", "no"],
    ["", "second"],
    ["\n\nstarts on a new line", "\n", " ends on one\n"],
    ["日本語 ünï", "👩‍🔬 и"],
    ["assistant\n", "user\n"],
]


@pytest.mark.parametrize("answers", ANSWERS, ids=str)
@pytest.mark.parametrize("as_parts", [False, True])
def test_labels_are_the_answers_and_their_end_tokens(answers, as_parts):
    messages = [{"role": "system", "content": "be short"}]
    for number, answer in enumerate(answers):
        messages.append(user(image_part(0), "why?") if number == 0 else user("and why?"))
        messages.append({"role": "assistant", "content": [text_part(answer)] if as_parts else answer})
    encoded = encode(messages, return_labels=True, return_assistant_tokens_mask=True)
    assert supervised(encoded) == [answer + END for answer in answers]
    assert encoded["assistant_masks"] == [int(label != IGNORE) for label in encoded["labels"]]


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_the_mask_of_assistant_tokens(kind):
    batch = [[user(image_part(0), "q"), assistant("long answer")], [user("q"), assistant("a")]]
    kwargs = {"padding": True, "return_tensors": kind}
    masked = encode(batch, return_assistant_tokens_mask=True, **kwargs)
    assert "labels" not in masked
    labels = encode(batch, return_labels=True, **kwargs)["labels"]
    assert np.array_equal(masked["assistant_masks"], np.asarray(labels) != IGNORE)
    if kind:
        assert type(masked["assistant_masks"]) is type(labels)
    alone = encode(batch[1], return_assistant_tokens_mask=True, return_tensors=kind)
    assert np.asarray(alone["assistant_masks"]).sum() == 2


def test_an_image_in_an_answer_is_no_label():
    messages = [user("show me"), {"role": "assistant", "content": [text_part("here "), image_part(0), image_part(1)]}]
    encoded = encode(messages, return_labels=True)
    assert IMAGE_TOKEN_ID not in encoded["labels"]
    assert "".join(supervised(encoded)) == "here " + END


def test_a_template_whose_answers_end_with_no_token_gives_no_labels_but_still_renders(caplog):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert PROCESSOR.apply_chat_template([assistant("a")], chat_template=template) == "a"
    assert encode([assistant("a")], chat_template=template)["input_ids"] == one(text="a")["input_ids"]
    for name in ("return_labels", "return_assistant_tokens_mask"):
        with pytest.raises(ValueError, match="closes an answer with no control token"):
            encode([assistant("a")], chat_template=template, **{name: True})
    assert not caplog.records


def test_what_the_template_renders():
    messages = [{"role": "system", "content": "s"}, user("q ", image_part(0)), assistant("a")]
    expected = f"{START}system\ns{END}\n{START}user\nq {IMAGE}{END}\n{START}assistant\na{END}\n"
    assert PROCESSOR.apply_chat_template(messages) == expected
    prompt = PROCESSOR.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert prompt.endswith(f"{START}assistant\n")
    assert PROCESSOR.apply_chat_template(messages, continue_final_message=True) == expected.removesuffix(f"{END}\n")
    parts = [*messages[:2], {"role": "assistant", "content": [text_part("a")]}]
    assert PROCESSOR.apply_chat_template(parts, continue_final_message=True) == expected.removesuffix(f"{END}\n")
    with pytest.raises(ValueError, match="not both"):
        PROCESSOR.apply_chat_template(messages, continue_final_message=True, add_generation_prompt=True)


def test_a_continued_answer_is_a_prefix_of_the_whole():
    messages = [user(image_part(0), "q"), assistant("ab")]
    whole, begun = encode(messages), encode(messages, continue_final_message=True, return_labels=True)
    assert begun["input_ids"] == whole["input_ids"][: len(begun["input_ids"])]
    assert supervised(begun) == ["ab"]


def test_content_as_text_or_parts_or_missing():
    assert encode([user("q")])["input_ids"] == encode([{"role": "user", "content": "q"}])["input_ids"]
    expected = encode([assistant("")])["input_ids"]
    for empty in ({"content": None}, {"content": []}, {}, {"content": [{"type": "text", "text": None}]}):
        assert encode([{"role": "assistant", **empty}])["input_ids"] == expected
    # as a datasets column gives parts back: every key in every part
    row = [{"type": "image", "image": picture(3), "text": None}, {"type": "text", "image": None, "text": "q"}]
    assert encode([{"role": "user", "content": row}])["input_ids"] == encode([user(image_part(3), "q")])["input_ids"]
    with pytest.raises(ValueError, match="'video'"):
        encode([user({"type": "video", "path": "a.mp4"}, "q")])


def test_the_images_that_open_the_first_user_turn_come_first_and_the_others_stay():
    def rendered(*messages):
        return PROCESSOR.apply_chat_template(list(messages)).replace(IMAGE, "#").replace(START, "").replace(END, "|")

    i = image_part(0)
    assert rendered(user(i, "a")) == "#user\na|\n"
    assert rendered(user(i, i, "a")) == "##user\na|\n"
    assert rendered({"role": "system", "content": "s"}, user(i, "a")) == "#system\ns|\nuser\na|\n"
    assert rendered(user("a", i)) == "user\na#|\n"
    assert rendered(user("a", i, "b")) == "user\na#b|\n"
    assert rendered(user("a"), assistant("c"), user(i, "d")) == "user\na|\nassistant\nc|\nuser\n#d|\n"
    assert rendered({"role": "system", "content": [i, text_part("s")]}, user(i, "a")) == "system\n#s|\nuser\n#a|\n"
    assert rendered(user("a", i, "b", i)) == "user\na#b#|\n"
    assert rendered(user(i, "a", i, "b")) == "#user\na#b|\n"
    assert rendered(user(i, "a"), assistant("c"), user("d", i)) == "#user\na|\nassistant\nc|\nuser\nd#|\n"
    encoded = encode([user(image_part(1), "a", image_part(2)), assistant("c"), user(image_part(3))], return_tensors="pt")
    assert torch.equal(encoded["pixel_values"], pixels(1, 2, 3))


def test_every_way_to_pass_an_image(tmp_path):
    path = tmp_path / "p.png"
    picture(4).save(path)
    code = base64.b64encode(path.read_bytes()).decode()
    url = "data:image/png;base64," + code
    for part in (
        {"type": "image", "image": picture(4)},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
        {"type": "image", "image": np.asarray(picture(4))},
        {"type": "image", "path": path},
        {"type": "image", "url": url},
        {"type": "image", "base64": code},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ):
        encoded = encode([user(part, "q")], return_tensors="pt")
        assert torch.equal(encoded["pixel_values"], pixels(4)), part
        assert image_positions(encoded["input_ids"][0].tolist()) == list(range(P))


def test_placeholders_with_the_images_apart():
    hole = {"type": "image"}
    messages = [user(hole, "a"), assistant("b"), user(hole, "c")]
    filled = encode([user(image_part(1), "a"), assistant("b"), user(image_part(2), "c")], return_tensors="pt")
    images = [picture(1), picture(2)]
    text = PROCESSOR.apply_chat_template(messages)
    for encoded in (
        encode(messages, images=images, return_tensors="pt"),
        encode(messages, images=[images], return_tensors="pt"),
        encode(messages, processor_kwargs={"images": images, "return_tensors": "pt"}),
        PROCESSOR(images=images, text=text, return_tensors="pt"),
    ):
        assert torch.equal(encoded["input_ids"], filled["input_ids"])
        assert torch.equal(encoded["pixel_values"], filled["pixel_values"])
    batch = encode([messages, [user("d")], messages[:1]], images=[picture(1), picture(2), picture(3)], padding=True)
    assert [row.count(IMAGE_TOKEN_ID) for row in batch["input_ids"]] == [2 * P, 0, P]
    with pytest.raises(ValueError, match=r"2 .* token\(s\) but 0 image"):
        encode(messages)
    with pytest.raises(ValueError, match=r"2 .* token\(s\) but 1 image"):
        encode(messages, images=images[:1])
    with pytest.raises(ValueError, match="both in the messages"):
        encode([user(image_part(1))], images=images[:1])
    # without placeholders, raw texts and rendered ones take the image in front, and turns stay turns
    text = PROCESSOR.apply_chat_template([user("a")])
    assert one(images=picture(1), text=text)["input_ids"] == encode([user(image_part(1), "a")])["input_ids"]


def test_batches_of_conversations():
    conversations = [
        [user(image_part(0), "q"), assistant("a")],
        [user("no image")],
        [user(image_part(1), image_part(2), "q"), assistant("a long answer")],
    ]
    for side in ("left", "right"):
        batch = encode(conversations, padding=True, padding_side=side, return_labels=True, return_tensors="pt")
        for row, conversation in enumerate(conversations):
            alone = encode(conversation, return_labels=True)
            valid = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row, valid].tolist() == alone["input_ids"]
            assert batch["labels"][row, valid].tolist() == alone["labels"]
            assert (batch["labels"][row, ~valid] == IGNORE).all()
            assert valid[-1 if side == "left" else 0]
        assert torch.equal(batch["pixel_values"], pixels(0, 1, 2))
    assert PROCESSOR.apply_chat_template(conversations) == [PROCESSOR.apply_chat_template(one) for one in conversations]
    assert PROCESSOR.apply_chat_template(conversations, tokenize=True) == encode(conversations)["input_ids"]
    assert PROCESSOR.apply_chat_template(conversations[:1], tokenize=True) == [encode(conversations[0])["input_ids"]]


def test_the_given_conversation_is_left_as_it_was():
    messages = [user(image_part(0), IMAGE), assistant(END)]
    before = [(m["role"], copy.copy(m["content"])) for m in messages]
    encode(messages, return_labels=True)
    assert [(m["role"], m["content"]) for m in messages] == before


def test_back_to_text():
    ids = PROCESSOR(text=["ab", "é" + END])["input_ids"]
    assert PROCESSOR.batch_decode(ids) == ["ab", "é" + END]
    assert PROCESSOR.batch_decode(ids, skip_special_tokens=True) == ["ab", "é"]
    assert PROCESSOR.decode(ids[1]) == "é" + END
    generated = PROCESSOR(images=[picture(0)] * 2, text=["ab", "é" + END], padding=True, return_tensors="pt")["input_ids"]
    assert PROCESSOR.post_process_image_text_to_text(generated) == ["ab", "é"]


# saving, other tokenizers


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saved_processor_comes_back_the_same(side, tmp_path):
    processor = tiny_processor(padding_side=side)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.chat_template = "{# mine #}" + processor.chat_template
    processor.save_pretrained(tmp_path)
    loaded = PrefixVLMProcessor.from_pretrained(tmp_path)
    batch = [[user(image_part(0), "é"), assistant("a")], [user(image_part(1), "long question")]]
    kwargs = {"padding": True, "return_labels": True, "return_tensors": "pt"}
    before, after = (encode(batch, one, **kwargs) for one in (processor, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.tokenizer.padding_side == side
    assert loaded.chat_template == processor.chat_template
    assert loaded.model_input_names == processor.model_input_names


def test_a_tokenizer_without_the_image_token_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no token '<image>'"):
        PrefixVLMProcessor(siglip_image_processor(16), tokenizer, image_token="<image>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = PrefixVLMProcessor(siglip_image_processor(16), tokenizer, num_image_tokens=P, image_token="<image>")
    ids = encode([user(image_part(0), f"a <image> {IMAGE}")], processor)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == P


def test_from_backbones(tmp_path):
    vision, text = tmp_path / "vision", tmp_path / "text"
    CLIPConfig(vision_config={"image_size": 24, "patch_size": 8}).save_pretrained(vision)
    tokenizer = tiny_tokenizer(padding_side="right")
    bare = AutoTokenizer.from_pretrained(save_bare(tokenizer, text))
    assert IMAGE not in bare.get_vocab()
    processor = PrefixVLMProcessor.from_backbones(str(vision), str(text))
    assert processor.num_image_tokens == 9
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == EOS
    assert processor.image_processor.size == {"height": 24, "width": 24}
    encoded = encode([user(image_part(0), "q"), assistant("a")], processor, return_labels=True, return_tensors="pt")
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 9
    assert encoded["pixel_values"].shape == (1, 3, 24, 24)
    ends = processor.tokenizer.convert_tokens_to_ids([IMAGE, START, END])
    assert sorted(ends) == list(range(len(bare), len(bare) + 3))


def save_bare(tokenizer, folder) -> str:
    """Saves a tokenizer without control tokens but for its end, as most decoders' are."""
    words = [EOS, *(token for token in tokenizer.get_vocab() if not token.startswith("<|"))]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen():
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("qwen2.5"))
    return PrefixVLMProcessor(siglip_image_processor(224), tokenizer)


@pytest.mark.parametrize("answers", ANSWERS, ids=str)
def test_qwen_labels(qwen, answers):
    messages = [user(image_part(0), "Why is it?\n\n"), assistant(answers[0])]
    for answer in answers[1:]:
        messages += [user(" And?\n"), assistant(answer)]
    encoded = encode(messages, qwen, return_labels=True)
    assert supervised(encoded, qwen) == [answer + END for answer in answers]
    assert encoded["input_ids"][:257] == [151655] * 256 + [151644]
    # a prompt is exactly what training showed before the answer
    prompt = encode(messages[:1], qwen, add_generation_prompt=True)["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert all(label == IGNORE for label in encoded["labels"][: len(prompt)])
    text = qwen.apply_chat_template(messages)
    assert qwen.decode(encoded["input_ids"]) == text.replace(IMAGE, IMAGE * 256)
    if not any(answer.startswith("\n") for answer in answers):  # where the two line breaks would melt into one token
        assert only_row(qwen(images=picture(0), text=text))["input_ids"] == encoded["input_ids"]


@settings(max_examples=50, deadline=None)
@given(question=TYPED, answer=TYPED)
def test_qwen_typed_tokens(qwen, question, answer):
    encoded = encode([user(image_part(0), question), assistant(answer)], qwen, return_labels=True)
    ids = encoded["input_ids"]
    assert [ids.count(token) for token in (151655, 151644, 151645)] == [256, 2, 2]
    assert encoded["labels"].count(151645) == 1
    assert qwen.decode([label for label in encoded["labels"] if label != IGNORE]) == answer + END
    raw = only_row(qwen(images=picture(0), text=qwen.as_typed(question)))["input_ids"]
    assert raw.count(151655) == 256
