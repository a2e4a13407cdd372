"""Statistics over seeds: means with intervals, and paired tests of arms that were run with the same seeds."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95% interval (Student's t)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Difference:
    """The difference of two arms, paired by seed: its mean with a 95% interval, and the p-value of the paired t-test."""

    mean: Mean
    p_value: float

    def verdict(self, better: str, worse: str) -> str:
        """`better` if the difference is significantly above 0, `worse` if below, else that none was shown."""
        if not self.p_value < 1 - LEVEL:
            return "no difference shown"
        return better if self.mean.value > 0 else worse

    def __str__(self) -> str:
        return f"{self.mean.value:+.2f} [{self.mean.low:+.2f}, {self.mean.high:+.2f}], p = {self.p_value:.3f}"


def mean(values: list[float]) -> Mean:
    """The mean of at least two values, one per seed."""
    values = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Mean(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def difference(first: list[float], second: list[float]) -> Difference:
    """`first` minus `second`; both have the values of the same seeds in the same order."""
    apart = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not apart.any():
        return Difference(Mean(0.0, 0.0, 0.0), 1.0)
    return Difference(mean(apart), float(stats.ttest_rel(first, second).pvalue))
