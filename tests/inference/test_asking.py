"""Asking: a batch says what each prompt gets alone, token by token without `generate`; streams say the same."""

import threading

import pytest
from asked import PROCESSOR, by_hand, picture
from tiny import tiny_model, tiny_processor

from prefixvlm.inference.asking import (
    caption_inputs,
    generate_texts,
    prompt_inputs,
    stream_answer,
    stream_text,
    user_messages,
)

QUESTIONS = ["red?", "what shape is it, and where?", ""]
NEW_TOKENS = 6


@pytest.mark.parametrize("mode", ["prefix", "bidirectional"])
def test_a_batch_of_questions_is_answered_as_each_alone(mode):
    model = tiny_model(mode).double()
    asked = [user_messages([picture(number)], question) for number, question in enumerate(QUESTIONS)]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = [by_hand(model, PROCESSOR.apply_chat_template(messages, **template)) for messages in asked]
    found = generate_texts(model.train(), PROCESSOR, prompt_inputs(PROCESSOR, asked), max_new_tokens=NEW_TOKENS)
    assert found == expected
    assert len(set(expected)) > 1


def test_captions_are_asked_for_by_images_alone():
    model = tiny_model().double()
    inputs = caption_inputs(PROCESSOR, [[picture(1)], [picture(2), picture(3)]])
    assert inputs["attention_mask"].sum(dim=1).tolist() == [4, 8]
    assert set(inputs["input_ids"][inputs["attention_mask"].bool()].tolist()) == {PROCESSOR.image_token_id}
    assert inputs["attention_mask"][0].tolist() == [0] * 4 + [1] * 4  # padded on the left
    expected = [by_hand(model, PROCESSOR(images=[picture(1)], text="", return_tensors="pt"))]
    expected += [by_hand(model, PROCESSOR(images=[picture(2), picture(3)], text="", return_tensors="pt"))]
    assert generate_texts(model, PROCESSOR, inputs, max_new_tokens=NEW_TOKENS) == expected


def test_a_single_prompt_needs_no_padding_token():
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    assert prompt_inputs(processor, [user_messages([picture(1)], "red?")])["attention_mask"].all()


@pytest.mark.parametrize("mode", ["prefix", "bidirectional"])
@pytest.mark.parametrize("question", ["what shape is it?", None, ""])
def test_a_stream_says_what_is_generated(mode, question):
    model = tiny_model(mode)
    pieces = list(stream_answer(model, PROCESSOR, [picture(1)], question, NEW_TOKENS))
    asked = prompt_inputs(PROCESSOR, [user_messages([picture(1)], question)]) if question else None
    inputs = asked or caption_inputs(PROCESSOR, [[picture(1)]])
    assert "".join(pieces) == generate_texts(model, PROCESSOR, inputs, max_new_tokens=NEW_TOKENS)[0] != ""


def test_what_goes_wrong_in_a_stream_reaches_its_reader():
    inputs = prompt_inputs(PROCESSOR, [user_messages([picture(1)], "red?")])
    with pytest.raises(ValueError, match="no_such_setting"):
        list(stream_text(tiny_model(), PROCESSOR, inputs, no_such_setting=1))


def test_a_stream_shows_all_images_in_order():
    pictures = [picture(0), picture(5)]
    said = []
    for images in (pictures, pictures[::-1], pictures[1:]):
        said.append("".join(stream_answer(tiny_model(), PROCESSOR, images, "red?", NEW_TOKENS)))
        inputs = prompt_inputs(PROCESSOR, [user_messages(images, "red?")])
        assert said[-1] == generate_texts(tiny_model(), PROCESSOR, inputs, max_new_tokens=NEW_TOKENS)[0]
    assert len(set(said)) == 3


def test_generation_ends_with_the_stream_that_is_left_early():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    stream = stream_answer(model, PROCESSOR, [picture(1)], "red?", 400)
    before, steps = set(threading.enumerate()), []
    next(stream)
    (thread,) = set(threading.enumerate()) - before
    model.register_forward_hook(lambda *arguments: steps.append(1))
    stream.close()
    assert not thread.is_alive()
    assert len(steps) < 100
