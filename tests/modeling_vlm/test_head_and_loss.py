"""The head and its loss in one step, held to the plain form: logits, then cross-entropy, then autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FIRST_WORD, layout_batch, tiny_model
from torch import nn

from prefixvlm.modeling_vlm import cpu_prefix_vlm, loss_prefix_vlm
from prefixvlm.modeling_vlm.loss_prefix_vlm import head_and_loss, is_plain

WIDTH, VOCABULARY = 12, 50


def problem(tokens: int, bias: bool = False, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def plain(head, hidden, targets, items):
    losses = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    return losses.sum() / items, losses.detach()


def everything(form, head, hidden, targets, items, factor: float = 1.0):
    """Loss, token losses and all gradients of one form."""
    for tensor in (hidden, *head.parameters()):
        tensor.grad = None
    loss, losses = form(head, hidden, targets, items)
    if loss.requires_grad:
        (factor * loss).backward()
    return [loss.detach(), losses, hidden.grad, *(parameter.grad for parameter in head.parameters())]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    frozen=st.booleans(),
    rows=st.integers(1, 10),
    items=st.sampled_from([1, 7, 2.5]),
    factor=st.sampled_from([1.0, -0.3]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_form(tokens, bias, frozen, rows, items, factor, seed):
    head, hidden, targets = problem(tokens, bias, seed=seed)
    head.requires_grad_(not frozen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_prefix_vlm, "CHUNK_ELEMENTS", rows * VOCABULARY)
        actual = everything(head_and_loss, head, hidden, targets, items, factor)
    expected = everything(plain, head, hidden, targets, torch.tensor(items), factor)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 100])
def test_bfloat16_is_as_near_the_truth_as_the_plain_form(monkeypatch, rows):
    monkeypatch.setattr(loss_prefix_vlm, "CHUNK_ELEMENTS", rows * VOCABULARY)
    head, hidden, targets = problem(64, dtype=torch.bfloat16)
    ours, theirs = (everything(form, head, hidden, targets, 64) for form in (head_and_loss, plain))
    truth = everything(plain, head.double(), hidden.detach().double().requires_grad_(), targets, 64)
    for one, other, true in zip(ours, theirs, truth, strict=True):
        error, their_error = ((value.double() - true.double()).abs().max() for value in (one, other))
        assert error <= 1.5 * their_error + 1e-6


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights(monkeypatch):
    monkeypatch.setattr(cpu_prefix_vlm, "_has_bfloat16_arithmetic", lambda: True)
    head, hidden, targets = problem(16)
    results = []
    for form in (head_and_loss, plain):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(everything(form, head, hidden, targets, 16))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert not torch.equal(results[0][0], everything(head_and_loss, head, hidden, targets, 16)[0])


def test_never_holds_more_logits_than_a_chunk(monkeypatch):
    head, hidden, targets = problem(40)
    monkeypatch.setattr(loss_prefix_vlm, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    sizes = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: sizes.append(len(args[0])) or linear(*args))
    head_and_loss(head, hidden, targets, 40)
    assert sizes == [8] * 5


def test_a_second_backward_is_refused_rather_than_wrong():
    head, hidden, targets = problem(4)
    loss, _ = head_and_loss(head, hidden, targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_more_than_a_weight_is_called():
    plain_head, hooked, wrapped = (nn.Linear(2, 3) for _ in range(3))
    hooked.register_forward_hook(lambda *args: None)
    assert is_plain(plain_head)
    assert not is_plain(hooked)
    assert not is_plain(nn.Sequential(wrapped))


def test_the_model_takes_it_on_supervised_positions_only(monkeypatch):
    model = tiny_model("prefix")
    batch = layout_batch(model, ["wIwww", "Iw"], seed=1)
    labels = batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD) & batch["attention_mask"].bool(), -100)
    seen = []
    monkeypatch.setattr(
        "prefixvlm.modeling_vlm.modeling_prefix_vlm.head_and_loss",
        lambda head, hidden, targets, items: (
            seen.append(tuple(hidden.shape)) or head_and_loss(head, hidden, targets, items)
        ),
    )
    model(**batch, labels=labels, skip_logits=True)
    assert seen == [(4, 48)]


@pytest.mark.parametrize("scaling", ["logits_scaling", "logit_scale", "final_logit_softcapping"])
def test_a_head_that_scales_takes_the_plain_form(scaling):
    model = tiny_model("prefix")
    assert model._has_plain_head()
    setattr(model.config.text_config, scaling, 2.0)
    assert not model._has_plain_head()


def test_float16_keeps_what_a_loss_scaler_multiplies():
    """Gradients far below what float16 holds, times a scale that comes after."""
    head, hidden, targets = problem(8)
    results = []
    for form in (head_and_loss, plain):
        with torch.autocast("cpu", torch.float16):
            results.append(everything(form, head, hidden, targets, 1e6, factor=65536.0))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradient(monkeypatch, mode):
    head, hidden, targets = problem(8)
    expected, _ = plain(head, hidden, targets, 8)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # what the gradient starts with
    with mode():
        loss, _ = head_and_loss(head, hidden, targets, 8)
    torch.testing.assert_close(loss, expected.detach())
    with pytest.raises(TypeError):
        head_and_loss(head, hidden, targets, 8)
