"""A conversation keeps the order of its texts and images, and is written as `apply_chat_template` writes its messages."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_processor

from prefixvlm.train.data import sources
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation, Picture, Turn
from prefixvlm.train.data.forms import ChatForm, MessagesForm
from prefixvlm.train.data.pictures import PictureFinder

PROCESSOR = tiny_processor()
FINDER = PictureFinder(Path("."))
IMAGE = {"type": "image", "image": Image.new("RGB", (16, 16), "red")}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
WORDS = st.one_of(TEXT, st.sampled_from(["<image>", " <image>\n", "<|im_end|>", "  a\n"]))
ASKED = st.one_of(WORDS, st.lists(st.one_of(WORDS, st.just(None)), min_size=1, max_size=4))  # `None` is an image


def message(role: str, content, learnt: bool = True) -> dict:
    if isinstance(content, list):
        content = [IMAGE if part is None else {"type": "text", "text": part} for part in content]
    return {"role": role, "content": content} | ({} if learnt else {"weight": 0})


@st.composite
def conversations(draw, asked=ASKED):
    messages = [message("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [message("user", draw(asked)), message("assistant", draw(WORDS), draw(st.booleans()))]
    messages[-1].pop("weight", None)
    messages[-1]["content"] = "x" + messages[-1]["content"]
    return messages


def assert_written_as(sample: Conversation, messages: list[dict]) -> None:
    ((ids, labels),) = ConversationCollator(PROCESSOR, "conversation").without_pixels([sample])
    expected = PROCESSOR.apply_chat_template([messages], tokenize=True, return_dict=True, return_labels=True)
    assert [ids] == expected["input_ids"]
    assert [labels] == expected["labels"]


def without_empty(messages: list[dict]) -> list[dict]:
    """The same, with a weight of 0 for answers that hold nothing to learn."""
    return [one | {"weight": 0} if one["role"] == "assistant" and not one["content"].strip() else one for one in messages]


@settings(max_examples=200, deadline=None)
@given(conversations())
def test_messages_are_trained_as_the_processor_writes_them(messages):
    asked = [one["content"] for one in messages if one["role"] == "user"]
    has_images = any(part is IMAGE for content in asked for part in content)
    if not has_images and "<image>" in str(asked):  # the place of an image that is not there: never trained blind
        with pytest.raises(ValueError, match="the row has no image"):
            MessagesForm(FINDER).sample(lambda: {"messages": messages}, 0, "row 1")
        return
    sample = MessagesForm(FINDER).sample(lambda: {"messages": messages}, 0, "row 1")
    assert_written_as(sample, without_empty(messages))


# what stands at a placeholder loses its blanks, which only separate it
PLACED = st.lists(st.one_of(TEXT.map(str.strip).filter(lambda text: text and "<image>" not in text), st.none()), max_size=4)


@settings(max_examples=100, deadline=None)
@given(conversations(PLACED.filter(bool)))
def test_placeholders_are_the_places_of_the_images(messages):
    images = [part for one in messages if isinstance(one["content"], list) for part in one["content"] if part is IMAGE]
    row = {"image": [IMAGE["image"]] * len(images), "conversations": []}
    for one in messages:
        parts = one["content"] if isinstance(one["content"], list) else [{"type": "text", "text": one["content"]}]
        texts = ["\n<image> " if part is IMAGE else part["text"] for part in parts]
        row["conversations"].append({**one, "content": "".join(texts)})
    if images:
        sample = ChatForm(FINDER).sample(lambda: row, 0, "row 1")
        joined = [{**one, "content": _joined(one["content"], bool(images) and one["role"] == "user")} for one in messages]
        assert_written_as(sample, without_empty(joined))


def _joined(content, placed: bool):
    """Parts with neighbouring texts made one, as a text with placeholders has them."""
    if not isinstance(content, list) or not placed:
        return content
    found: list = []
    for part in content:
        if part is not IMAGE and found and found[-1] is not IMAGE:
            found[-1] = {"type": "text", "text": found[-1]["text"] + part["text"]}
        else:
            found.append(part)
    return found


def test_an_image_in_a_later_turn_stays_there():
    turns = [
        Turn("user", ("a",)),
        Turn("assistant", ("b",)),
        Turn("user", (Picture(IMAGE["image"]), "c")),
        Turn("assistant", ("d",)),
    ]
    written = ConversationCollator(PROCESSOR, "conversation").written(Conversation(turns, "row 1"))
    assert written.index("a<|im_end|>") < written.index("<|image_pad|>") < written.index("c<|im_end|>")


@pytest.mark.parametrize("text_format", ["caption", "conversation"])
def test_an_answer_that_is_not_learnt_has_no_labels(text_format):
    turns = [Turn("user", ("q",)), Turn("assistant", ("no",), False), Turn("user", ("r",)), Turn("assistant", ("yes",))]
    ((_, labels),) = ConversationCollator(PROCESSOR, text_format).without_pixels([Conversation(turns, "row 1")])
    learnt = PROCESSOR.tokenizer.decode([label for label in labels if label != -100])
    assert learnt == "yes" + ("<|endoftext|>" if text_format == "caption" else "<|im_end|>")


def test_a_document_is_learnt_with_its_images_in_their_places(tmp_path):
    for name in "ab":
        IMAGE["image"].save(tmp_path / f"{name}.png")
    row = {"images": ["a.png", None, "b.png", None, None], "texts": [None, "One.", None, "Two.", "Three."]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    sample = sources.load("interleaved", path=str(tmp_path / "rows.jsonl"))[0]
    collator = ConversationCollator(PROCESSOR, "caption")
    image, end = "<|image_pad|>", "<|endoftext|>"
    assert collator.written(sample) == f"{image}One.{image}Two. Three.{end}"
    batch = collator([sample])
    assert len(batch["pixel_values"]) == 2
    labels = batch["labels"][0]
    assert PROCESSOR.tokenizer.decode(labels[labels != -100]) == f"One.Two. Three.{end}"
