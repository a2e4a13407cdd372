"""A chat says what a model says to the whole conversation anew, and reads no more of it than it must."""

from contextlib import closing

import pytest
from asked import PROCESSOR, picture
from tiny import IMAGE_TOKEN_ID, tiny_model, tiny_tokenizer

from prefixvlm.inference.asking import generate_texts, prompt_inputs
from prefixvlm.inference.chat import Chat

LETTERS = [tiny_tokenizer().convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
NO_LETTERS = [token for token in range(tiny_model().config.text_config.vocab_size) if token not in LETTERS]
ONLY_LETTERS = {"max_new_tokens": 6, "suppress_tokens": NO_LETTERS}
# a question and its pictures: at first one, then none, then two
TURNS = [("what is it?", [1]), ("sure?", []), ("and these?", [2, 3]), ("which is red?", [])]


def say(chat: Chat, question: str, pictures, **generation) -> str:
    return "".join(chat.ask(question, [picture(number) for number in pictures], **{**ONLY_LETTERS, **generation}))


def anew(model, messages) -> str:
    """What a model says to a conversation without its last answer, read from the start."""
    return generate_texts(model, PROCESSOR, prompt_inputs(PROCESSOR, [messages]), **ONLY_LETTERS)[0]


@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images", "bidirectional"])
def test_every_answer_is_that_of_the_whole_conversation(mode):
    model = tiny_model(mode).double()
    chat = Chat(model, PROCESSOR)
    answers = []
    for number, (question, pictures) in enumerate(TURNS):
        answers.append(say(chat, question, pictures))
        assert len(chat.messages) == 2 * (number + 1)
        assert chat.messages[-1]["content"] == [{"type": "text", "text": answers[-1]}]
        assert answers[-1] == anew(model, chat.messages[:-1])
    assert len(set(answers)) > 2


@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images"])
def test_what_has_been_read_is_not_read_again(mode):
    model = tiny_model(mode).double()
    chat = Chat(model, PROCESSOR)
    lengths, encoded = [], []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    before = 0
    for question, pictures in TURNS:
        lengths.clear()
        encoded.clear()
        say(chat, question, pictures)
        ids = prompt_inputs(PROCESSOR, [chat.messages[:-1]])["input_ids"][0]
        if mode == "prefix_all_images" and pictures:
            assert lengths[0] == len(ids)
            assert sum(encoded) * 4 == (ids == IMAGE_TOKEN_ID).sum()
        else:
            assert lengths[0] == len(ids) - before
            assert sum(encoded) == len(pictures)
        before = len(ids)


def test_beams_are_searched_without_the_cache(tmp_path):
    model = tiny_model().double()
    chat = Chat(model, PROCESSOR)
    say(chat, *TURNS[0])
    said = say(chat, *TURNS[1], num_beams=3)
    inputs = prompt_inputs(PROCESSOR, [chat.messages[:-1]])
    assert [said] == generate_texts(model, PROCESSOR, inputs, num_beams=3, **ONLY_LETTERS)
    assert say(chat, *TURNS[2]) == anew(model, chat.messages[:-1])


def test_an_answer_that_is_left_stays_as_far_as_it_was_heard():
    model = tiny_model().double()
    chat = Chat(model, PROCESSOR)
    with closing(chat.ask("what?", [picture(1)], max_new_tokens=6)) as pieces:
        heard = next(pieces)
    assert chat.messages[-1]["content"][0]["text"] == heard.strip()
    assert say(chat, "and?", []) == anew(model, chat.messages[:-1])


def test_a_picture_that_cannot_be_used_leaves_the_conversation_as_it_was(tmp_path):
    model = tiny_model().double()
    chat = Chat(model, PROCESSOR)
    say(chat, *TURNS[0])
    messages = list(chat.messages)
    with pytest.raises(ValueError, match="gone"):
        list(chat.ask("this?", [str(tmp_path / "gone.png")]))
    assert chat.messages == messages
    assert say(chat, *TURNS[1]) == anew(model, chat.messages[:-1])


def test_an_error_of_the_model_does_not_stay_in_the_conversation(monkeypatch):
    model = tiny_model().double()
    chat = Chat(model, PROCESSOR)
    say(chat, *TURNS[0])
    messages = list(chat.messages)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.vision_tower, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.ask("this?", [picture(2)]))
    assert chat.messages == messages
    assert say(chat, *TURNS[1]) == anew(model, chat.messages[:-1])
