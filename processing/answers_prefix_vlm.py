"""Where the answers lie in a rendered conversation, whatever the chat template.

A template with `{% generation %}` marks them itself. In the rendering of any other, an answer is what changes when another
one takes its place. This file travels to the Hub with every checkpoint, so it imports only the standard library and its
sibling.
"""

import os
from collections.abc import Callable

from .text_prefix_vlm import ControlTokens

# in place of an answer; nobody can type it, and no template strips it
ANOTHER = "\ufdd1" + os.urandom(8).hex() + "\ufdd1"


def answer_spans(
    messages: list[dict], text: str, render: Callable, control_tokens: ControlTokens, blanks: str, is_open: bool
) -> list[tuple[int, int]]:
    """(begin, end) of each answer in a rendered conversation, with the control token that closes its turn.

    Args:
        messages: the conversation.
        text: its rendering.
        render: renders messages.
        blanks: what the model has to write before an answer, of which they are a part.
        is_open: the last answer shall be continued, so nothing closes it.

    Raises:
        ValueError: for a template that leaves an answer out, or closes it with no token, where a model would not learn to
            stop.
    """
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        other = render([*messages[:place], {**message, "content": ANOTHER}, *messages[place + 1 :]])
        before, found, after = other.partition(ANOTHER)
        if not found:
            raise ValueError("the chat template leaves out an answer; choose chat_template='chatml'")
        # what is around an answer may depend on it, as with Qwen3's thoughts
        before = before[: _shared(before, text)]
        begin = len(before)
        end = len(text) - _shared(after[::-1], text[begin:][::-1])
        closed = control_tokens.turn_end(text, end)
        if closed == end and not (is_open and place == len(messages) - 1):
            raise ValueError(
                "the chat template closes an answer with no control token, so a model would not learn to stop; choose "
                "chat_template='chatml', or add a token to it"
            )
        spans.append((len(before.removesuffix(blanks)), closed))
    return spans


def refuse_dropped(messages: list[dict], text: str) -> None:
    """Raises a ValueError for words of the system or a user that a chat template has left out.

    Of an answer it may drop parts, as of Qwen3's thoughts.
    """
    for message in messages:
        content = message["content"]
        said = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if message["role"] in ("system", "user") and any(words.strip() not in text for words in said):
            raise ValueError(
                f"the chat template leaves out what the {message['role']} says; choose chat_template='chatml', or leave "
                "that message out"
            )


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next(place for place, (left, right) in enumerate(zip(one, other + ANOTHER, strict=False)) if left != right)
