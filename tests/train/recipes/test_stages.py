"""The stages are the paper's, to the digit."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
from tiny import tiny_model

from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES
from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES, Stage


@pytest.mark.parametrize(
    ("number", "rates", "mode", "text_format", "noise"),
    [
        (0, (0, 1e-3, 0), "bidirectional", "caption", 0.2),
        (1, (0, 1e-3, 0), "prefix", "caption", 0),
        (2, (5e-6, 2e-3, 2e-5), "prefix", "caption", 0),
        (3, (5e-6, 1e-4, 2e-5), "prefix", "conversation", 0),
    ],
)
def test_stage_is_table_v(number, rates, mode, text_format, noise):
    stage = PAPER_STAGES[number]
    assert stage.learning_rates == dict(zip(MODULES, rates, strict=True))
    assert (stage.number, stage.attention_mode, stage.text_format, stage.noise) == (number, mode, text_format, noise)
    assert (stage.epochs, stage.batch_size, stage.min_lr, stage.weight_decay) == (1, 128, 1e-8, 0.01)
    assert (stage.beta1, stage.beta2, stage.max_grad_norm, stage.warmup) == (0.9, 0.999, 1.0, 0)


@pytest.mark.parametrize("number", PAPER_STAGES)
def test_prepare_trains_exactly_what_has_a_rate(number):
    model = tiny_model("causal")
    PAPER_STAGES[number].prepare(model)
    assert model.config.attention_mode == PAPER_STAGES[number].attention_mode
    for module, rate in PAPER_STAGES[number].learning_rates.items():
        assert {p.requires_grad for p in getattr(model, module).parameters()} == {rate > 0}


@pytest.mark.parametrize(
    "change",
    [
        {"projector_lr": -1e-3},
        {"projector_lr": 0.0},
        {"noise": 1.0},
        {"text_format": "story"},
        {"epochs": 0},
        {"batch_size": 0},
        {"warmup": -0.1},
        {"number": 4},
        {"projector_lr": float("nan")},
        {"attention_mode": "sideways"},
        {"min_lr": 1.0},
    ],
)
def test_senseless_settings_are_refused(change):
    with pytest.raises(ValueError, match="Stage"):
        dataclasses.replace(PAPER_STAGES[0], **change)


def test_attention_modes_are_the_models():
    assert get_args(get_type_hints(Stage)["attention_mode"]) == ATTENTION_MODES
