"""Statistics over rows, by scipy: bootstrap intervals, and a permutation test of paired differences.

Shapes: R rows.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

DRAWN_AT_ONCE = 4_000_000  # numbers per batch of resamples, which bounds scipy's memory


def row_interval(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[np.ndarray],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval of statistics of columns whose rows are resampled together.

    Args:
        statistic: takes the columns, each (..., R), and `axis`; returns one number or an array of them per resample.
        columns: (R,) each.
        samples: the number of resamples.
        seed: the same seed gives the same interval.
        level: in (0, 1).

    Returns:
        The lower and the upper ends; for a single row, both are the statistic itself.
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
    """The two-sided p-value of a sign-flip test: how often random signs give a mean at least as far from 0.

    All sign patterns are tried if there are few, else `permutations` random ones; the observed one counts among them, so
    the value is never 0 (Phipson and Smyth 2010, "Permutation p-values should never be zero").

    Args:
        differences: (R,), one per pair.
    """
    if len(differences) == 1:  # which scipy refuses; both signs give the same distance from 0
        return 1.0
    with np.errstate(over="ignore"):  # scipy computes the number of sign patterns, 2^R
        found = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=permutations,
            batch=max(1, DRAWN_AT_ONCE // len(differences)),
            rng=seed,
        )
    return float(found.pvalue)
