"""What `make real` scores itself, by hand on a few rows."""

import pytest

from evidence.real import scoring


def answer(kind: str, text: str) -> dict:
    return {"answer_type": kind, "answer": text}


def test_answers_are_counted_by_type_beside_the_commonest_of_training():
    training = [answer("CLOSED", text) for text in ("No", "no", "yes")] + [answer("OPEN", "axial")]
    rows = [answer("CLOSED", "Yes"), answer("OPEN", "Axial."), answer("CLOSED", "no"), answer("OPEN", "left lung")]
    found = scoring.by_answer_type(["yes", "coronal", "yes", "Left lung!"], rows, training)
    assert found["CLOSED"] == {"questions": 2, "accuracy": 0.5, "commonest": "no", "commonest_accuracy": 0.5}
    assert found["OPEN"] == {"questions": 2, "accuracy": 0.5, "commonest": "axial", "commonest_accuracy": 0.5}
    assert scoring.by_answer_type(["yes"], rows[:1], training).keys() == {"CLOSED"}


def test_the_class_named_is_that_of_the_row():
    rows = [{"class_by_index": "river"}, {"class_by_index": "forest"}]
    assert scoring.class_named(["A river .", "A beach ."], rows) == 0.5


def test_examples_go_from_the_best_caption_to_the_worst():
    said = ["a red house", "a green tree by a road", "two boats"]
    rows = [
        {"image": f"images/{number}.jpg", "class_by_index": "river", "texts": [text]}
        for number, text in enumerate(["nothing at all", "a green tree by a road", "two boats on a lake"])
    ]
    found = scoring.examples(said, rows, count=2)
    assert [(one["image"], one["rank"]) for one in found] == [("images/1.jpg", 1), ("images/0.jpg", 3)]
    assert found[0]["CIDEr"] > found[1]["CIDEr"] == pytest.approx(0)
    assert len(scoring.examples(said, rows)) == 3
