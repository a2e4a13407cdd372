"""Confidence intervals of scores by resampling images or questions (the percentile bootstrap, Efron 1979)."""

from collections.abc import Callable, Mapping

import numpy as np


def bootstrap(
    resampled: Callable[[np.ndarray], Mapping[str, float | int]],
    count: int,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each score over resamples of the items.

    Not scipy's `bootstrap`, which gives no interval at all if one resample lacks a score, and refuses a single item.

    Args:
        resampled: returns the scores of the items at the given indices; integers are counts and get no interval.
        count: the number of items; each resample draws as many, with replacement.
        samples: the number of resamples.
        seed: the same seed gives the same intervals.
        level: in (0, 1).

    Returns:
        (low, high) of each score, over the resamples that have it.

    Raises:
        ValueError: for a number out of range.
    """
    if count < 1 or samples < 1:
        raise ValueError(f"count is {count} and samples {samples}; both must be positive.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, such as 0.95.")
    generator = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    for _ in range(samples):
        for name, value in resampled(generator.integers(count, size=count)).items():
            if not isinstance(value, int):
                values.setdefault(name, []).append(value)
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = {name: np.quantile(found, tails) for name, found in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
