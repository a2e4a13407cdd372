"""Pictures and their places that do not match, and prompts that cannot be read right, are errors and never guesses."""

import pytest
import torch
from PIL import Image
from tiny import FIRST_WORD, layout_batch, tiny_config, tiny_model, tiny_processor
from transformers import DynamicCache, StaticCache, pipeline

from prefixvlm import PrefixVLMForConditionalGeneration

MODEL = tiny_model()
MODEL.generation_config.eos_token_id = None
STATIC = {"cache_implementation": "static", "disable_compile": True}


def mismatched(layout: str, images: int) -> dict:
    """A row and more or fewer images than it has places for."""
    batch = layout_batch(MODEL, [layout])
    size = MODEL.config.vision_config.image_size
    return {**batch, "pixel_values": torch.randn(images, 3, size, size) if images else None}


CASES = [("Iww", 0), ("IIww", 1), ("Iww", 2), ("www", 1)]


@pytest.mark.parametrize(("layout", "images"), CASES)
@pytest.mark.parametrize("use", ["forward", "training", "generate", "beams", "static"])
def test_every_mismatch_is_refused(use, layout, images):
    batch = mismatched(layout, images)
    call = {
        "forward": lambda: MODEL(**batch),
        "training": lambda: MODEL(**batch, labels=batch["input_ids"], skip_logits=True),
        "generate": lambda: MODEL.generate(**batch, max_new_tokens=2),
        "beams": lambda: MODEL.generate(**batch, max_new_tokens=2, num_beams=2),
        "static": lambda: MODEL.generate(**batch, max_new_tokens=2, **STATIC),
    }[use]
    with pytest.raises(ValueError, match=rf"{4 * layout.count('I')} image tokens, but {images} image"):
        call()


@pytest.mark.parametrize("use", ["forward", "training", "generate"])
def test_an_image_whose_tokens_are_in_two_rows_is_refused(use):
    """As where rows are cut at a length: the numbers of tokens and images still agree."""
    batch = layout_batch(MODEL, ["IIww", "Iwwww"])
    is_image = batch["input_ids"] == MODEL.config.image_token_id
    batch["input_ids"][0, 7], batch["input_ids"][1, 4] = FIRST_WORD, MODEL.config.image_token_id
    assert (batch["input_ids"] == MODEL.config.image_token_id).sum() == is_image.sum()
    call = {
        "forward": lambda: MODEL(**batch),
        "training": lambda: MODEL(**batch, labels=batch["input_ids"], skip_logits=True),
        "generate": lambda: MODEL.generate(**batch, max_new_tokens=2),
    }[use]
    with pytest.raises(ValueError, match="row has 7 image tokens, but an image makes 4; keep"):
        call()


def test_an_image_whose_tokens_are_in_two_passes_is_refused():
    batch = layout_batch(MODEL, ["wIww"])
    is_image = batch["input_ids"] == MODEL.config.image_token_id
    with torch.no_grad():
        embeds = MODEL.get_input_embeddings()(batch["input_ids"])
        features = MODEL.projector(MODEL.get_vision_features(batch["pixel_values"]))
    embeds = embeds.masked_scatter(is_image[..., None], features)
    with pytest.raises(ValueError, match="row has 2 image tokens, but an image makes 4; keep"):
        MODEL(inputs_embeds=embeds[:, :3], token_type_ids=is_image[:, :3].long(), use_cache=True)


def test_placeholders_in_embeddings_are_refused_without_images():
    batch = layout_batch(MODEL, ["Iww"])
    embeds = MODEL.get_input_embeddings()(batch["input_ids"]).detach()
    with pytest.raises(ValueError, match="4 image tokens, but 0 image"):
        MODEL(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="4 image tokens, but 0 image"):
        MODEL.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_embeddings_that_hold_the_features_need_no_images():
    batch = layout_batch(MODEL, ["Iww"])
    with torch.no_grad():
        embeds = MODEL.get_input_embeddings()(batch["input_ids"])
        is_image = batch["input_ids"] == MODEL.config.image_token_id
        features = MODEL.projector(MODEL.get_vision_features(batch["pixel_values"]))
        embeds = embeds.masked_scatter(is_image[..., None], features)
        found = MODEL(inputs_embeds=embeds, token_type_ids=is_image.long()).logits
        assert torch.equal(found, MODEL(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits)


@pytest.mark.parametrize("given", ["all", "new"])
def test_a_cached_turn_takes_all_images_or_the_new_ones(given):
    batch = layout_batch(MODEL, ["IwwwIww"], seed=5)
    first = batch["input_ids"][:, :7]  # an image and its words
    cache = DynamicCache()
    with torch.no_grad():
        MODEL(first, pixel_values=batch["pixel_values"][:1], past_key_values=cache, use_cache=True)
    images = batch["pixel_values"] if given == "all" else batch["pixel_values"][1:]
    expected = MODEL.generate(**batch, max_new_tokens=4)
    assert torch.equal(
        MODEL.generate(**{**batch, "pixel_values": images}, past_key_values=cache, max_new_tokens=4), expected
    )


@pytest.mark.parametrize("cache_kind", [{}, STATIC])
def test_a_new_image_after_a_cached_turn_is_refused_where_earlier_tokens_would_see_it(cache_kind):
    model = tiny_model("prefix_all_images")
    batch = layout_batch(model, ["IwwwIww"], seed=5)
    cache = DynamicCache()
    with torch.no_grad():
        model(batch["input_ids"][:, :7], pixel_values=batch["pixel_values"][:1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="without a cache"):
        model(batch["input_ids"][:, 7:], pixel_values=batch["pixel_values"][1:], past_key_values=cache, use_cache=True)
    if not cache_kind:
        with pytest.raises(ValueError, match="without a cache"):
            model.generate(**batch, past_key_values=cache, max_new_tokens=2)
    model.generate(**batch, max_new_tokens=2, **cache_kind)  # all at once is right


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_refused_image_leaves_the_cache_as_it_was(cache_class):
    model = tiny_model("prefix_all_images")
    batch = layout_batch(model, ["IwwwIww"], seed=5)
    size = {"config": model.config.text_config, "max_cache_len": 20}
    cache = cache_class(**size) if cache_class is StaticCache else cache_class()
    first, words = batch["input_ids"][:, :7], batch["input_ids"][:, 11:]
    with torch.no_grad():
        model(first, pixel_values=batch["pixel_values"][:1], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="without a cache"):
            model(batch["input_ids"][:, 7:], pixel_values=batch["pixel_values"][1:], past_key_values=cache)
        found = model(words, past_key_values=cache).logits  # the conversation goes on without the image
        whole = model(torch.cat([first, words], dim=1), pixel_values=batch["pixel_values"][:1], use_cache=False).logits
    torch.testing.assert_close(found, whole[:, 7:], rtol=1e-4, atol=1e-4)


# an image of one token could be taken for a generated token
ONE_TOKEN_AN_IMAGE = {"pixel_shuffle": 2}


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, STATIC])
def test_a_prompt_of_one_image_token_is_answered_with_its_image(settings):
    model = tiny_model(**ONE_TOKEN_AN_IMAGE)
    model.generation_config.eos_token_id = None
    said = []
    for seed in (1, 2):
        batch = layout_batch(model, ["I"], seed=seed)
        assert batch["input_ids"].shape == (1, 1)
        said.append(model.generate(**batch, max_new_tokens=4, do_sample=False, **settings).tolist()[0][1:])
        with torch.no_grad():
            assert model(**batch).logits[0, -1].argmax() == said[-1][0]
    assert said[0] != said[1]


def test_one_image_token_without_an_image_is_refused():
    model = tiny_model(**ONE_TOKEN_AN_IMAGE)
    batch = layout_batch(model, ["I"])
    with pytest.raises(ValueError, match="1 image tokens, but 0 image"):
        model(batch["input_ids"])


def test_a_new_image_of_one_token_after_a_cached_turn_is_refused_too():
    model = tiny_model("prefix_all_images", **ONE_TOKEN_AN_IMAGE)
    batch = layout_batch(model, ["IwwI"])
    cache = DynamicCache()
    with torch.no_grad():
        model(batch["input_ids"][:, :3], pixel_values=batch["pixel_values"][:1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="without a cache"):
        model(batch["input_ids"][:, 3:], pixel_values=batch["pixel_values"][1:], past_key_values=cache)


def test_a_prompt_beyond_the_context_gives_both_numbers():
    config = tiny_config()
    config.text_config.max_position_embeddings = 12
    model = PrefixVLMForConditionalGeneration(config).eval()
    batch = layout_batch(model, ["I" + 9 * "w", "Iw"], padding_side="left")
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"13 tokens.*at most 12"):
            call()
    padded = layout_batch(model, ["I" + 8 * "w", "Iw"], padding_side="left")
    model(**padded)
    # neither padding nor packed samples count together
    longer = {name: torch.nn.functional.pad(padded[name], (9, 0)) for name in ("input_ids", "attention_mask")}
    model(**longer, pixel_values=padded["pixel_values"])
    ids = torch.cat([layout_batch(model, ["I" + 8 * "w"])["input_ids"]] * 2, dim=1)
    documents = torch.arange(24)[None] // 12
    model(ids, pixel_values=padded["pixel_values"], document_ids=documents)


def test_images_of_another_size_are_named():
    batch = layout_batch(MODEL, ["Iww"])
    for wrong in (torch.randn(1, 3, 20, 20), torch.randn(1, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"the encoder reads 3 x 16 x 16"):
            MODEL(**{**batch, "pixel_values": wrong})


def test_a_pipeline_refuses_a_place_without_a_picture():
    ask = pipeline("image-text-to-text", model=MODEL, processor=tiny_processor())
    picture = Image.new("RGB", (20, 20), (200, 30, 60))
    assert ask(images=picture, text="<|image_pad|>what?", max_new_tokens=2)
    with pytest.raises(ValueError, match="image"):
        ask(images=[picture, picture], text="<|image_pad|>what?", max_new_tokens=2)
