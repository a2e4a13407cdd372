"""Statistics over rows of numbers: intervals by drawing rows again, and a p-value of paired differences, both by scipy.

Shapes: R rows.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

DRAWN_AT_ONCE = 4_000_000  # numbers in one of scipy's arrays


def row_interval(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[np.ndarray],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of numbers that are made of columns whose rows are drawn together; of one row, what it is itself.

    Args:
        statistic: takes the columns, each (..., R), and `axis`; gives an array of numbers, or of arrays of them.
        columns: (R,) each.
        samples: how many resamples.
        seed: the same seed gives the same interval.
        level: in (0, 1).

    Returns:
        The lower and the upper ends.
    """
    count = len(columns[0])
    if count == 1:  # which scipy refuses
        return statistic(*columns, axis=-1), statistic(*columns, axis=-1)
    found = stats.bootstrap(
        columns,
        statistic,
        n_resamples=samples,
        batch=max(1, DRAWN_AT_ONCE // count),
        vectorized=True,
        paired=True,
        confidence_level=level,
        method="percentile",
        rng=seed,
    )
    return found.confidence_interval


def sign_flip_p_value(differences: np.ndarray, permutations: int = 10_000, seed: int = 0) -> float:
    """How often a mean at least as far from 0 comes about when each difference gets a sign at random, two-sided.

    All signs are tried where there are few, else `permutations` random ones; the differences as found count among them, so
    the value is never 0 (Phipson and Smyth 2010, "Permutation p-values should never be zero").

    Args:
        differences: (R,), one for each pair.
    """
    if len(differences) == 1:  # which scipy refuses; both signs are as far from 0
        return 1.0
    with np.errstate(over="ignore"):  # scipy counts the ways to give signs, 2^R
        found = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=permutations,
            batch=max(1, DRAWN_AT_ONCE // len(differences)),
            rng=seed,
        )
    return float(found.pvalue)
