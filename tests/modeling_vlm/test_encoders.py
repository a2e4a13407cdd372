"""Vision encoders of many kinds: which of their hidden states are read, at which size, and what is kept of them.

Shapes: G patches along a side of an image.
"""

import json

import pytest
import torch
from encoders import ENCODERS, LAYERS, PATCH, SIZE, encoder, image_tower, save_decoder
from safetensors import safe_open
from transformers import AutoModel, IJepaConfig

from prefixvlm import PrefixVLMForConditionalGeneration

GRID = SIZE // PATCH

every_encoder = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Gives the folder of an encoder by name, or of the decoder."""
    root, made = tmp_path_factory.mktemp("halves"), {}

    def get(name):
        if name not in made:
            made[name] = root / f"{len(made)}"
            save_decoder(made[name]) if name == "decoder" else encoder(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def join(folders):
    def get(name, **kwargs):
        return PrefixVLMForConditionalGeneration.from_backbones(folders(name), folders("decoder"), **kwargs)

    return get


def states(model, pixels, **kwargs):
    with torch.no_grad():
        return image_tower(model)(pixel_values=pixels, **kwargs)


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    again, report = PrefixVLMForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.to("cpu").eval()  # which raises if a tensor was left on the meta device


@every_encoder
@torch.no_grad()
def test_class_and_register_tokens_are_never_counted(name, join, tmp_path):
    model, pixels = join(name), torch.randn(2, 3, SIZE, SIZE)
    features = model.get_vision_features(pixels)
    expected = states(encoder(name), pixels).last_hidden_state
    assert model.config.num_image_tokens == GRID**2
    torch.testing.assert_close(features, expected[:, -(GRID**2) :], rtol=0, atol=1e-6)
    assert torch.equal(saved_and_loaded(model, tmp_path).get_vision_features(pixels), features)


@every_encoder
@pytest.mark.parametrize("size", [PATCH * 2, PATCH * 7], ids=["smaller", "larger"])
@torch.no_grad()
def test_another_image_size_gives_the_features_of_interpolated_positions(name, size, join, tmp_path):
    model, source, pixels = join(name, image_size=size), encoder(name), torch.randn(2, 3, size, size)
    # DINOv2 always interpolates
    asked = {} if "DINO" in name else {"interpolate_pos_encoding": True}
    expected = states(source, pixels, **asked).last_hidden_state[:, -((size // PATCH) ** 2) :]
    torch.testing.assert_close(model.get_vision_features(pixels), expected, rtol=0, atol=1e-5)
    again = saved_and_loaded(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["image_size"] == size
    assert torch.equal(again.get_vision_features(pixels), model.get_vision_features(pixels))


def test_a_size_that_patches_do_not_fill_is_refused(join):
    with pytest.raises(ValueError, match="image_size is 36, which patches of 8 pixels do not fill; choose 32 or 40"):
        join("DINOv2", image_size=36)


def test_a_tensor_that_depends_on_the_size_and_is_no_table_of_positions_is_refused(folders, monkeypatch, tmp_path):
    embeddings = type(encoder("ViT").embeddings)
    original = embeddings.__init__

    def with_a_window(self, config, *args, **kwargs):
        original(self, config, *args, **kwargs)
        self.window = torch.nn.Parameter(torch.zeros(config.image_size, config.image_size))

    monkeypatch.setattr(embeddings, "__init__", with_a_window)
    encoder("ViT").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no table of positions; leave out image_size"):
        PrefixVLMForConditionalGeneration.from_backbones(tmp_path, folders("decoder"), image_size=16)


@every_encoder
@pytest.mark.parametrize("index", [*range(LAYERS), -2])
@torch.no_grad()
def test_an_earlier_layer_is_read_before_any_norm(name, index, join, tmp_path):
    model, source, pixels = join(name, vision_feature_layer=index), encoder(name), torch.randn(2, 3, SIZE, SIZE)
    seen = []
    layers = next(module for module in image_tower(source).modules() if isinstance(module, torch.nn.ModuleList))
    # LLaVA's hidden_states[index] is what the layer of this index is given
    layers[index + (index < 0)].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    states(source, pixels)
    torch.testing.assert_close(model.get_vision_features(pixels), seen[0][:, -(GRID**2) :], rtol=0, atol=1e-5)
    again = saved_and_loaded(model, tmp_path)
    assert torch.equal(again.get_vision_features(pixels), model.get_vision_features(pixels))


@torch.no_grad()
def test_before_a_normed_projector_scale_and_mean_of_features_do_not_matter(join, tmp_path):
    model, features = join("DINOv2", projector_norm=True, pixel_shuffle=2), torch.randn(1, GRID**2, 32)
    again = saved_and_loaded(model, tmp_path)
    torch.testing.assert_close(again.projector(100 * features + 3), model.projector(features), rtol=1e-4, atol=1e-4)
    # and the first layer reads what is normed over all that is in a token, as InternVL's does
    (read,) = [module for module in model.projector.children() if isinstance(module, torch.nn.LayerNorm)]
    assert read.normalized_shape == (4 * 32,)
    assert not any("norm" in name for name in join("DINOv2").projector.state_dict())


@every_encoder
@torch.no_grad()
def test_the_last_layer_can_be_counted_from_either_end(name, join):
    pixels = torch.randn(1, 3, SIZE, SIZE)
    last, same = join(name), join(name, vision_feature_layer=LAYERS)
    assert torch.equal(same.get_vision_features(pixels), last.get_vision_features(pixels))


@every_encoder
def test_layers_above_the_one_that_is_read_are_neither_built_nor_saved(name, join, tmp_path):
    model = join(name, vision_feature_layer=1)
    assert model.config.num_vision_layers == 1
    assert model.config.vision_config.num_hidden_layers == LAYERS  # which the index counts in
    stacks = [module for module in model.vision_tower.modules() if isinstance(module, torch.nn.ModuleList)]
    assert [len(stack) for stack in stacks] == [1]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = [key for key in file.keys() if key.startswith("vision_tower.")]  # noqa: SIM118
    assert any(".0." in key for key in saved)
    assert not any(".1." in key or key.split(".")[-2] in ("post_layernorm", "layernorm") for key in saved)


@pytest.mark.parametrize("index", [LAYERS + 1, -LAYERS - 2])
def test_a_layer_that_does_not_exist_is_refused(index, join):
    with pytest.raises(ValueError, match=f"vision_feature_layer is {index}, but the encoder has 3 layers; choose -4 to 3"):
        join("DINOv2", vision_feature_layer=index)


def test_an_earlier_layer_of_an_unknown_encoder_is_refused(folders, tmp_path):
    config = IJepaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    join = PrefixVLMForConditionalGeneration.from_backbones
    assert join(tmp_path, folders("decoder")).config.num_image_tokens == 4
    with pytest.raises(ValueError, match="of a ijepa encoder only the last layer can be read"):
        join(tmp_path, folders("decoder"), vision_feature_layer=-2)


def test_the_layer_can_be_named_in_a_call_but_not_changed(join):
    model, pixels = join("SigLIP, SigLIP 2", vision_feature_layer=-2), torch.randn(1, 3, SIZE, SIZE)
    model.get_image_features(pixels, vision_feature_layer=-2)
    for other in (-1, 0):
        with pytest.raises(ValueError, match="vision_feature_layer is -2 in this model"):
            model.get_image_features(pixels, vision_feature_layer=other)


@every_encoder
def test_every_weight_that_is_kept_gets_a_gradient(name, join):
    """What gets none would stop DDP: poolers, mask tokens, norms of class tokens."""
    model = join(name).train()
    model.get_vision_features(torch.randn(1, 3, SIZE, SIZE)).square().sum().backward()
    assert [key for key, weight in model.vision_tower.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", ["ViT", "DeiT"])
@torch.no_grad()
def test_a_checkpoint_without_a_pooler_is_enough(name, folders, tmp_path):
    source = encoder(name)
    left = {key: value for key, value in source.state_dict().items() if "pooler" not in key}
    source.save_pretrained(tmp_path, state_dict=left)
    model = PrefixVLMForConditionalGeneration.from_backbones(tmp_path, folders("decoder"))
    pixels = torch.randn(1, 3, SIZE, SIZE)
    expected = states(source, pixels).last_hidden_state[:, -(GRID**2) :]
    torch.testing.assert_close(model.get_vision_features(pixels), expected, rtol=0, atol=1e-6)
