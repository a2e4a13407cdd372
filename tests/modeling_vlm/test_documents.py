"""Packed samples that are known by positions alone, and labels that are shifted already."""

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_model
from transformers import DataCollatorWithFlattening

MODES = ["causal", "prefix", "prefix_all_images", "bidirectional"]


def packed(model, rows: list[str]) -> tuple[list[dict], dict]:
    """Samples one by one, and the same in one row."""
    samples = [layout_batch(model, [row], seed=number) for number, row in enumerate(rows)]
    joined = {name: torch.cat([sample[name] for sample in samples], dim=1) for name in ("input_ids",)}
    joined["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
    joined["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    return samples, joined


def text_labels(input_ids: torch.Tensor) -> torch.Tensor:
    return input_ids.where(input_ids >= FIRST_WORD, -100)


@pytest.mark.parametrize("mode", MODES)
def test_positions_that_start_again_are_documents(mode):
    model = tiny_model(mode)
    samples, joined = packed(model, ["Iwww", "ww", "wIIw"])
    labels = text_labels(joined["input_ids"])
    with torch.no_grad():
        alone = [model(**sample, labels=text_labels(sample["input_ids"])) for sample in samples[:1] + samples[2:]]
        text = {name: samples[1][name] for name in ("input_ids", "attention_mask")}
        alone.insert(1, model(**text, labels=text["input_ids"]))
        together = model(**joined, labels=labels)
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in alone], dim=1))
    # the first token of a document is predicted by no other
    torch.testing.assert_close(together.token_losses, torch.cat([output.token_losses for output in alone]))


@pytest.mark.parametrize("known_by", ["position_ids", "seq_idx", "flash_attn_kwargs"])
def test_a_padding_free_batch_of_transformers(known_by):
    model = tiny_model()
    samples, joined = packed(model, ["Iwww", "Iww"])
    features = [
        {"input_ids": sample["input_ids"][0].tolist(), "labels": text_labels(sample["input_ids"])[0].tolist()}
        for sample in samples
    ]
    ways = {f"return_{name}": name == known_by for name in ("position_ids", "seq_idx", "flash_attn_kwargs")}
    batch = DataCollatorWithFlattening(return_tensors="pt", **ways)(features)
    with torch.no_grad():
        found = model(**batch, pixel_values=joined["pixel_values"])
        alone = [model(**sample, labels=text_labels(sample["input_ids"])) for sample in samples]
    torch.testing.assert_close(found.loss, torch.cat([output.token_losses for output in alone]).mean())


@pytest.mark.parametrize("fill", [0, 1])
def test_positions_after_left_padding_are_one_document(fill):
    """transformers gives padding the position 1, others 0."""
    model = tiny_model()
    batch = layout_batch(model, ["Iwwwww", "Iw"], seed=1, padding_side="left")
    positions = (batch["attention_mask"].cumsum(dim=-1) - 1).masked_fill(batch["attention_mask"] == 0, fill)
    with torch.no_grad():
        expected = model(**batch).logits[:, -1]
        assert torch.equal(model(**batch, position_ids=positions).logits[:, -1], expected)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_labels_that_are_shifted_already(skip_logits):
    model = tiny_model().train()
    batch = layout_batch(model, ["Iwww", "Iwwwww"], seed=2)
    labels = text_labels(batch["input_ids"])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**batch, labels=labels, skip_logits=skip_logits)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": torch.full_like(labels, 7)}):
        found = model(**batch, **given, skip_logits=skip_logits)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.token_losses, expected.token_losses)
