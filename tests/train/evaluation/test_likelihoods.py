"""How likely a model finds each choice: the tokens that training would learn, whatever stands beside them in a batch."""

import json

import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation, Picture, Turn
from prefixvlm.train.evaluation.answering import Decoding
from prefixvlm.train.evaluation.likelihoods import log_likelihoods
from prefixvlm.train.evaluation.metrics.choices import choice_scores
from prefixvlm.train.evaluation.predictions import PREDICTIONS, evaluate, read_predictions
from prefixvlm.train.evaluation.tasks import Example, load_examples
from prefixvlm.train.recipes.evaluation import EvaluationSettings

PROCESSOR = tiny_processor()
ANSWERS = [["yes", "no"], ["a cat", "dog", "neither of them"], [], ["x"]]


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy())


def questions() -> list[Conversation]:
    several = [
        Turn("user", (Picture(picture(1)), "which?")),
        Turn("assistant", ("this",)),
        Turn("user", ("and", Picture(picture(2)), "?")),
    ]
    return [
        Conversation.about([picture(0)], [("user", "is it?")], "row 1"),
        Conversation(several, "row 2"),
        Conversation.about([picture(3)], [("user", "what?")], "row 3"),
        Conversation.about([picture(4)], [("user", "a much longer question than the others, is it not?")], "row 4"),
    ]


def by_hand(model, question: Conversation, answer: str) -> float:
    """One row alone, from its labels in training."""
    before = [Turn(turn.role, turn.parts, False) for turn in question.turns]
    batch = ConversationCollator(PROCESSOR, "conversation")(
        [Conversation([*before, Turn("assistant", (answer,))], question.name)]
    )
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        scores = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits[0]
    total = 0.0
    for place in range(1, len(labels)):
        if labels[place] != -100:
            total += scores[place - 1].log_softmax(-1)[labels[place]].item()
    return total


@pytest.mark.parametrize("mode", ["prefix", "prefix_all_images", "causal", "bidirectional"])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_they_are_those_of_each_answer_alone(mode, batch_size):
    model = tiny_model(mode)
    found = log_likelihoods(model, PROCESSOR, questions(), ANSWERS, batch_size)
    expected = [
        [by_hand(model, question, answer) for answer in given] for question, given in zip(questions(), ANSWERS, strict=True)
    ]
    assert list(map(len, found)) == [2, 3, 0, 1]
    for values, others in zip(found, expected, strict=True):
        assert values == pytest.approx(others, abs=1e-4)


def test_the_answer_counts_with_its_end_and_all_words_alone():
    """Each letter, one token, is less likely with its end than without."""
    model = tiny_model()
    letters = [chr(code) for code in range(97, 123)]
    (values,) = log_likelihoods(model, PROCESSOR, questions()[:1], [letters], 16)
    ids = [PROCESSOR.tokenizer.encode(letter) for letter in letters]
    assert all(len(one) == 1 for one in ids)
    inputs = PROCESSOR.apply_chat_template(
        [questions()[0].messages()], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].log_softmax(-1)
    assert all(value < first[one[0]] for value, one in zip(values, ids, strict=True))


def test_the_picture_counts():
    model = tiny_model()
    one, other = (
        log_likelihoods(model, PROCESSOR, [Conversation.about([picture(seed)], [("user", "is it?")])], [["yes", "no"]], 2)
        for seed in (0, 1)
    )
    assert one != other


def test_an_answer_without_words_is_refused():
    with pytest.raises(ValueError, match="row 1: an answer to choose from has no words"):
        log_likelihoods(tiny_model(), PROCESSOR, questions()[:1], [["yes", " "]], 2)


def test_scores_take_the_likeliest_the_first_of_equals_and_by_characters():
    found = choice_scores(
        [[-1.0, -2.0], [-4.0, -3.0], [-1.0, -1.0], []],
        [["ab", "abcdefgh"], ["abcdefgh", "a"], ["x", "y"], []],
        [0, 1, 0, 0],
    )
    assert found.scores == {"choice_questions": 3, "chosen": 1.0, "chosen_per_character": 1 / 3}
    assert found.resampled(torch.tensor([1, 1, 3]).numpy())["chosen_per_character"] == 0.0
    assert found.resampled(torch.tensor([3]).numpy()) == {}


ROWS = {
    "choices": {"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": 1, "split": "test"},
    "vqa": {"image": "a.png", "question": "Is it?", "answer": "No", "split": "test"},
    "ten": {"image": "a.png", "question": "Is it?", "answers": ["yes"] * 6 + ["no"] * 4, "split": "test"},
    "open": {"image": "a.png", "question": "Where?", "answer": "left", "split": "test"},
}


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("choices", "choices", (("cat", "dog"), 1)),
        ("vqa", "vqa", (("Yes", "No"), 1)),
        ("ten", "vqa", (("yes", "no"), 0)),
        ("open", "vqa", ((), 0)),
    ],
)
def test_what_there_is_to_choose_from(name, task, expected, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[name]]))
    (example,) = load_examples(EvaluationSettings(task=task, data=str(tmp_path / "rows.json")))
    assert (example.choices, example.right) == expected
    if name == "choices":
        assert example.question.said == [("user", "Which?\nA. cat\nB. dog")]
        assert example.references == ["dog"]


def test_an_evaluation_keeps_and_scores_them_through_an_interruption(tmp_path):
    examples = [
        Example(question, [given[0] if given else "open"], choices=tuple(given))
        for question, given in zip(questions(), ANSWERS, strict=True)
    ]
    model = tiny_model()
    report = evaluate(model, PROCESSOR, examples, "vqa", tmp_path, Decoding(max_new_tokens=3, batch_size=2), {})
    rows = read_predictions(tmp_path)
    assert [row.get("choices") for row in rows] == [given or None for given in ANSWERS]
    alone = log_likelihoods(model, PROCESSOR, questions(), ANSWERS, 1)
    for row, values in zip(rows, alone, strict=True):
        assert row.get("log_likelihoods", []) == pytest.approx(values, abs=1e-4)
    assert report["scores"]["choice_questions"] == 3
    assert report["scores"]["chosen"] == sum(values.index(max(values)) == 0 for values in alone if values) / 3
    assert report["intervals"].keys() >= {"chosen", "chosen_per_character"}

    lines = (tmp_path / PREDICTIONS).read_text().splitlines()
    without = {name: value for name, value in json.loads(lines[1]).items() if name != "log_likelihoods"}
    (tmp_path / PREDICTIONS).write_text("\n".join([lines[0], json.dumps(without)]) + "\n")
    again = evaluate(model, PROCESSOR, examples, "vqa", tmp_path, Decoding(max_new_tokens=3, batch_size=2), {})
    assert again["scores"] == report["scores"]
    assert (tmp_path / PREDICTIONS).read_text().splitlines()[0] == lines[0]
