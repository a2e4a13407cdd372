"""Conversations that show a new image in a later turn, and frames of a video: through the chat template to the answer.

Where a cache can go on, the answer is that of the whole conversation read anew; where it cannot, it is refused.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import pytest
import torch
from asked import PROCESSOR, by_hand, picture
from tiny import IMAGE_TOKEN_ID, tiny_model, tiny_tokenizer

from prefixvlm.inference.asking import generate_texts, prompt_inputs, stream_answer, stream_text, user_messages

MODES = ["causal", "prefix", "prefix_all_images"]
LETTERS = [tiny_tokenizer().convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
NO_LETTERS = [token for token in range(tiny_model().config.text_config.vocab_size) if token not in LETTERS]
NEW_TOKENS = 6


def image(number: int) -> dict:
    return {"type": "image", "image": picture(number)}


def pixels(numbers: Iterable[int]) -> torch.Tensor:
    return PROCESSOR.image_processor([picture(number) for number in numbers], return_tensors="pt")["pixel_values"]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def turns(*users: Sequence[dict], answers: Sequence[str]) -> list[dict]:
    """User turns with an answer after each but the last."""
    messages = []
    for parts, answer in zip(users, [*answers, None], strict=True):
        messages.append({"role": "user", "content": list(parts)})
        if answer is not None:
            messages.append({"role": "assistant", "content": [text(answer)]})
    return messages


# an image first; one between two texts; none; two last
USERS = [
    [image(1), text("what is it?")],
    [text("and here"), image(2), text("is it red?")],
    [text("sure?")],
    [text("which is like the first?"), image(3), image(4)],
]


@pytest.mark.parametrize("mode", [*MODES, "bidirectional"])
@pytest.mark.parametrize("asked", [2, 3, 4])
def test_a_conversation_is_answered_with_the_images_of_all_its_turns(mode, asked):
    model = tiny_model(mode).double()
    messages = turns(*USERS[:asked], answers=["a box", "no", "yes"][: asked - 1])
    inputs = prompt_inputs(PROCESSOR, [messages])
    count = [0, 1, 2, 2, 4][asked]
    assert torch.equal(inputs["pixel_values"], pixels(range(1, count + 1)))
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == count * 4
    expected = by_hand(model, inputs)
    assert generate_texts(model, PROCESSOR, inputs, max_new_tokens=NEW_TOKENS) == [expected]
    assert "".join(stream_text(model, PROCESSOR, inputs, max_new_tokens=NEW_TOKENS)) == expected
    # the latest image matters, and an earlier one too
    for turn, part in ((0, 0), (2, 1)):
        changed = deepcopy(messages)
        changed[turn]["content"][part] = image(5)
        with torch.no_grad():
            before, after = (model(**prompt_inputs(PROCESSOR, [each])).logits[0, -1] for each in (messages, changed))
        assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_goes_on_through_the_turns_or_is_refused(mode):
    """Each turn is generated from the last one's cache; with `prefix_all_images` one without a new image still can be."""
    model = tiny_model(mode).double()
    settings = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": NO_LETTERS, "return_dict_in_generate": True}
    answers, refused = [], 0
    cache = before = None
    for asked in range(1, len(USERS) + 1):
        inputs = prompt_inputs(PROCESSOR, [turns(*USERS[:asked], answers=answers)])
        whole = model.generate(**inputs, **settings)
        if cache is not None:
            # what is cached begins the prompt, so that it may go on
            assert torch.equal(inputs["input_ids"][:, : before.shape[1]], before)
            brings_images = any(part["type"] == "image" for part in USERS[asked - 1])
            if mode == "prefix_all_images" and brings_images:
                refused += 1
                with pytest.raises(ValueError, match="a new image changes what is cached; pass the whole conversation"):
                    model.generate(**inputs, past_key_values=cache, **settings)
            else:
                read = inputs["input_ids"].shape[1] - cache.get_seq_length()
                lengths = []
                hook = model.get_decoder().register_forward_pre_hook(
                    lambda module, args, kwargs, lengths=lengths: lengths.append(kwargs["inputs_embeds"].shape[1]),
                    with_kwargs=True,
                )
                assert torch.equal(model.generate(**inputs, past_key_values=cache, **settings).sequences, whole.sequences)
                hook.remove()
                assert lengths[0] == read  # the earlier turns were not read again
        cache, before = whole.past_key_values, whole.sequences
        answers.append(PROCESSOR.decode(before[0, inputs["input_ids"].shape[1] :]))
    assert len(set(answers)) > 1
    assert refused == (2 if mode == "prefix_all_images" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_conversations_with_other_numbers_of_images_are_answered_side_by_side(mode):
    model = tiny_model(mode).double()
    asked = [turns(*USERS[:count], answers=["a box", "no"][: count - 1]) for count in (3, 1, 2)]
    asked.append(turns(USERS[2], answers=[]))  # no image
    together, *alone = (prompt_inputs(PROCESSOR, some) for some in (asked, *([one] for one in asked)))
    with torch.no_grad():
        found, expected = (torch.cat([model(**each).logits[:, -1] for each in some]) for some in ([together], alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected = [generate_texts(model, PROCESSOR, each, max_new_tokens=NEW_TOKENS)[0] for each in alone]
    assert generate_texts(model, PROCESSOR, together, max_new_tokens=NEW_TOKENS) == expected
    assert len(set(expected)) == len(asked)


@pytest.mark.parametrize("mode", MODES)
def test_frames_of_a_video_are_a_list_of_image_files_in_one_turn(mode, tmp_path):
    model = tiny_model(mode).double()
    frames = [picture(number) for number in range(4)]
    files = [tmp_path / f"frame_{number}.png" for number in range(4)]
    for frame, file in zip(frames, files, strict=True):
        frame.save(file)
    parts = [{"type": "image", "path": str(file)} for file in files]
    inputs = prompt_inputs(PROCESSOR, [turns([*parts, text("what moves?")], answers=[])])
    opened = prompt_inputs(PROCESSOR, [user_messages(frames, "what moves?")])
    assert torch.equal(inputs["input_ids"], opened["input_ids"])
    assert torch.equal(inputs["pixel_values"], opened["pixel_values"])
    assert torch.equal(inputs["pixel_values"], pixels(range(4)))
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 4 * 4
    expected = by_hand(model, inputs)
    assert generate_texts(model, PROCESSOR, inputs, max_new_tokens=NEW_TOKENS) == [expected]
    assert "".join(stream_answer(model, PROCESSOR, files, "what moves?", NEW_TOKENS)) == expected
    backwards = prompt_inputs(PROCESSOR, [turns([*parts[::-1], text("what moves?")], answers=[])])
    with torch.no_grad():
        assert not torch.equal(model(**backwards).logits[0, -1], model(**inputs).logits[0, -1])
