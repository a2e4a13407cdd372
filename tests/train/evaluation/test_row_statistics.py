"""Intervals and p-values over rows: against numbers known by hand, never certain, and a single row too."""

import numpy as np
import pytest
from scipy import stats

from prefixvlm.train.evaluation.row_statistics import row_interval, sign_flip_p_value


def test_p_value_of_no_difference_is_1_and_of_a_clear_one_as_small_as_the_draws_allow():
    assert sign_flip_p_value(np.zeros(9)) == 1
    assert sign_flip_p_value(np.full(60, 0.1)) == pytest.approx(2 / 10_001)


def test_p_value_of_few_pairs_tries_all_signs():
    assert sign_flip_p_value(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)


def test_p_value_is_that_of_the_t_test_where_differences_are_normal():
    differences = np.random.default_rng(0).normal(0.2, 1, 200)
    assert sign_flip_p_value(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.005)


def test_columns_are_drawn_together():
    columns = [np.arange(1.0, 9.0), 2 * np.arange(1.0, 9.0)]
    low, high = row_interval(lambda a, b, axis: a.sum(axis) / b.sum(axis), columns)
    assert (low, high) == (0.5, 0.5)


def test_one_row_is_its_own_interval_and_no_evidence():
    assert row_interval(np.mean, [np.array([3.0])]) == (3.0, 3.0)
    assert sign_flip_p_value(np.array([3.0])) == 1


def test_the_seed_decides():
    values = [np.random.default_rng(1).normal(size=50)]
    assert row_interval(np.mean, values, seed=1) == row_interval(np.mean, values, seed=1)
    assert row_interval(np.mean, values, seed=1) != row_interval(np.mean, values, seed=2)
