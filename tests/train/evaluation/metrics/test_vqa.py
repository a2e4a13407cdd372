import shutil
from itertools import combinations
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixvlm.train.evaluation.metrics.vqa import scores as vqa
from prefixvlm.train.evaluation.metrics.vqa.scores import normalized, vqa_scores

ANSWERS = st.sampled_from(
    ["", "yes", "No.", "yes!", "the red car", "red-car", "two", "2", "dont", "don't", "a b", "b, a c"]
)


def test_the_scores_of_a_worked_example():
    predictions = ["Yes.", "no", "the left lung", "lung lung", ""]
    references = ["yes", "yes", "left lung", "left lung", "heart"]
    assert vqa_scores(predictions, references).scores == pytest.approx(
        {
            "questions": 5,
            "yes_no_questions": 2,
            "yes_no": 1 / 2,
            "open_questions": 3,
            "open": 0.0,
            "token_f1": (4 / 5 + 1 / 2 + 0) / 3,
            "recall": (1 + 1 / 2 + 0) / 3,
            "bleu_1": 3 / 5,  # 5 tokens against 5: no penalty
            "overall": 1 / 5,
        }
    )


def test_brevity_costs_bleu():
    assert vqa_scores(["left"], ["left lung"]).scores["bleu_1"] == pytest.approx(np.exp(-1))
    assert vqa_scores([""], ["left lung"]).scores["bleu_1"] == 0


def test_answers_without_tokens():
    scores = vqa_scores(["", "x"], ["?", "!"]).scores
    assert (scores["token_f1"], scores["recall"], scores["open"], scores["bleu_1"]) == (0.5, 0.5, 0.5, 0.0)


def test_of_several_answers_the_most_frequent_counts():
    scores = vqa_scores(["cat"], [["dog", "Cat", "cat.", "bird"]]).scores
    assert (scores["open"], scores["token_f1"]) == (1, 1)
    assert vqa_scores(["dog"], [["dog", "cat"]]).scores["open"] == 1  # the first of equals


def test_keys_of_no_questions_are_left_out():
    assert set(vqa_scores(["yes"], ["yes"]).scores) == {"questions", "yes_no_questions", "yes_no", "overall"}
    assert "consensus" in vqa_scores(["a"], [["a"] * 10]).scores
    assert "consensus" not in vqa_scores(["a"], [["a"]]).scores


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("  The\tLEFT\nlung ", "the left lung"),
        ("t-cell (cd4+)", "t cell cd4"),
        ("it's", "it s"),
        ("?!", ""),
    ],
)
def test_normalisation(answer, expected):
    assert normalized(answer) == expected


@settings(deadline=None)
@given(ANSWERS, st.lists(ANSWERS, min_size=10, max_size=10))
def test_consensus_is_the_mean_over_all_sets_of_nine(prediction, answers):
    if len({answer.strip() for answer in answers}) > 1:
        cleaned, said = [vqa._official(answer.strip()) for answer in answers], vqa._official(prediction.strip())
    else:
        cleaned, said = answers, prediction
    nines = [min(1, sum(answer == said for answer in nine) / 3) for nine in combinations(cleaned, 9)]
    assert vqa_scores([prediction], [answers]).scores["consensus"] == pytest.approx(sum(nines) / 10)


@pytest.mark.parametrize(
    ("answer", "official"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("arent", "aren't"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt, red", "t shirt red"),
        ("1,000", "1000"),  # a comma between digits makes every mark vanish
        ("1,000-a", "1000a"),
        ("3.5 miles.", "3.5 miles"),
        ("." * 40, "." * 8),
        ("it's", "it's"),
    ],
)
def test_the_official_normalisation(answer, official):
    assert vqa._official(answer) == official


def test_equal_answers_are_compared_as_they_are():
    assert vqa_scores(["Two"], [["two"] * 10]).scores["consensus"] == 0
    assert vqa_scores([" two\n"], [["two"] * 10]).scores["consensus"] == 1
    assert vqa_scores(["Two"], [["two"] * 9 + ["3"]]).scores["consensus"] == 1
    assert vqa_scores(["two"], [["2"] * 2 + list("abcdefgh")]).scores["consensus"] == pytest.approx(0.6)


QUESTIONS = st.lists(st.tuples(ANSWERS, ANSWERS | st.lists(ANSWERS, min_size=1, max_size=4)), min_size=1, max_size=8)


@settings(deadline=None)
@given(QUESTIONS, st.data())
def test_a_resample_is_scored_as_if_it_were_everything(questions, data):
    predictions, references = zip(*questions, strict=True)
    scored = vqa_scores(predictions, references)
    assert scored.resampled(np.arange(len(questions))) == scored.scores
    chosen = data.draw(st.lists(st.integers(0, len(questions) - 1), min_size=1))
    direct = vqa_scores([predictions[i] for i in chosen], [references[i] for i in chosen]).scores
    assert scored.resampled(np.array(chosen)) == direct


def test_evaluate_loads_the_folder_also_a_copy_of_it(tmp_path):
    folder = Path(vqa.__file__).parent
    shutil.copytree(folder, tmp_path / "vqa")
    for path in (folder, tmp_path / "vqa"):
        metric = evaluate.load(str(path))
        for references in (["yes", "b c"], [["yes"] * 10, ["b c"] * 10]):
            expected = vqa_scores(["yes", "b"], references).scores
            assert metric.compute(predictions=["yes", "b"], references=references) == expected


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no questions"),
        (["a"], [], "1 predictions for 0 references"),
        (["a"], [[]], r"references\[0\] is empty"),
        (["a"], [7], r"references\[0\] is 7"),
        ([None], ["a"], r"predictions\[0\] is None"),
    ],
)
def test_what_cannot_be_scored_is_said(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        vqa_scores(predictions, references)
