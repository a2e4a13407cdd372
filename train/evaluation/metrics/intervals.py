"""Confidence intervals of scores, by drawing the images or questions again (the percentile bootstrap, Efron 1979)."""

from collections.abc import Callable, Mapping

import numpy as np


def bootstrap(
    resampled: Callable[[np.ndarray], Mapping[str, float | int]],
    count: int,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """The interval of each score that holds the middle `level` of its values over resamples.

    Not scipy's `bootstrap`, which gives no interval at all where one resample lacks a score, and refuses a single item.

    Args:
        resampled: gives the scores of the items whose indices it gets; integers among them are counts and have no interval.
        count: how many items there are; each resample draws as many, with repeats.
        samples: how many resamples.
        seed: the same seed gives the same intervals.
        level: in (0, 1).

    Returns:
        (low, high) of each score, over those resamples that have it.

    Raises:
        ValueError: a number out of range.
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
