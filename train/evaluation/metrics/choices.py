"""Scores of multiple choice by likelihood, as EleutherAI's lm-evaluation-harness has them (`acc` and `acc_norm`).

The choice taken is the one with the largest log-likelihood, for `chosen` its sum over the answer's tokens, for
`chosen_per_character` that sum divided by the number of the answer's characters, which does not favour short answers. Of
equal ones the first is taken. Both are shares of the questions that have choices, of which there are `choice_questions`.

Shapes: N questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChoiceScores:
    """Scores, and what each question contributes to them; a question without choices contributes NaN."""

    scores: dict[str, float | int]
    _table: np.ndarray

    def resampled(self, indices: np.ndarray) -> dict[str, float | int]:
        """The scores of the questions at `indices` (integers in [0, N), repeats allowed, at least one)."""
        return _scores(self._table[indices])


def choice_scores(
    likelihoods: Sequence[Sequence[float]], choices: Sequence[Sequence[str]], right: Sequence[int]
) -> ChoiceScores:
    """Scores the choices that a model finds likeliest.

    Args:
        likelihoods: of each question the log-likelihood of each of its choices, in nats; empty if it has none.
        choices: their words.
        right: the number of the right one, from 0.
    """
    rows: list[list[float]] = []
    for values, words, answer in zip(likelihoods, choices, right, strict=True):
        per_character = [value / len(text) for value, text in zip(values, words, strict=True)]
        taken = [ranked.index(max(ranked)) == answer for ranked in (list(values), per_character) if ranked]
        rows.append([float(one) for one in taken] or [np.nan] * 2)
    table = np.array(rows, dtype=float)
    return ChoiceScores(_scores(table), table)


def _scores(table: np.ndarray) -> dict[str, float | int]:
    counted = table[~np.isnan(table[:, 0])]
    if not len(counted):
        return {}
    chosen, per_character = counted.mean(axis=0)
    return {"choice_questions": len(counted), "chosen": float(chosen), "chosen_per_character": float(per_character)}
