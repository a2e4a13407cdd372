"""What a request to the server asks for: OpenAI's JSON as messages, addresses of pictures, and arguments of `generate`.

What a request says is used, or refused with a sentence; nothing that would change the answer is dropped.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

CHAT, RESPONSES, LOAD = "/v1/chat/completions", "/v1/responses", "/load_model"

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")

USED = {
    CHAT: {"max_completion_tokens", "max_tokens", "messages", "stream_options"},
    RESPONSES: {"input", "instructions", "max_output_tokens"},
}
USED_BY_BOTH = {"generation_config", "model", "seed", "stream", "temperature", "top_p"}
# what clients send for their own books, and what changes nothing here
WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# fields whose usual values ask for what the server does anyway
USUAL: dict[str, tuple] = {
    "background": (False,),
    "frequency_penalty": (0,),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}

# of a generation_config, as `transformers chat` sends it, what may be chosen
CHOSEN = {
    "do_sample",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
}
# and what the model itself knows better
OF_THE_MODEL = {"bad_words_ids", "bos_token_id", "eos_token_id", "max_length", "pad_token_id", "transformers_version"}
# the least and the largest value of each number
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, math.inf),
    "min_new_tokens": (0, math.inf),
    "min_p": (0, 1),
    "no_repeat_ngram_size": (0, 1000),
    "repetition_penalty": (0.01, 10),
    "seed": (-(2**63), 2**63 - 1),
    "temperature": (0, 2),
    "top_k": (0, 10**6),
    "top_p": (0.001, 1),
}
WHOLE_NUMBERS = ("max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "seed", "top_k")
OF_SAMPLING = ("min_p", "temperature", "top_k", "top_p")


class WrongModelError(ValueError):
    """A request names another model than the one that is served."""


@dataclass
class Asked:
    """A request that can be answered.

    Args:
        messages: as the processor takes them; an image part's `image` is the number of its picture.
        pictures: their addresses, in order.
        settings: arguments of `generate`; without `max_new_tokens`, the answer may be as long as the server allows.
        seed: for sampling.
        stream: whether the answer is sent piece by piece.
    """

    messages: list[dict]
    pictures: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stream: bool = False


def read_request(path: str, data: bytes, model: str, max_pictures: int, max_parts: int, max_characters: int) -> Asked:
    """Reads the body of a request to `CHAT` or `RESPONSES`.

    Args:
        model: the name of the model that is served.
        max_parts, max_characters: of all messages together.

    Raises:
        ValueError: for what cannot be read, used or answered.
        WrongModelError: for another model.
    """
    body = read_object(data, model)
    refuse_unknown_fields(path, body)
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise ValueError(f"stream is {_shown(stream)}; give true or false.")
    asked = Asked(
        [], [], *read_settings(body, "max_output_tokens" if path == RESPONSES else "max_completion_tokens"), stream
    )
    counted = 0
    for message in _messages(path, body):
        if not isinstance(message, dict):
            raise ValueError(f"A message is {_shown(message)}; give an object with a role and a content.")
        read = read_message(message, asked.pictures)
        asked.messages.append(read)
        max_parts -= 1 + len(read["content"])
        counted += sum(len(part.get("text", "")) for part in read["content"])
        if max_parts < 0 or counted > max_characters:
            raise ValueError("The request is longer than the model can read; shorten its messages.")
        if len(asked.pictures) > max_pictures:
            raise ValueError(f"The request has more than {max_pictures} pictures; leave some out.")
    if not asked.messages or asked.messages[-1]["role"] != "user":
        raise ValueError("The last message is not the user's, so there is nothing to answer.")
    return asked


def read_object(data: bytes, model: str) -> dict:
    """The fields of a request that have a value; raises as `read_request`."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The request is not JSON ({' '.join(str(error).split())[:100]}).") from error
    if not isinstance(body, dict):
        raise ValueError("The request is not a JSON object.")
    body = {name: value for name, value in body.items() if value is not None}
    named = body.get("model", model)
    if named != model:
        raise WrongModelError(f"This server serves {model!r} alone; the request names {str(named)[:100]!r}.")
    return body


def refuse_unknown_fields(path: str, body: dict) -> None:
    """Raises a ValueError for a field that would not have the effect that it asks for."""
    for name, value in body.items():
        if name in USED[path] | USED_BY_BOTH | WITHOUT_EFFECT or any(value == usual for usual in USUAL.get(name, ())):
            continue
        if name in USUAL:
            raise ValueError(f"{name} is {_shown(value)}, which this server cannot do; leave it out.")
        raise ValueError(f"The field {name[:60]!r} has no meaning here; leave it out.")


def read_settings(body: dict, limit: str) -> tuple[dict[str, Any], int | None]:
    """The arguments of `generate` that a request gives, and its seed. Decoding is greedy unless it asks for sampling.

    Args:
        limit: the field that says how many tokens the answer may have; `max_tokens` is its older name.
    """
    settings = _generation_config(body.get("generation_config"))
    fields = {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_new_tokens", limit: "max_new_tokens"}
    for name, setting in fields.items():
        if name in body:
            settings[setting] = _number(name, body[name], setting)
    if settings.get("temperature") == 0:
        settings["do_sample"] = False
    elif "temperature" in body or "top_p" in body:
        settings["do_sample"] = True
        settings.setdefault("top_k", 0)  # OpenAI's fields cut off no other tokens; transformers' default would
    if not settings.setdefault("do_sample", False):
        settings = {name: value for name, value in settings.items() if name not in OF_SAMPLING}
    return settings, _number("seed", body["seed"], "seed") if "seed" in body else None


def _generation_config(given) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        values = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ValueError("generation_config is not JSON.") from error
    if not isinstance(values, dict):
        raise ValueError("generation_config is not a JSON object.")
    usual = GenerationConfig().to_dict()
    settings = {}
    for name, value in values.items():
        if name in OF_THE_MODEL or name.startswith("_") or value is None:
            continue
        if name in CHOSEN:
            settings[name] = bool(value) if name == "do_sample" else _number(f"generation_config.{name}", value, name)
        elif name not in usual or value != usual[name]:
            raise ValueError(f"generation_config.{name[:60]} cannot be chosen here; leave it out.")
    return settings


def _number(name: str, value, setting: str) -> Any:
    """A number in the range of a setting."""
    low, high = RANGES[setting]
    is_whole = setting in WHOLE_NUMBERS
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float) or not low <= value <= high:
        kind = "whole number" if is_whole else "number"
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {_shown(value)}; give a {kind} {limits}.")
    return value


def _messages(path: str, body: dict) -> list:
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise ValueError("The request has no list of messages.")
        return messages
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    elif isinstance(given, list) and given and not any(isinstance(item, dict) and "role" in item for item in given):
        given = [{"role": "user", "content": given}]  # the parts of a single message
    if not isinstance(given, list):
        raise ValueError("The request has no input; give a text, or a list of messages.")
    instructions = body.get("instructions")
    return given if instructions is None else [{"role": "system", "content": instructions}, *given]


def read_message(message: dict, pictures: list[str]) -> dict:
    """A message in the processor's form; the addresses of its pictures are added to `pictures`."""
    role, content = message.get("role"), message.get("content")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"A message has the role {_shown(role)}; choose one of {', '.join(ROLES)}.")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError("A message calls tools, which this server cannot do; leave the calls out.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise ValueError(f"The content of a message of the {role} is {_shown(content)}; give a text or a list of parts.")
    return {"role": known, "content": [_part(part, pictures) for part in content]}


def _part(part, pictures: list[str]) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f"The text of a message part is {_shown(text)}; give a string.")
        return {"type": "text", "text": text}
    if kind in IMAGE_PARTS:
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if not isinstance(address, str):
            raise ValueError('A picture has no address; give {"type": "image_url", "image_url": {"url": "data:..."}}.')
        pictures.append(address)
        return {"type": "image", "image": len(pictures) - 1}
    raise ValueError(f"A message part is of type {_shown(kind)}; only text and pictures can be read.")


def with_pictures(messages: list[dict], opened: Callable[[int], Any]) -> list[dict]:
    """A copy of messages with each number of a picture replaced by the picture."""

    def part(one: dict) -> dict:
        return {**one, "image": opened(one["image"])} if one["type"] == "image" else one

    return [{**message, "content": [part(one) for one in message["content"]]} for message in messages]


def _shown(value) -> str:
    return repr(value)[:60]
