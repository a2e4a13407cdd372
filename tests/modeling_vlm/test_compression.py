"""Neighbouring patches in one image token: which ones, in which order, and that everything counts the tokens that result.

Shapes: G patches along a side of an image, s patches along a side of a group.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import layout_batch, random_batch, row_alone, tiny_config, tiny_model, tiny_processor

from prefixvlm import EncodedImages, PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.inference.asking import generate_texts, prompt_inputs, user_messages
from prefixvlm.modeling_vlm.vision_tower_prefix_vlm import PatchGroups
from prefixvlm.train.training.cost import training_flops

SIZES = {"image_size": 32, "patch_size": 8}  # G = 4
WAYS = [{"pixel_shuffle": 2}, {"pixel_shuffle": 4}, {"mean_pooling": 2}]

ways = pytest.mark.parametrize("way", WAYS, ids=str)


def coordinates(grid: int) -> torch.Tensor:
    """(1, G * G, 2): each patch's feature is its row and column."""
    return torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()[None]


@given(side=st.integers(2, 4), rows=st.integers(1, 5))
def test_groups_and_the_patches_inside_them_are_in_raster_order(side, rows):
    features = coordinates(side * rows)
    shuffled = PatchGroups(side, 1)(features).unflatten(2, (side, side, 2))
    assert shuffled.shape == (1, rows**2, side, side, 2)
    for token in range(rows**2):
        for down in range(side):
            for right in range(side):
                patch = [token // rows * side + down, token % rows * side + right]
                assert shuffled[0, token, down, right].tolist() == patch
    torch.testing.assert_close(PatchGroups(1, side)(features), shuffled.mean(dim=(2, 3)))


@ways
@torch.no_grad()
def test_a_patch_changes_one_token_and_no_other(way):
    model = tiny_model(**SIZES, **way)
    features = torch.randn(1, 16, 32)
    before, touched = model.projector(features), []
    for patch in range(16):
        changed = features.clone()
        changed[0, patch] += 1
        differs = (model.projector(changed) - before).abs().sum(dim=-1)[0] > 1e-6
        assert differs.sum() == 1
        touched.append(int(differs.nonzero()))
    side = max(way.values())
    assert touched == [row // side * (4 // side) + column // side for row in range(4) for column in range(4)]


@ways
def test_tokens_of_the_paper(way):
    config = PrefixVLMConfig.from_preset("paper", **way)
    assert config.num_image_tokens == {2: 64, 4: 16}[max(way.values())]
    assert PrefixVLMConfig.from_preset("paper").num_image_tokens == 256


@pytest.mark.parametrize("name", ["pixel_shuffle", "mean_pooling"])
@pytest.mark.parametrize("group", [3, 0, -2, 8, 2.0])
def test_groups_that_do_not_divide_the_grid_are_refused(name, group):
    with pytest.raises(ValueError, match=f"{name} is {group}, which does not divide a grid of 4 x 4 patches"):
        tiny_config(**SIZES, **{name: group})


def test_a_norm_that_is_neither_there_nor_not_is_refused():
    with pytest.raises(ValueError, match="projector_norm is 'layer'; choose true or false"):
        tiny_config(projector_norm="layer")


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match="pixel_shuffle is 2 and mean_pooling 2; leave one of them at 1"):
        tiny_config(**SIZES, pixel_shuffle=2, mean_pooling=2)


@ways
@torch.no_grad()
def test_an_image_is_open_to_itself_and_closed_to_the_text(way):
    model = tiny_model(**SIZES, **way).double()
    tokens = model.config.num_image_tokens
    batch = random_batch(model, [3])
    batch["pixel_values"] = batch["pixel_values"].double()
    before = model(**batch).logits[0]
    features = model.get_vision_features(batch.pop("pixel_values"))
    features[0, -1] += 1  # a patch of the last token
    after = model(**batch, vision_features=features).logits[0]
    assert ((after - before).abs().amax(dim=-1) > 1e-6).all()
    batch["input_ids"][0, -1] += 1
    typed = model(**batch, vision_features=features).logits[0]
    torch.testing.assert_close(typed[: tokens + 2], after[: tokens + 2], rtol=0, atol=1e-12)


@ways
def test_cached_answers_and_padded_rows_are_the_plain_ones(way):
    model = tiny_model(**SIZES, **way)
    batch = layout_batch(model, ["wIIww", "Iwwwww"], seed=2, padding_side="left")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(model.generate(**batch, **settings), plain)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static", disable_compile=True), plain)
    alone = model.generate(**row_alone(batch, 0, model), **settings)
    assert torch.equal(alone[0, -6:], plain[0, -6:])


@ways
@torch.no_grad()
def test_packed_samples_are_as_if_alone(way):
    model = tiny_model(**SIZES, **way).double()
    samples = [layout_batch(model, [row], seed) for seed, row in enumerate(["Iwww", "ww", "wIIw"])]
    for sample in samples:
        sample["pixel_values"] = sample["pixel_values"].double()
    joined = {name: torch.cat([sample[name] for sample in samples], dim=1) for name in ("input_ids", "attention_mask")}
    joined["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    joined["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
    together = model(**joined).logits
    alone = torch.cat([model(**{k: v for k, v in s.items() if len(v)}).logits for s in samples], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def processor_of(model) -> PrefixVLMProcessor:
    plain = tiny_processor(**SIZES)
    return PrefixVLMProcessor(plain.image_processor, plain.tokenizer, num_image_tokens=model.config.num_image_tokens)


@ways
def test_images_encoded_once_give_the_answers_of_separate_prompts(way):
    model = tiny_model(**SIZES, **way).double()
    processor, picture = processor_of(model), torch.arange(3 * 9 * 9).view(3, 9, 9) % 256
    inputs = prompt_inputs(processor, [user_messages([picture], "red?")])
    expected = generate_texts(model, processor, inputs, max_new_tokens=5)[0]
    assert EncodedImages(model, processor, picture).ask("red?", 5) == expected


@ways
def test_saved_and_loaded(way, tmp_path):
    model = tiny_model(**SIZES, **way)
    model.save_pretrained(tmp_path)
    again = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.num_image_tokens == model.config.num_image_tokens
    batch = random_batch(model, [4])
    with torch.no_grad():
        # a product of one row is rounded by where its weights lie in memory
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


@ways
def test_flops_are_of_the_tokens_that_are_left(way):
    plain, model = tiny_model(**SIZES), tiny_model(**SIZES, **way)
    trains = {"vision_tower": False, "projector": True, "language_model": False}
    call = {"trains": trains, "images": 1, "tokens": 20, "squared_lengths": 400, "supervised": 7}
    difference = training_flops(model, **call) - training_flops(plain, **call)
    first, tokens = 32 * 48, model.config.num_image_tokens  # the projector's layers, 6 a weight and token
    expected = tokens * (first * way.get("pixel_shuffle", 1) ** 2 + 48 * 48) - 16 * (first + 48 * 48)
    assert difference == 6 * expected


@torch.no_grad()
def test_vision_features_are_the_encoders_whatever_follows():
    plain, model = tiny_model(**SIZES), tiny_model(**SIZES, pixel_shuffle=2)
    pixels = torch.randn(1, 3, 32, 32)
    model.vision_tower.load_state_dict(plain.vision_tower.state_dict())
    assert torch.equal(model.get_vision_features(pixels), plain.get_vision_features(pixels))
