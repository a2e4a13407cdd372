"""bfloat16 products computed in float32, where the CPU has no bfloat16 arithmetic: held to plain ones."""

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_model
from torch import nn

from prefixvlm.modeling_vlm import cpu_prefix_vlm
from prefixvlm.modeling_vlm.cpu_prefix_vlm import MIN_ROWS, Float32Products, OneRowProducts, product_dtype

BFLOAT16, CPU = torch.bfloat16, torch.device("cpu")


@pytest.fixture
def slow_cpu(monkeypatch):
    """As if this CPU had no bfloat16 arithmetic."""
    monkeypatch.setattr(cpu_prefix_vlm, "_has_bfloat16_arithmetic", lambda: False)


@pytest.fixture
def fast_cpu(monkeypatch):
    monkeypatch.setattr(cpu_prefix_vlm, "_has_bfloat16_arithmetic", lambda: True)


def counted(monkeypatch) -> list:
    calls = []
    original = cpu_prefix_vlm._Linear.apply
    monkeypatch.setattr(cpu_prefix_vlm._Linear, "apply", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_a_linear_layer_and_its_gradients_are_nearer_the_truth(shape, bias):
    torch.manual_seed(0)
    layer, rows = nn.Linear(6, 9, bias=bias).to(BFLOAT16), torch.randn(shape).to(BFLOAT16)
    truth_layer, outputs = nn.Linear(6, 9, bias=bias).double(), []
    truth_layer.load_state_dict(layer.state_dict())
    for module, given in ((layer, rows.clone().requires_grad_()), (truth_layer, rows.double().requires_grad_())):
        module.zero_grad()
        with Float32Products():
            out = module(given)
        out.square().sum().backward()
        outputs.append([out, given.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, truth in zip(*outputs, strict=True):
        assert ours.dtype == BFLOAT16
        assert (ours.double() - truth).norm() <= 0.01 * truth.norm()


def test_a_convolution_too():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 2, stride=2).to(BFLOAT16)
    picture = torch.randn(2, 3, 8, 8).to(BFLOAT16)
    with Float32Products():
        out = layer(picture)
    assert out.dtype == BFLOAT16
    torch.testing.assert_close(out.float(), layer.float()(picture.float()), rtol=0.01, atol=0.01)


def test_few_rows_and_other_dtypes_are_left_alone(monkeypatch):
    calls = counted(monkeypatch)
    layer = nn.Linear(6, 9)
    with Float32Products():
        layer(torch.randn(20, 6))
        layer.to(BFLOAT16)(torch.randn(MIN_ROWS - 1, 6).to(BFLOAT16))
        assert calls == []
        layer(torch.randn(MIN_ROWS, 6).to(BFLOAT16))
    assert len(calls) == 1


def losses(model, batch: dict, autocast: bool = False, **kwargs) -> tuple:
    model.zero_grad()
    with torch.autocast("cpu", BFLOAT16, enabled=autocast):
        outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    return outputs.loss.detach(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def training_batch(model) -> dict:
    batch = layout_batch(model, ["wIwww", "Iww"], seed=1)
    labels = batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD) & batch["attention_mask"].bool(), -100)
    return {**batch, "labels": labels}


@pytest.mark.parametrize("skip_logits", [True, False])
def test_the_model_trains_in_it(slow_cpu, monkeypatch, skip_logits):
    calls = counted(monkeypatch)
    model = tiny_model("prefix")
    truth_loss, truth = losses(model, training_batch(model))
    assert calls == []
    model = model.to(BFLOAT16)
    loss, gradients = losses(model, training_batch(model), skip_logits=skip_logits)
    towers = model.vision_tower, model.projector, model.get_decoder()
    linears = sum(isinstance(module, nn.Linear) for tower in towers for module in tower.modules())
    assert len(calls) == linears + (not skip_logits)
    torch.testing.assert_close(loss.float(), truth_loss, rtol=0.02, atol=0.02)
    for name in ("projector.linear_1.weight", "language_model.model.layers.0.mlp.up_proj.weight"):
        assert (gradients[name] - truth[name]).norm() <= 0.1 * truth[name].norm()


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_to_what_would_be_emulated_computes_in_float32(slow_cpu, checkpointing, skip_logits):
    """`bf16=True` of any trainer: training at a twentieth of the speed would be the alternative."""
    model = tiny_model("prefix").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = training_batch(model)
    loss, gradients = losses(model, batch, skip_logits=skip_logits)
    same_loss, same = losses(model, batch, autocast=True, skip_logits=skip_logits)
    assert torch.equal(same_loss, loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    features = model.get_vision_features(batch.pop("pixel_values")).to(BFLOAT16)
    with torch.autocast("cpu", BFLOAT16):
        assert model(**batch, vision_features=features, use_cache=False).logits.dtype == torch.float32


def test_autocast_is_kept_where_the_cpu_can_do_it(fast_cpu):
    model = tiny_model("prefix")
    with torch.autocast("cpu", BFLOAT16):
        assert model(**training_batch(model)).logits.dtype == BFLOAT16


def test_checkpointed_activations_are_computed_twice_in_the_same_way(slow_cpu):
    model = tiny_model("prefix").to(BFLOAT16).train()
    batch = training_batch(model)
    expected = losses(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = losses(model, batch)
    torch.testing.assert_close(loss, expected[0], rtol=0.03, atol=0.03)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_so_are_those_that_torch_itself_wraps(slow_cpu):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = tiny_model("prefix").to(BFLOAT16).train()
    batch = training_batch(model)
    expected = losses(model, batch)
    layers = type(model.get_decoder().layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layers))
    loss, _ = losses(model, batch, use_cache=False)  # else each layer would add its keys twice
    torch.testing.assert_close(loss, expected[0], rtol=0.03, atol=0.03)


@torch.no_grad()
def test_a_fast_cpu_multiplies_as_it_is(fast_cpu, monkeypatch):
    calls = counted(monkeypatch)
    model = tiny_model("prefix").to(BFLOAT16)
    model(**layout_batch(model, ["wIwww"], seed=1))
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize(("rows", "converted"), [(1, False), (MIN_ROWS, True)])
def test_decoding_converts_weights_for_several_rows_only(slow_cpu, monkeypatch, rows, converted):
    model = tiny_model("prefix").to(BFLOAT16)
    batch = layout_batch(model, rows * ["wIwww"], seed=1)
    cache = model(**batch, use_cache=True).past_key_values
    calls = counted(monkeypatch)
    model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
    assert bool(calls) == converted


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "rows", "alone"), [(BFLOAT16, 1, True), (BFLOAT16, 2, False), (torch.float32, 1, False)])
def test_torch_itself_multiplies_a_single_bfloat16_row(fast_cpu, monkeypatch, dtype, rows, alone):
    model = tiny_model("prefix").to(dtype)
    batch = layout_batch(model, rows * ["wIwww"], seed=1)
    cache = model(**batch, use_cache=True).past_key_values
    before, seen, linear = torch.backends.mkldnn.enabled, [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: seen.append(torch.backends.mkldnn.enabled) or linear(*args))
    model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
    assert len(seen) == sum(isinstance(module, nn.Linear) for module in model.language_model.modules())
    assert set(seen) == {before and not alone}
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_is_left_as_it_was(enabled):
    with torch.backends.mkldnn.flags(enabled=enabled):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), OneRowProducts():
            torch.zeros(1, 2) @ torch.zeros(3, 4)
        assert torch.backends.mkldnn.enabled == enabled


def test_a_single_row_is_multiplied_in_float32_and_rounded_once():
    layer = nn.Linear(896, 300).to(BFLOAT16)
    row = torch.randn(1, 896, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    with OneRowProducts():
        out = layer(row)
    truth = layer.double()(row.double())
    assert (out - truth).norm() <= 0.004 * truth.norm()


def test_a_build_without_mkldnn_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert product_dtype(BFLOAT16, CPU) == torch.float32


def test_what_is_slow_is_bfloat16_on_a_cpu():
    assert product_dtype(torch.float16, CPU) == torch.float16
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert product_dtype(BFLOAT16, CPU) == (BFLOAT16 if supported else torch.float32)
    assert product_dtype(BFLOAT16, torch.device("meta")) == BFLOAT16
