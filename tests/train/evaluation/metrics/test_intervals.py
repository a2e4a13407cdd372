import numpy as np
import pytest

from prefixvlm.train.evaluation.metrics.intervals import bootstrap


def test_the_interval_of_a_mean_is_that_of_its_normal_approximation():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = bootstrap(lambda indices: {"mean": values[indices].mean()}, 400, samples=4000)["mean"]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_a_level_holds_its_share():
    draws = []
    low, high = bootstrap(lambda indices: draws.append(indices.mean()) or {"mean": draws[-1]}, 50, level=0.8)["mean"]
    assert np.mean([low <= draw <= high for draw in draws]) == pytest.approx(0.8, abs=0.01)
    assert len(draws) == 1000


def test_the_seed_decides():
    def run(seed):
        return bootstrap(lambda indices: {"mean": indices.mean()}, 30, 50, seed)

    assert run(1) == run(1) != run(2)


def test_a_score_that_some_resamples_lack_and_a_count():
    def resampled(indices):
        return {"count": int(sum(indices == 0))} | ({"rare": 7.0} if 0 in indices else {})

    assert bootstrap(resampled, 5) == {"rare": (7.0, 7.0)}


@pytest.mark.parametrize("wrong", [{"count": 0}, {"samples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_numbers_out_of_range_are_said(wrong):
    with pytest.raises(ValueError, match="must"):
        bootstrap(lambda indices: {}, **({"count": 3} | wrong))
