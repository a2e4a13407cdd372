"""torch.compile and torch.export see one graph: nothing in it asks the device for a number."""

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_model
from transformers import StaticCache


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(model):
    """Fails at a graph break; without a backend that compiles for minutes."""
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("mode", ["prefix_all_images", "bidirectional"])
def test_a_forward_pass_with_images_is_one_graph(mode):
    model = tiny_model(mode)
    batch = layout_batch(model, ["wIwwI", "Iww"], seed=1)
    with torch.no_grad():
        found = compiled(model)(**batch, use_cache=False)
        torch.testing.assert_close(found.logits, model(**batch, use_cache=False).logits)


def test_a_training_step_with_logits_is_one_graph():
    model = tiny_model(attn_implementation="eager").train()
    batch = layout_batch(model, ["wIwwI", "Iww"], seed=1)
    labels = batch["input_ids"].where(batch["input_ids"] >= FIRST_WORD, -100)
    found = compiled(model)(**batch, labels=labels, use_cache=False)
    torch.testing.assert_close(found.loss, model(**batch, labels=labels, use_cache=False).loss)
    found.loss.backward()


@pytest.mark.parametrize("mask", ["given", "none"])
def test_decoding_with_a_static_cache_is_one_graph(mask):
    model = tiny_model()
    batch = layout_batch(model, ["wIwwwww"], seed=2)
    length = batch["input_ids"].shape[1]
    prompt, step = batch["input_ids"][:, :-1], batch["input_ids"][:, -1:]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 5)
    options = {"past_key_values": cache, "use_cache": True}
    both = torch.ones(1, length, dtype=torch.long) if mask == "given" else None
    with torch.no_grad():
        model(
            prompt,
            pixel_values=batch["pixel_values"],
            attention_mask=None if both is None else both[:, :-1],
            cache_position=torch.arange(length - 1),
            **options,
        )
        found = compiled(model)(step, attention_mask=both, cache_position=torch.tensor([length - 1]), **options)
        expected = model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits[:, -1:]
    torch.testing.assert_close(found.logits, expected)


def test_a_prompt_into_a_static_cache_is_one_graph():
    model = tiny_model()
    batch = layout_batch(model, ["wIwwwww"], seed=2)
    length = batch["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 5)
    with torch.no_grad():
        found = compiled(model)(**batch, past_key_values=cache, use_cache=True, cache_position=torch.arange(length))
        torch.testing.assert_close(found.logits, model(**batch).logits)


def test_generating_with_a_static_cache_compiles_without_a_break():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    batch = layout_batch(model, ["wIww"], seed=3)
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    found = model.generate(**batch, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


def test_a_forward_pass_with_an_image_can_be_exported():
    model = tiny_model()
    batch = layout_batch(model, ["wIwwI", "Iww"], seed=1)
    program = torch.export.export(model, args=(), kwargs={**batch, "use_cache": False}, strict=True)
    with torch.no_grad():
        found = program.module()(**batch, use_cache=False)
        torch.testing.assert_close(found.logits, model(**batch, use_cache=False).logits)
