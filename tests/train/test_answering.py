"""Answers by generation: as from one question at a time, and scored by kind."""

from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.train import answering
from prefixvlm.train.conversation import Conversation

PROCESSOR = tiny_processor()


def questions(count: int) -> list[Conversation]:
    pictures = [Image.effect_noise((16, 16), 60).convert("RGB") for _ in range(count)]
    return [Conversation([picture], [("user", "w" * (1 + 7 * i % 5))], f"row {i}") for i, picture in enumerate(pictures)]


def test_batches_of_like_length_answer_in_the_order_asked():
    model, asked = tiny_model(), questions(7)
    together = answering.answer(model, PROCESSOR, asked, batch_size=3)
    alone = [answering.answer(model, PROCESSOR, [question])[0] for question in asked]
    assert together == alone
    assert len(set(together)) > 1


def test_accuracy_tells_yes_and_no_from_open_answers(monkeypatch):
    pairs = [("Yes.", "yes"), ("no", "yes"), ("NO", "No"), ("Left  lung!", "left lung"), ("right", "left"), ("", "x")]
    samples = [Conversation([], [("user", "q"), ("assistant", reference)]) for _, reference in pairs]

    def answer(model, processor, asked):
        assert all(question.turns == [("user", "q")] for question in asked)
        return [prediction for prediction, _ in pairs]

    monkeypatch.setattr(answering, "answer", answer)
    found = answering.vqa_accuracy(None, None, samples)
    assert found == {"yes_no_questions": 3, "open_questions": 3, "yes_no": 2 / 3, "open": 1 / 3}
