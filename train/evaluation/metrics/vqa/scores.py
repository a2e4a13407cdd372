"""Scores of answers to questions about images, as reported on PathVQA, VQA-RAD and VQAv2.

An answer is normalised to lower case, with every character that is not a letter, digit, underscore or space replaced by a
space, and spaces collapsed; its tokens are separated by spaces. If a question has several answers, the reference is the
most frequent normalised one (ties: the first). A question is a yes/no question if its normalised reference is yes or no,
else an open one. The scores, all in [0, 1]:

- `yes_no`, over yes/no questions: the share answered exactly, after normalisation;
- `open`, over open questions: the same;
- `token_f1`, over open questions: the mean F1 of the tokens, repeats counted;
- `recall`, over open questions: the mean share of the reference's tokens that the prediction has, repeats counted;
- `bleu_1`, over open questions: corpus BLEU of single tokens with brevity penalty, without smoothing;
- `overall`, over all questions: the share answered exactly, after normalisation;
- `consensus`, over questions with more than one answer: VQA's accuracy (Antol et al. 2015, and its evaluation code):
  min(1, matches / 3), averaged over the subsets that leave one answer out. It has its own normalisation: outer spaces are
  stripped and, unless all answers are equal, punctuation and articles are removed, numbers up to ten become digits, and
  contractions get their apostrophe.

If prediction or reference has no tokens, F1 and recall are 1 if both have none, else 0. Scores over no questions are left
out.

This file imports nothing from the package, because evaluate copies it to its cache with the module beside it.
Shapes: N questions.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# the columns of what each question contributes
_YES_NO, _EXACT, _F1, _RECALL, _MATCHES, _LENGTH, _REFERENCE_LENGTH, _CONSENSUS = range(8)


@dataclass(frozen=True)
class VqaScores:
    """Scores, and what each question contributes to them.

    Attributes:
        scores: the scores in the module's docstring, and the numbers of `questions`, `yes_no_questions` and
            `open_questions`; a number that would be 0 is left out.
    """

    scores: dict[str, float | int]
    _table: np.ndarray

    def resampled(self, indices: np.ndarray) -> dict[str, float | int]:
        """The scores of the questions at `indices` (integers in [0, N), repeats allowed, at least one)."""
        return _scores(self._table[indices])


def vqa_scores(predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> VqaScores:
    """Scores one predicted answer for each question.

    Args:
        predictions: N answers.
        references: for each question, its answer or a list of its answers.

    Raises:
        ValueError: for no questions, a question without an answer, or unequal numbers.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(references)} references; give each question one of each."
        )
    if len(predictions) == 0:
        raise ValueError("There are no questions to score; give at least one prediction and its reference.")
    rows = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        answers = [reference] if isinstance(reference, str) else reference
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{index}] is {prediction!r}; give an answer, a string.")
        if not isinstance(answers, Sequence) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"references[{index}] is {reference!r}; give an answer or a list of answers, strings.")
        if len(answers) == 0:
            raise ValueError(f"references[{index}] is empty; give at least one answer to each question.")
        rows.append(_row(prediction, answers))
    table = np.array(rows, dtype=float)
    return VqaScores(_scores(table), table)


def normalized(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _row(prediction: str, answers: Sequence[str]) -> list[float]:
    reference = Counter(normalized(answer) for answer in answers).most_common(1)[0][0]
    said = normalized(prediction)
    said_tokens, tokens = said.split(), reference.split()
    matches = (Counter(said_tokens) & Counter(tokens)).total()
    if said_tokens and tokens:
        f1, recall = 2 * matches / (len(said_tokens) + len(tokens)), matches / len(tokens)
    else:
        f1 = recall = float(said_tokens == tokens)
    consensus = _consensus(prediction, answers) if len(answers) > 1 else math.nan
    exact = said == reference
    return [reference in ("yes", "no"), exact, f1, recall, matches, len(said_tokens), len(tokens), consensus]


def _scores(table: np.ndarray) -> dict[str, float | int]:
    yes_no = table[table[:, _YES_NO] == 1]
    open_ = table[table[:, _YES_NO] == 0]
    consensus = table[~np.isnan(table[:, _CONSENSUS]), _CONSENSUS]
    scores: dict[str, float | int] = {"questions": len(table)}
    if len(yes_no):
        scores |= {"yes_no_questions": len(yes_no), "yes_no": float(yes_no[:, _EXACT].mean())}
    if len(open_):
        scores |= {"open_questions": len(open_), "open": float(open_[:, _EXACT].mean())}
        scores |= {"token_f1": float(open_[:, _F1].mean()), "recall": float(open_[:, _RECALL].mean())}
        scores["bleu_1"] = _bleu_1(*open_[:, [_MATCHES, _LENGTH, _REFERENCE_LENGTH]].sum(0))
    scores["overall"] = float(table[:, _EXACT].mean())
    if len(consensus):
        scores["consensus"] = float(consensus.mean())
    return scores


def _bleu_1(matches: float, length: float, reference_length: float) -> float:
    if length == 0:
        return 0.0
    return float(matches / length * math.exp(min(0.0, 1 - reference_length / length)))


def _consensus(prediction: str, answers: Sequence[str]) -> float:
    said, *others = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(others)) > 1:
        said, *others = (_official(text) for text in (said, *others))
    agree = sum(other == said for other in others)
    # leaving out an agreeing answer leaves one fewer to match
    return (agree * min(1, (agree - 1) / 3) + (len(others) - agree) * min(1, agree / 3)) / len(others)


def _official(text: str) -> str:
    """VQA's normalisation, quirks included, so that scores are comparable with published ones."""
    punctuated = text
    for mark in ';/[]"{}()=+\\_->' + "<@`,?!":
        # a mark that is next to a space somewhere is removed, and every mark if a comma stands between digits
        joined = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        punctuated = punctuated.replace(mark, "" if joined else " ")
    # the official pattern has (?!<=\d), which always holds, and passes re.UNICODE as the count, which is 32
    punctuated = re.sub(r"\.(?!\d)", "", punctuated, count=32)
    words = (_NUMBERS.get(word, word) for word in punctuated.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}


def _contractions() -> dict[str, str]:
    """Maps words that lack one apostrophe to the same words with it."""
    whole = (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
        "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
        "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
        "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
        "you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've "
        "somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
        "y'all'd've you'd've 'ow's'at"
    )
    table = {}
    for word in whole.split():
        for place in range(len(word)):
            if word[place] == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()
