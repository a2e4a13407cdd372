"""What each training run would measure for its log, measured once."""

import functools

import pytest

from prefixvlm.train.training import trainer


@pytest.fixture(autouse=True, scope="session")
def _peak_rate_measured_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "peak_rate", functools.cache(trainer.peak_rate))
        yield
