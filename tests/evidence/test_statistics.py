"""Means over seeds and paired differences: against textbook numbers, and verdicts that follow the test alone."""

import pytest

from evidence.statistics import difference, mean


def test_the_interval_is_students():
    # 2.776 is the 97.5% quantile of Student's t with 4 degrees of freedom
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_pairs_are_compared_seed_by_seed():
    first, second = [10.0, 20.0, 30.0, 40.0], [9.0, 18.9, 29.1, 39.0]
    apart = difference(first, second)
    assert apart.mean.value == pytest.approx(1.0)
    # unpaired, seeds that far apart could not tell the two arms from each other
    assert apart.p_value < 0.001
    assert apart.verdict("first", "second") == "first"
    assert difference(second, first).verdict("first", "second") == "second"


def test_chance_is_no_verdict():
    assert difference([1.0, 2.0, 3.0], [1.5, 1.4, 3.2]).verdict("first", "second") == "no difference shown"
    same = difference([1.0, 2.0], [1.0, 2.0])
    assert (same.p_value, same.verdict("first", "second")) == (1.0, "no difference shown")
