"""transformers' pipelines say what the model says, in every way that people call them, without the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from piped import COLOURS, QUESTIONS, TOKENS, chat
from tiny import tiny_model, tiny_processor

from prefixvlm.inference.asking import caption_inputs, generate_texts, prompt_inputs

SCRIPT = Path(__file__).parent.parent / "helpers" / "piped.py"
PICTURES = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    output = folder / "said.json"
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder), str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def answers(inputs) -> list[str]:
    model, processor = tiny_model(), tiny_processor()
    return [generate_texts(model, processor, one, max_new_tokens=TOKENS)[0] for one in inputs]


def asked(questions) -> list[str]:
    processor = tiny_processor()
    return answers(prompt_inputs(processor, [chat(*pair)]) for pair in zip(PICTURES, questions, strict=True))


@pytest.mark.parametrize(
    "way",
    ["chats", "chats in batches", "chats of a generator", "chats of a data set", "chats for captions"],
)
def test_chats_are_answered(said, way):
    expected = asked(QUESTIONS)
    assert len(set(expected)) == 3
    assert said[way] == expected
    assert said["one chat"] == expected[:1]


@pytest.mark.parametrize("way", ["images and texts", "pairs of a generator"])
def test_images_with_texts_are_continued_without_the_chat_template(said, way):
    processor = tiny_processor()
    pairs = zip(PICTURES, QUESTIONS, strict=True)
    assert said[way] == answers(processor(images=image, text=text, return_tensors="pt") for image, text in pairs)


@pytest.mark.parametrize("way", ["captions", "captions in batches", "captions of a generator"])
def test_pictures_alone_are_captioned(said, way):
    processor = tiny_processor()
    expected = answers(caption_inputs(processor, [[image]]) for image in PICTURES)
    assert len(set(expected)) == 3
    assert said[way] == expected
    assert said["one caption"] == expected[:1]


def test_a_prompt_asks_about_each_picture(said):
    assert said["one question"] == asked([QUESTIONS[0]] * 3)


def test_a_conversation_is_prepared_as_by_the_chat_template():
    processor = tiny_processor()
    messages = chat(PICTURES[0], "what?")
    for conversation in (messages, [*messages, {"role": "assistant", "content": [{"type": "text", "text": "a re"}]}]):
        is_open = len(conversation) == 2
        expected = processor.apply_chat_template(
            conversation,
            add_generation_prompt=not is_open,
            continue_final_message=is_open,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        found = processor(text=conversation, return_tensors="pt")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)
