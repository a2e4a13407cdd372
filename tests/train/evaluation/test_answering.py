"""Answers by generation: a batch says what each question alone gets, and what cannot be answered is named."""

import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation import answering
from prefixvlm.train.evaluation.answering import Decoding

PROCESSOR = tiny_processor()


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(count)
    noise = torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


def questions(count: int) -> list[Conversation]:
    texts = ["w" * (1 + 7 * index % 5) for index in range(count)]
    return [
        Conversation.about([picture], [("user", text)], f"row {index}")
        for index, (picture, text) in enumerate(zip(pictures(count), texts, strict=True))
    ]


def captions(count: int) -> list[Conversation]:
    return [
        Conversation.about([picture], [("user", "")], f"picture {index}") for index, picture in enumerate(pictures(count))
    ]


def many_images() -> list[Conversation]:
    a, b, c, d, e, f = pictures(6)
    asked = [([a, b], "ww"), ([c], "wwwww"), ([], "www"), ([d, e, f], "w")]
    return [Conversation.about(images, [("user", text)], f"row {index}") for index, (images, text) in enumerate(asked)]


@pytest.mark.parametrize(
    "asked",
    [
        questions(7),
        captions(4),
        [kind for pair in zip(questions(4), captions(4), strict=True) for kind in pair],
        many_images(),
        [Conversation.about(pictures(2), [("user", "")], "two"), *captions(2)],
    ],
    ids=["questions", "captions", "mixed kinds", "several images", "captions of several images"],
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_batches_of_like_length_answer_in_the_order_asked(asked, num_beams):
    model = tiny_model()
    together = answering.answer(model, PROCESSOR, asked, batch_size=3, num_beams=num_beams)
    alone = [answering.answer(model, PROCESSOR, [question], num_beams=num_beams)[0] for question in asked]
    assert together == alone
    assert len(set(together)) > 1


def test_texts_are_generated_as_asked(monkeypatch):
    model, options = tiny_model(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: options.append(given) or generate(**given))
    answering.answer(model, PROCESSOR, questions(3), batch_size=2, num_beams=3, max_new_tokens=5)
    assert [(given["num_beams"], given["max_new_tokens"], given["do_sample"]) for given in options] == [(3, 5, False)] * 2


def test_only_what_is_asked_for_is_answered_the_longest_first():
    asked = questions(7)
    batches = list(answering.answers(tiny_model(), PROCESSOR, asked, [0, 3, 5, 6], Decoding(batch_size=3)))
    answered = [index for batch in batches for index, _ in batch]
    lengths = [len(asked[index].turns[0].text) for index in answered]
    assert sorted(answered) == [0, 3, 5, 6]
    assert [len(batch) for batch in batches] == [3, 1]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("kind", [questions, captions])
def test_a_bad_image_is_named_with_its_sample(kind, tmp_path):
    asked = kind(3)
    missing = str(tmp_path / "gone.png")
    asked[1] = Conversation.about([missing], asked[1].said, asked[1].name)
    with pytest.raises(ValueError, match=f"^{asked[1].name}: .*gone.png: there is no such image file"):
        answering.answer(tiny_model(), PROCESSOR, asked)


@pytest.mark.parametrize("field", ["num_beams", "max_new_tokens", "batch_size"])
def test_decoding_needs_positive_numbers(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        Decoding(**{field: 0})
