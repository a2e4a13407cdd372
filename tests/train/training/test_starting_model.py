"""What a recipe's `model` part makes of two backbones: a model and a processor of the same size, layer and tokens."""

import pytest
import torch
from encoders import ENCODERS, encoder, save_decoder
from PIL import Image
from torch import nn

from prefixvlm import PrefixVLMConfig
from prefixvlm.modeling_vlm.vision_tower_prefix_vlm import PrefixVLMVisionTower
from prefixvlm.train.data.feature_cache import weights_key
from prefixvlm.train.recipes.schema import LoraRecipe, ModelRecipe
from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES
from prefixvlm.train.training import lora
from prefixvlm.train.training.cost import training_flops
from prefixvlm.train.training.starting_model import PAPER_PAIR, build, paper_config


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    root = tmp_path_factory.mktemp("halves")
    for place, name in enumerate(ENCODERS):
        encoder(name).save_pretrained(root / str(place))
    save_decoder(root / "decoder")
    folders = {name: str(root / str(place)) for place, name in enumerate(ENCODERS)}
    return folders, str(root / "decoder")


def built(halves, name="DINOv2", random_init=False, **settings):
    recipe = ModelRecipe(vision=halves[0][name], text=halves[1], **settings)
    return build(recipe, [], random_init)


@pytest.mark.parametrize("random_init", [False, True], ids=["pretrained", "random"])
@torch.no_grad()
def test_size_layer_and_tokens_of_a_recipe(random_init, halves):
    config = {"pixel_shuffle": 2, "vision_feature_layer": -2}
    model, processor = built(halves, random_init=random_init, image_size=48, config=config)
    assert model.config.vision_config.image_size == 48
    assert model.config.num_vision_layers == 2
    assert model.config.num_image_tokens == processor.num_image_tokens == 9
    inputs = processor(images=Image.new("RGB", (20, 10)), text="What?", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_recipe_keeps_a_crop_if_it_says_so(halves):
    with pytest.raises(ValueError, match="no preprocessor of its own"):
        built(halves, center_crop=True)


def test_the_papers_pair_in_another_size():
    vision, text = PAPER_PAIR
    recipe = ModelRecipe(vision=vision, text=text, image_size=112, config={"mean_pooling": 2})
    assert paper_config(recipe).num_image_tokens == 16
    assert paper_config(ModelRecipe(vision=vision, text=text)).vision_config.image_size == 224
    assert PrefixVLMConfig.from_preset("paper").vision_config.image_size == 224


@pytest.mark.parametrize("name", ENCODERS)
def test_adapters_are_on_every_layer_of_every_encoder(name, halves):
    pytest.importorskip("peft")
    model, _ = built(halves, name)
    linear = sum(isinstance(module, nn.Linear) for module in model.vision_tower.modules())
    adapted = lora.add_adapters(model, LoraRecipe(r=2, modules=["vision_tower"]), PAPER_STAGES[3])
    names = [key for key, _ in adapted.named_parameters() if "lora_A" in key]
    assert len(names) == linear == 3 * 6
    assert all("vision_tower" in key for key in names)


@pytest.mark.parametrize("name", ENCODERS)
def test_flops_are_of_the_layers_that_exist(name, halves):
    def flops(layer: int) -> float:
        model, _ = built(halves, name, config={"vision_feature_layer": layer})
        trains = {"vision_tower": False, "projector": True, "language_model": False}
        return training_flops(model, trains, images=1, tokens=20, squared_lengths=400, supervised=7)

    mlp = 4 * 32 if "DINO" in name else 48  # whose configuration has a ratio instead
    layer = 2 * 16 * (4 * 32**2 + 2 * 32 * mlp) + 4 * 16**2 * 32  # 16 patches
    assert flops(2) - flops(1) == layer
    assert flops(-1) - flops(1) == 2 * layer
    # no table of positions is a product, but a patch of 8 x 8 pixels in three colours is
    model, _ = built(halves, name, config={"vision_feature_layer": 0})
    without = training_flops(model, dict.fromkeys(MODULES, False) | {"projector": True}, 1, 20, 400, 7, encoded_images=0)
    assert flops(0) - without == 2 * 16 * 3 * 8 * 8 * 32


def test_features_of_another_layer_are_not_taken_for_cached_ones(halves):
    keys = {
        weights_key(built(halves, config={"vision_feature_layer": layer})[0].vision_tower, torch.float32)
        for layer in (-1, -2, 1, 0)
    }
    assert len(keys) == 4


def test_the_card_says_which_layers_there_are(halves, tmp_path):
    built(halves, config={"vision_feature_layer": 1})[0].save_pretrained(tmp_path)
    assert "1 of 3 layers, 32 wide" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_tower_is_wrapped_once(halves):
    for name in ENCODERS:
        tower = built(halves, name)[0].vision_tower
        inner = tower.vision_model
        assert not isinstance(inner, PrefixVLMVisionTower)
        assert not hasattr(inner, "vision_model")
