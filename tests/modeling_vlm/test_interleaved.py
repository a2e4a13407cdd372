"""Images anywhere between texts: rows keep their gradients beside others, and parts of a prompt make the whole.

In float64, but for the angles of the rotary positions and the decoder's norms, which transformers computes in float32.

Shapes: B batch, T tokens.
"""

import pytest
import torch
from tiny import FIRST_WORD, image_numbers, layout_batch, row_alone, tiny_model
from transformers import DynamicCache, StaticCache

from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES

ROWS = ["wIwwIwIww", "www", "IIwIwI", "Iw"]  # three images between texts, none, four from the first token on, one
CACHE_MODES = ("causal", "prefix", "prefix_all_images")
MODELS = {mode: tiny_model(mode).double() for mode in ATTENTION_MODES}

all_modes = pytest.mark.parametrize("mode", ATTENTION_MODES)
cache_modes = pytest.mark.parametrize("mode", CACHE_MODES)
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str = ""):
    tolerance = 2e-6 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda message: f"{name}: {message}")


def new_cache(model, kind: str):
    return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=40)


def packed(rows: list[dict]) -> dict:
    """Rows without padding as one."""
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows], dim=1),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows if row["pixel_values"] is not None]),
        "document_ids": torch.arange(len(rows)).repeat_interleave(lengths)[None],
    }


def gradients(model, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Of the summed loss of all words."""
    model.zero_grad()
    for batch in batches:
        words = batch["input_ids"].where(batch["input_ids"] >= FIRST_WORD, -100)
        model(**batch, labels=words, num_items_in_batch=1, skip_logits=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@all_modes
@pytest.mark.parametrize("together", ["right", "left", "packed"])
def test_rows_together_have_the_gradients_of_rows_alone(mode, together):
    model = MODELS[mode]
    batch = layout_batch(model, ROWS, seed=1, padding_side="left" if together == "left" else "right")
    rows = [row_alone(batch, row, model) for row in range(len(ROWS))]
    expected = gradients(model, rows)
    found = gradients(model, [packed(rows) if together == "packed" else batch])
    for name, gradient in expected.items():
        assert_equal(found[name], gradient, name)
    assert found["vision_tower.vision_model.embeddings.patch_embedding.weight"].abs().max() > 1e-3


@cache_modes
@both_caches
@torch.no_grad()
def test_each_token_after_a_cached_prompt_has_the_logits_of_the_whole(mode, cache):
    model = MODELS[mode]
    batch = layout_batch(model, ROWS, seed=2, padding_side="left")
    written = torch.randint(FIRST_WORD, 264, (len(ROWS), 4), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([batch["input_ids"], written], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(written)], dim=1)
    pixel_values, length = batch["pixel_values"], batch["input_ids"].shape[1]
    past = new_cache(model, cache)
    found = model(**batch, past_key_values=past, use_cache=True).logits[:, -1]
    for end in range(length, ids.shape[1] + 1):
        whole = {"input_ids": ids[:, :end], "attention_mask": mask[:, :end], "pixel_values": pixel_values}
        assert_equal(found, model(**whole, use_cache=False).logits[:, -1], "uncached")
        assert_equal(found, model(**whole, past_key_values=new_cache(model, cache)).logits[:, -1], "rebuilt")
        if end < ids.shape[1]:
            step = {"input_ids": ids[:, end : end + 1], "attention_mask": mask[:, : end + 1]}
            if cache == "static":  # as `generate` passes it
                step["cache_position"] = torch.tensor([end])
            found = model(**step, past_key_values=past, use_cache=True).logits[:, -1]


@cache_modes
@both_caches
@pytest.mark.parametrize("layout", ["wIwwIwIww", "IIwIw"])
@torch.no_grad()
def test_a_prompt_in_two_parts_is_the_whole_or_refused(mode, cache, layout):
    """Cut at each place: inside an image never, and where earlier tokens see all images only after the last one."""
    model = MODELS[mode]
    batch = layout_batch(model, [layout, layout], seed=3)
    ids, (first, second) = batch["input_ids"], batch["pixel_values"].chunk(2)
    whole = model(**batch, use_cache=False).logits
    images = image_numbers(layout, model.config.num_image_tokens)
    refused = 0
    for cut in range(1, len(images)):
        past, before = new_cache(model, cache), max(images[:cut])

        def in_parts(cut=cut, past=past, before=before) -> torch.Tensor:
            seen, new = (torch.cat([first[part], second[part]]) for part in (slice(before), slice(before, None)))
            head = model(ids[:, :cut], pixel_values=seen if len(seen) else None, past_key_values=past, use_cache=True)
            tail = model(ids[:, cut:], pixel_values=new if len(new) else None, past_key_values=past, use_cache=True)
            return torch.cat([head.logits, tail.logits], dim=1)

        if images[cut] and images[cut] == images[cut - 1]:
            with pytest.raises(ValueError, match="image tokens, but"):
                in_parts()
        elif mode == "prefix_all_images" and any(images[cut:]):
            refused += 1
            with pytest.raises(ValueError, match="without a cache"):
                in_parts()
        else:
            assert_equal(in_parts(), whole, f"cut before token {cut}")
    assert bool(refused) == (mode == "prefix_all_images")


@pytest.mark.parametrize("mode", ["causal", "prefix"])
@both_caches
@torch.no_grad()
def test_a_later_turn_may_bring_images_to_some_rows(mode, cache):
    model = MODELS[mode]
    turns = [layout_batch(model, rows, seed, "left") for seed, rows in enumerate((["wwIw", "ww"], ["wIwIww", "www"]))]
    mask = torch.cat([turn["attention_mask"] for turn in turns], dim=1)
    past = new_cache(model, cache)
    model(**turns[0], past_key_values=past, use_cache=True)
    found = model(**{**turns[1], "attention_mask": mask}, past_key_values=past, use_cache=True).logits
    for row in range(2):
        alone = [row_alone(turn, row, model) for turn in turns]
        pictures = [turn["pixel_values"] for turn in alone if turn["pixel_values"] is not None]
        whole = model(
            torch.cat([turn["input_ids"] for turn in alone], dim=1),
            pixel_values=torch.cat(pictures) if pictures else None,
            use_cache=False,
        ).logits[0]
        real = found[row, turns[1]["attention_mask"][row].bool()]
        assert_equal(real, whole[-len(real) :])


@cache_modes
@pytest.mark.parametrize("layout", ["wIwIwww", "wwwwwww"])
def test_chunked_prefill_gives_the_whole_answer_or_is_refused(mode, layout):
    """transformers cuts a prompt anywhere; 5 refuses to cut one with images at all."""
    model = MODELS[mode]
    batch = layout_batch(model, [layout], seed=4)
    if "I" not in layout:
        del batch["pixel_values"]
    settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(**batch, **settings).logits)
    refused, length = 0, batch["input_ids"].shape[1]
    for size in range(2, length + 1):
        try:
            found = model.generate(**batch, **settings, prefill_chunk_size=size)
        except ValueError:
            refused += 1
        else:
            assert_equal(torch.stack(found.logits), expected, f"chunks of {size}")
    assert refused < length - 1
    assert bool(refused) == ("I" in layout)
