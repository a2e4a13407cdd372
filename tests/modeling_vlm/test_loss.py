"""The loss: next-token cross-entropy on the supervised positions, with logits and with `skip_logits`."""

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_model

ROWS = ["wIwIwww", "Iwwwww", "ww"]


@pytest.fixture(params=["tied", "untied"])
def model(request):
    return tiny_model("prefix", tie_word_embeddings=request.param == "tied")


@pytest.fixture
def batch(model):
    """Three ragged rows; in the first, one word in the middle has no label."""
    batch = layout_batch(model, ROWS, seed=1)
    labels = batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD) & batch["attention_mask"].bool(), -100)
    labels[0, -2] = -100
    return {**batch, "labels": labels}


def losses_by_hand(logits, labels) -> list[torch.Tensor]:
    """Minus the log-probability of every supervised token, row by row, each from the position before it."""
    losses = []
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            target = labels[row, place]
            if target != -100:
                scores = logits[row, place - 1].float()
                losses.append(scores.exp().sum().log() - scores[target])
    return losses


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_loss_is_the_mean_next_token_cross_entropy(model, batch):
    outputs = model(**batch)
    by_hand = torch.stack(losses_by_hand(outputs.logits, batch["labels"]))
    assert len(by_hand) == int((batch["labels"][:, 1:] != -100).sum()) == 3 + 5 + 1
    torch.testing.assert_close(outputs.loss, by_hand.mean(), rtol=1e-6, atol=1e-6)


def test_token_losses_come_row_by_row_and_carry_no_gradient(model, batch):
    outputs = model(**batch)
    by_hand = torch.stack(losses_by_hand(outputs.logits, batch["labels"])).detach()
    torch.testing.assert_close(outputs.token_losses, by_hand, rtol=1e-5, atol=1e-5)
    assert not outputs.token_losses.requires_grad
    assert outputs.loss.requires_grad


def test_skip_logits_changes_neither_loss_nor_gradients(model, batch):
    plain, thrifty = model(**batch), model(**batch, skip_logits=True)
    assert thrifty.logits is None
    torch.testing.assert_close(thrifty.loss, plain.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(thrifty.token_losses, plain.token_losses, rtol=1e-5, atol=1e-5)
    expected = gradients(model, **batch)
    actual = gradients(model, **batch, skip_logits=True)
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "k_proj.bias" not in name)
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).abs().max()  # sums in another order, so some digits more than rounding once
        assert difference <= 1e-5 * max(1, gradient.abs().max()), f"{name} differs by {difference:.1e}"


def test_skip_logits_runs_the_head_on_supervised_positions_only(model, batch):
    shapes = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    model(**batch, skip_logits=True)
    assert shapes == [(9, 48)]


def test_skip_logits_without_labels_still_gives_logits(model, batch):
    labels = batch.pop("labels")
    assert model(**batch, skip_logits=True).logits.shape[:2] == labels.shape


@pytest.mark.parametrize("count", [40, torch.tensor(40)], ids=["int", "tensor"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_num_items_in_batch_divides_the_sum(model, batch, count, skip_logits):
    outputs = model(**batch, num_items_in_batch=count, skip_logits=skip_logits)
    torch.testing.assert_close(outputs.loss, outputs.token_losses.sum() / 40, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_accumulated_parts_make_the_whole(model, batch, skip_logits):
    """Rows with 3, 5 and 1 supervised tokens: a mean of means would be wrong."""
    whole = gradients(model, **batch)
    model.zero_grad(set_to_none=True)
    images = [batch["pixel_values"][:2], batch["pixel_values"][2:], None]
    for row in range(3):
        part = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        model(**part, pixel_values=images[row], num_items_in_batch=9, skip_logits=skip_logits).loss.backward()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - whole[name]).abs().max()
        assert difference <= 1e-5 * max(1, whole[name].abs().max()), f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("skip_logits", [False, True])
def test_no_supervised_tokens_give_a_finite_zero(model, batch, skip_logits):
    nothing = torch.full_like(batch["labels"], -100)
    outputs = model(**{**batch, "labels": nothing}, skip_logits=skip_logits)
    assert outputs.loss.item() == 0
    assert outputs.token_losses.shape == (0,)
    outputs.loss.backward()  # as a trainer would
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_first_position_is_never_supervised(model, batch, skip_logits):
    changed = batch["labels"].clone()
    changed[:, 0] = FIRST_WORD + 7
    outputs = [model(**{**batch, "labels": labels}, skip_logits=skip_logits) for labels in (batch["labels"], changed)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[0].token_losses.shape == outputs[1].token_losses.shape


@torch.no_grad()
def test_logits_to_keep(model, batch):
    labels = batch.pop("labels")
    full = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, full[:, -2:], rtol=1e-5, atol=1e-5)
    places = torch.tensor([1, 5])
    torch.testing.assert_close(model(**batch, logits_to_keep=places).logits, full[:, places], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch, labels=labels, logits_to_keep=2).loss, model(**batch, labels=labels).loss)
