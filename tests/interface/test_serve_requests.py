"""What a request asks for is used or refused, in either of OpenAI's forms."""

import json

import pytest
from transformers import GenerationConfig

from prefixvlm.serve_requests import CHAT, RESPONSES, Asked, read_request


def read(path: str = CHAT, **fields) -> Asked:
    asks = {"input": "hello"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hello"}]}
    return read_request(path, json.dumps({**asks, **fields}).encode(), "tiny", 4, 100, 1000)


def said(text: str, role: str = "user") -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {"do_sample": False}),
        ({"max_tokens": 5}, {"do_sample": False, "max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"do_sample": False, "max_new_tokens": 6}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5, "top_k": 0}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5, "top_k": 0}),
        ({"generation_config": '{"top_k": 9}', "temperature": 1}, {"do_sample": True, "temperature": 1, "top_k": 9}),
        ({"generation_config": {"max_new_tokens": 9, "do_sample": True}}, {"do_sample": True, "max_new_tokens": 9}),
        ({"generation_config": {"max_new_tokens": 9}, "max_tokens": 3}, {"do_sample": False, "max_new_tokens": 3}),
        ({"generation_config": {"temperature": 0.3}}, {"do_sample": False}),
        ({"temperature": None, "tools": None, "n": 1, "user": "me", "tool_choice": "auto"}, {"do_sample": False}),
    ],
)
def test_settings(fields, settings):
    assert read(**fields).settings == settings


def test_what_transformers_chat_sends_is_read():
    config = GenerationConfig(max_new_tokens=7, do_sample=True, eos_token_id=3)
    assert read(generation_config=config.to_json_string()).settings == {"max_new_tokens": 7, "do_sample": True}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": 3}, "temperature is 3; give a number from 0 to 2"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; give a whole number of at least 1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": 2**64}, "seed is"),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"frequency_penalty": 1}, "frequency_penalty is 1, which this server cannot do"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs is True"),
        ({"generation_config": "{"}, "generation_config is not JSON"),
        ({"generation_config": "[]"}, "generation_config is not a JSON object"),
        ({"generation_config": {"custom_generate": "someone/code"}}, "custom_generate cannot be chosen"),
        ({"generation_config": {"num_return_sequences": 9}}, "num_return_sequences cannot be chosen"),
        ({"generation_config": {"max_new_tokens": -1}}, "generation_config.max_new_tokens is -1"),
        ({"input": "hello"}, "'input' has no meaning here"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as caught:
        read(**fields)
    assert str(caught.value).endswith(".")


def test_messages_and_pictures_in_order():
    content = [
        {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": "data:b"},
    ]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": content}]
    asked = read(messages=messages, model="tiny", stream=True, seed=4)
    assert asked.pictures == ["data:a", "data:b"]
    image = {"type": "image", "image": 0}
    assert asked.messages == [
        said("be brief", "system"),
        {"role": "user", "content": [image, {"type": "text", "text": "one"}, {**image, "image": 1}]},
    ]
    assert (asked.stream, asked.seed) == (True, 4)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, [said("hello")]),
        ({"instructions": "be brief"}, [said("be brief", "system"), said("hello")]),
        ({"input": [{"type": "input_text", "text": "hello"}]}, [said("hello")]),
        (
            {
                "input": [
                    {"role": "user", "content": "hello"},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes?"}]},
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "bye"}]},
                ]
            },
            [said("hello"), said("yes?", "assistant"), said("bye")],
        ),
    ],
)
def test_the_forms_of_responses(fields, messages):
    assert read(RESPONSES, max_output_tokens=3, **fields) == Asked(messages, [], {"do_sample": False, "max_new_tokens": 3})


@pytest.mark.parametrize("given", [3, [3], [], {"role": "user"}, [{"type": "input_image", "file_id": "a"}]])
def test_responses_without_an_input_are_refused(given):
    with pytest.raises(ValueError, match=r"[a-z]\.$|\.\.\.\"}}\.$"):
        read(RESPONSES, input=given)
