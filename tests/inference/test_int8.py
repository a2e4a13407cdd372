"""Weights of 8 bits: near the weights they come from, the same in both ways to multiply, and for generation only."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import layout_batch, tiny_model
from torch import nn

from prefixvlm import quantize_int8
from prefixvlm.inference.int8 import MAX_PACKED_ROWS, Int8Linear


def layer(inputs: int, outputs: int, bias: bool, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@settings(deadline=None, max_examples=30)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_step(inputs, outputs, scale, seed):
    linear = layer(inputs, outputs, bias=False, seed=seed)
    linear.weight.data *= scale
    quantized = Int8Linear(linear)
    step = quantized.scales.float()[:, None]
    assert quantized.weight.dtype == torch.int8
    # at the ends half a step more, since a step itself is a bfloat16 number
    inside = quantized.weight.abs() < 127
    error = (quantized.weight * step - linear.weight).abs()
    assert (error <= 0.5001 * step)[inside].all()
    assert (error <= 1.01 * step).all()


def test_a_row_of_zeros_stays_zero():
    linear = layer(8, 3, bias=False, seed=0)
    linear.weight.data[1] = 0
    out = Int8Linear(linear)(torch.ones(1, 8))
    assert out[0, 1] == 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (2, MAX_PACKED_ROWS // 2, 64), (3, MAX_PACKED_ROWS, 64)])
@pytest.mark.parametrize("odd", [0, 1, 8])
def test_few_and_many_rows_are_multiplied_alike(shape, bias, dtype, odd):
    shape = (*shape[:-1], shape[-1] + odd)  # torch's packed product takes whole vectors only
    linear = layer(shape[-1], 48, bias, seed=1)
    quantized = Int8Linear(linear)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = quantized.weight * quantized.scales.float()[:, None]
    expected = nn.functional.linear(rows.float(), weight, linear.bias)
    actual = quantized(rows)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert (actual.float() - expected).norm() <= 0.01 * expected.norm()


@torch.no_grad()
def test_many_rows_lose_nothing_but_the_last_bits_of_what_they_are_kept_in():
    quantized = Int8Linear(layer(896, 48, bias=False, seed=1))
    rows = torch.randn(MAX_PACKED_ROWS + 1, 896, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    expected = rows.double() @ (quantized.weight * quantized.scales.double()[:, None]).T
    assert (quantized(rows) - expected).norm() <= 0.003 * expected.norm()


@torch.no_grad()
def test_float16_does_not_overflow_before_it_is_scaled():
    linear = layer(896, 48, bias=False, seed=1)
    rows = 200 * torch.randn(MAX_PACKED_ROWS + 1, 896, generator=torch.Generator().manual_seed(2))
    out = Int8Linear(linear)(rows.half())
    assert (out.float() - linear(rows)).norm() <= 0.02 * linear(rows).norm()


def test_only_the_decoder_and_its_head_are_replaced():
    model = tiny_model()
    embedding = model.get_input_embeddings().weight.clone()
    linears = sum(isinstance(module, nn.Linear) for module in model.language_model.modules())
    assert quantize_int8(model) is model
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == linears
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert any(isinstance(module, nn.Linear) for module in model.vision_tower.modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_near_and_generation_runs(dtype):
    model = tiny_model().to(dtype)
    quantized = quantize_int8(copy.deepcopy(model))
    batch = layout_batch(model, ["wIwww", "Iw"], seed=1)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    expected, actual = (one(**batch).logits[batch["attention_mask"].bool()].float() for one in (model, quantized))
    assert (actual - expected).norm() <= 0.05 * expected.norm()
    assert not torch.equal(actual, expected)
    assert quantized.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 3


def test_saving_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be saved; save the model that it was made from"):
        quantize_int8(tiny_model()).save_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, MAX_PACKED_ROWS + 1])
def test_the_dtype_may_change_afterwards(rows):
    quantized = Int8Linear(layer(64, 48, bias=True, seed=1))
    given = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))
    expected = quantized(given)
    torch.testing.assert_close(quantized.double()(given.double()).float(), expected, rtol=0.02, atol=0.02)


def test_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match="merge them"):
        quantize_int8(model.base_model.model)
