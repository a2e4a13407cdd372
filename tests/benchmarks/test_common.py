"""What the benchmarks reckon with: operations, depth, alternation, exponents."""

import time

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Setup, alternate, exponent, forward_flops
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training.cost import training_flops

CPU = Setup(torch.device("cpu"), torch.float32, None)


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def test_operations_of_a_pass_are_those_that_torch_counts():
    model = tiny_model(attn_implementation="eager")
    batch = layout_batch(model, ["IwIwwwww"], seed=0)
    flops = counted(lambda: model(**batch, logits_to_keep=1, use_cache=False))
    # torch also counts the angles of the rotary positions
    assert forward_flops(model.config, 2, 4, 14) == pytest.approx(flops, rel=2e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_operations_of_a_training_step_are_those_that_torch_counts(stage):
    """What the trainer's MFU and the benchmark's go by; torch's count knows nothing of either."""
    model = tiny_model(attn_implementation="eager", image_size=32).train()
    PAPER_STAGES[stage].prepare(model)
    batch = layout_batch(model, ["I" + 30 * "w"], seed=0)
    labels = batch["input_ids"].where(batch["input_ids"] >= FIRST_WORD, -100)
    flops = counted(lambda: model(**batch, labels=labels, skip_logits=True, use_cache=False).loss.backward())
    tokens = batch["input_ids"].shape[1]
    assert tokens == 46
    # pixels and the first layer's inputs need no gradient in places where the count gives them one
    assert training_flops(model, PAPER_STAGES[stage].trains, 1, tokens, tokens**2, 30) == pytest.approx(flops, rel=0.03)


def test_depth_keeps_to_the_time():
    setup = Setup(torch.device("cpu"), torch.float32, seconds=10.0)
    rate = 100.0
    depth = setup.depth(2000.0, 200.0, rate)
    assert (200 + depth * 1800) / (rate * common.REACHED) == pytest.approx(10.0)
    assert setup.depth(500.0, 200.0, rate) == 1.0
    assert setup.depth(9000.0, 2000.0, rate) == 0.0
    assert CPU.depth(9000.0, 2000.0, rate) == 1.0


def test_models_of_one_depth_have_as_many_layers():
    meta = Setup(torch.device("meta"), torch.bfloat16, None)
    ours, llava = common.prefix_vlm(meta, 0.1), common.llava(meta, 0.1)
    for config in (ours.config, llava.config):
        assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (3, 2)
    assert ours.dtype == llava.dtype == torch.bfloat16
    # the same but for the projector's width
    sizes = [sum(p.numel() for p in module.parameters()) for module in (ours, llava)]
    projectors = [sum(p.numel() for p in part.parameters()) for part in (ours.projector, llava.model.multi_modal_projector)]
    assert sizes[0] - projectors[0] == sizes[1] - projectors[1]


def test_quick_weights_are_random_and_finite():
    model = common.prefix_vlm(Setup(torch.device("cpu"), torch.float32, None), 0.0)
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    assert weight.isfinite().all()
    assert 0.005 < weight.std() < 0.05
    assert not torch.equal(weight[0], weight[1])


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []

    def call(name: str, seconds: float):
        calls.append(name)
        time.sleep(seconds)

    sides = {"a": lambda: call("a", 0.02), "b": lambda: call("b", 0.0)}
    seconds = alternate(sides, CPU.device, repeats=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]  # there and back, so that neither always comes last
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert common.ratio(seconds["a"], seconds["b"]) > 1


def test_an_exponent_is_the_slope_in_logarithms():
    amounts = [1, 2, 4, 8]
    assert exponent(amounts, [3 * amount**1.5 for amount in amounts]) == pytest.approx(1.5)
