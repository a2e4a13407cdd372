"""Packing: every sample in exactly one row, little padding, and the same loss and gradients as each sample alone."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.packing import pack

PROCESSOR = tiny_processor()
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 600))
def test_each_sample_is_in_one_row_and_rows_fit(lengths, max_tokens_per_row):
    rows = pack(lengths, max_tokens_per_row)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= max(max_tokens_per_row, *lengths)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 600))
def test_packing_never_takes_more_than_one_row_per_sample(lengths, max_tokens_per_row):
    rows = pack(lengths, max_tokens_per_row)
    width = max(sum(lengths[index] for index in row) for row in rows)
    assert len(rows) * width <= 1.01 * len(lengths) * max(lengths)


def test_real_lengths_leave_less_than_three_percent_padding():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [256 + draw.randint(5, 60) for _ in range(32)]
        rows = pack(lengths, 2048)
        width = max(sum(lengths[index] for index in row) for row in rows)
        assert sum(lengths) / (len(rows) * width) > 0.97


def samples(draw: random.Random, count: int) -> list[Conversation]:
    """Zero to two images and one to three turns each."""
    made = []
    for number in range(count):
        pictures = [Image.effect_noise((16, 16), 60).convert("RGB") for _ in range(draw.choice([0, 1, 1, 2]))]
        pairs = [("q" * draw.randint(1, 9), "a" * draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
        turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
        made.append(Conversation.about(pictures, turns, f"row {number}", seed=str(number)))
    return made


def summed_loss_and_gradients(model, batches):
    """The sum of the losses of all supervised tokens, and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        batch.pop("is_noised", None)
        loss = model(**batch, num_items_in_batch=1, use_cache=False, skip_logits=True).loss
        loss.backward()
        total += loss.item()
    return total, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images", "bidirectional"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text_format", ["caption", "conversation"])
def test_a_packed_row_equals_its_samples_alone(mode, implementation, text_format):
    model = tiny_model(mode, attn_implementation=implementation)
    some = samples(random.Random(1), 6)
    noise = 0.2 if mode == "bidirectional" else 0.0
    packed = ConversationCollator(PROCESSOR, text_format, noise=noise, max_tokens_per_row=200)(some)
    assert packed["input_ids"].shape[0] < len(some)
    alone = [ConversationCollator(PROCESSOR, text_format, noise=noise)([sample]) for sample in some]
    loss, gradients = summed_loss_and_gradients(model, [packed])
    expected_loss, expected = summed_loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values()).item()
    for name, gradient in gradients.items():
        # some, such as those of key biases, are nothing but rounding: hence the absolute part
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * largest)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 400))
def test_any_packing_of_any_samples_has_their_loss(seed, count, max_tokens_per_row):
    model = tiny_model()
    some = samples(random.Random(seed), count)
    packed = ConversationCollator(PROCESSOR, "conversation", max_tokens_per_row=max_tokens_per_row)(some)
    alone = [ConversationCollator(PROCESSOR, "conversation")([sample]) for sample in some]
    with torch.no_grad():
        loss = model(**packed, num_items_in_batch=1, skip_logits=True).loss.item()
        expected = sum(model(**batch, num_items_in_batch=1, skip_logits=True).loss.item() for batch in alone)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_document_does_not_predict_the_first_token_of_the_next():
    # even when labels ask for it, as those of other collators may
    model = tiny_model()
    batch = ConversationCollator(PROCESSOR, "caption", max_tokens_per_row=200)(
        [Conversation.about([], [("assistant", "abc")]), Conversation.about([], [("assistant", "de")])]
    )
    clean = model(**batch, num_items_in_batch=1, skip_logits=True).loss
    second = int((batch["document_ids"][0] == 1).sum())
    batch["labels"][0, second] = batch["input_ids"][0, second]
    assert torch.equal(model(**batch, num_items_in_batch=1, skip_logits=True).loss, clean)


def test_padding_samples_have_no_loss():
    (sample,) = samples(random.Random(2), 1)
    batch = ConversationCollator(PROCESSOR, "conversation")([sample, replace(sample, is_padding_sample=True)])
    assert (batch["labels"][0] != -100).any()
    assert (batch["labels"][1] == -100).all()
