"""The conversations of stage 3 say what the captions say, never give an answer away, and are of training photos alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evidence.data import DESCRIBE, asked_and_said
from evidence.real.questions import IS_THERE, THINGS, WHICH, conversations
from evidence.real.scenes import NAMES, is_named

THING_OF = {IS_THERE.format(question): question for question in THINGS}
WORDS = ("cars", "houses", "boats", "a river", "a forest", "a runway", "white sand", "something")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(lambda words: f"There is {' and '.join(words)} .")
ROWS = st.lists(
    st.builds(
        lambda texts, split, scene: {"texts": texts, "split": split, "class_by_index": scene},
        st.lists(TEXTS, min_size=1, max_size=3),
        st.sampled_from(["train", "train", "val", "test"]),
        st.sampled_from(["river", "harbor", "runway"]),
    ),
    max_size=12,
).map(lambda rows: [row | {"image": f"images/{number}.jpg"} for number, row in enumerate(rows)])


def row(text: str, scene: str, number: int = 0, split: str = "train") -> dict:
    return {"image": f"images/{number}.jpg", "texts": [text], "class_by_index": scene, "split": split}


def asked(rows: list[dict]) -> list[dict[str, str]]:
    """The replies by question, of each conversation."""
    return [dict(asked_and_said(talk)) for talk in conversations(rows)]


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_answers_are_those_of_the_captions(rows):
    training = [row for row in rows if row["split"] == "train"]
    talks = asked(rows)
    assert len(talks) == len(training)
    for row, talk in zip(training, talks, strict=True):
        assert talk.pop(DESCRIBE) in row["texts"]
        if any(is_named(row["class_by_index"], text) for text in row["texts"]):
            assert talk.pop(WHICH) == NAMES[row["class_by_index"]]
        of_class = [other for other in training if other["class_by_index"] == row["class_by_index"]]
        assert sorted(talk.values()) in ([], ["No", "Yes"])
        for question, answer in talk.items():
            names = [THINGS[THING_OF[question]].search(text.lower()) for text in row["texts"]]
            of_others = [THINGS[THING_OF[question]].search(text.lower()) for other in of_class for text in other["texts"]]
            assert any(names) if answer == "Yes" else not any(of_others)


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_photos_of_other_splits_change_nothing(rows):
    training = [row for row in rows if row["split"] == "train"]
    assert conversations(rows) == conversations(training)


def test_no_thing_gives_its_answer_away():
    things = {"harbor": "boats", "river": "a river", "forest": "a forest", "runway": "a runway", "golfcourse": "bunkers"}
    rows = [row(f"There are {thing} .", scene, number) for number in range(40) for scene, thing in things.items()]
    surplus = Counter()
    for talk in asked(rows):
        surplus.update({question: 1 if said == "Yes" else -1 for question, said in talk.items() if said in ("Yes", "No")})
    assert surplus.total() == 0
    named = [IS_THERE.format(question) for question, pattern in THINGS.items() if any(map(pattern.search, things.values()))]
    assert len(named) == 5
    assert all(abs(surplus[question]) <= 5 for question in named)


@pytest.mark.parametrize("text", ["An intersection with no cars on the roads .", "Two roads without cars ."])
def test_what_a_caption_denies_is_not_there(text):
    (talk,) = asked([row(text, "intersection")])
    assert talk.get("Are there cars in the picture?") != "Yes"


def test_a_photo_that_no_caption_puts_into_its_class_is_not_asked_for_it():
    (talk,) = asked([row("There is a piece of farmland .", "airplane")])
    assert WHICH not in talk
