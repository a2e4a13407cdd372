"""Convolutional and hybrid encoders of timm, whose features are a map. Needs timm: pip install 'prefixvlm[timm]'

Shapes: S side of a picture, G features along a side of the map.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from encoders import save_decoder
from PIL import Image
from transformers import TimmWrapperConfig, TimmWrapperModel

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.train.training.cost import training_flops

try:
    import timm
except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit torch
    pytest.skip(f"timm is not installed ({error}); pip install 'prefixvlm[timm]'", allow_module_level=True)

MAPS = {"resnet10t": (512, 32), "mobilenetv4_conv_small_050": (480, 32), "coatnet_pico_rw_224": (512, 32)}
CFG = {"input_size": [3, 64, 64], "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.4] * 3, "std": [0.2] * 3}
PICTURE = Image.effect_noise((90, 60), 90).convert("RGB")

every_map = pytest.mark.parametrize("architecture", MAPS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    save_decoder(folder)
    return folder


def saved(architecture, folder, **cfg):
    """A timm model in the form of the Hub, its running statistics not those of a new one."""
    torch.manual_seed(0)
    arguments = {"img_size": 64} if "coatnet" in architecture else {}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, pretrained_cfg={**CFG, **cfg})
    model = TimmWrapperModel(config).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64), do_pooling=False)
    model.eval().save_pretrained(folder)
    return model


@every_map
@torch.no_grad()
def test_features_are_the_map_in_raster_order(architecture, decoder, tmp_path):
    width, stride = MAPS[architecture]
    source = saved(architecture, tmp_path / "vision")
    model = PrefixVLMForConditionalGeneration.from_backbones(tmp_path / "vision", decoder)
    vision = model.config.vision_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (64, stride, width)
    assert model.config.num_image_tokens == (64 // stride) ** 2
    pixels = torch.randn(2, 3, 64, 64)
    features, expected = model.get_vision_features(pixels), source(pixels, do_pooling=False).last_hidden_state
    for row in range(64 // stride):
        for column in range(64 // stride):
            position = row * (64 // stride) + column
            torch.testing.assert_close(features[:, position], expected[:, :, row, column], rtol=0, atol=1e-5)

    processor = PrefixVLMProcessor.from_backbones(tmp_path / "vision", decoder)
    inputs = processor(images=PICTURE, text="What?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    again, report = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again.eval()(**inputs).logits, logits)


CLEAN = """
import sys
sys.modules["prefixvlm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(folder + "/photo.png"), text="What?", return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, folder + "/logits.pt")
"""


@every_map
@torch.no_grad()
def test_a_clean_process_sees_the_same_model(architecture, decoder, tmp_path):
    """Also that of the other version of transformers, whose wrapper names the weights differently."""
    saved(architecture, tmp_path / "vision")
    folder = tmp_path / "joined"
    halves = (tmp_path / "vision", decoder)
    model, processor = (one.from_backbones(*halves) for one in (PrefixVLMForConditionalGeneration, PrefixVLMProcessor))
    for part in (model, processor):
        part.save_pretrained(folder)
    PICTURE.save(folder / "photo.png")
    logits = model(**processor(images=PICTURE, text="What?", return_tensors="pt")).logits
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for python in filter(None, (sys.executable, os.environ.get("PREFIXVLM_OTHER_PYTHON"))):
        subprocess.run([python, "-c", CLEAN, str(folder)], check=True, env=environment, cwd=tmp_path)
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits, rtol=0, atol=1e-4)


def test_statistics_of_batches_never_change(decoder, tmp_path):
    saved("resnet10t", tmp_path)
    model = PrefixVLMForConditionalGeneration.from_backbones(tmp_path, decoder).train()
    before = {name: value.clone() for name, value in model.vision_tower.named_buffers()}
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.get_vision_features(pixels)[:1], model.get_vision_features(pixels[:1]))
    assert before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_tower.named_buffers())


@torch.no_grad()
def test_another_size_and_what_timm_does_to_pictures(decoder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("prefixvlm.configuration.vision_backbone_prefix_vlm.logger.warning_once", said.append)
    saved("resnet10t", tmp_path)
    model = PrefixVLMForConditionalGeneration.from_backbones(tmp_path, decoder, image_size=128, pixel_shuffle=2)
    assert model.config.num_image_tokens == 4
    processor = PrefixVLMProcessor.from_backbones(tmp_path, decoder, image_size=128, pixel_shuffle=2)
    assert len(said) == 1
    assert "cuts off the edges" in said[0]
    assert processor.image_processor.image_mean == [0.4] * 3
    assert processor.image_processor.size == {"height": 128, "width": 128}
    inputs = processor(images=PICTURE, text="What?", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()
    kept = PrefixVLMProcessor.from_backbones(tmp_path, decoder, center_crop=True).image_processor
    transform = timm.data.create_transform(**timm.data.resolve_data_config(CFG))
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGB")  # smooth, as both may round to another pixel
    ours = torch.as_tensor(kept(images=picture, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(ours, transform(picture), rtol=0, atol=0.1)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_features_that_are_no_map_are_refused(architecture, decoder, tmp_path):
    TimmWrapperConfig(architecture=architecture, pretrained_cfg={**CFG, "input_size": [3, 224, 224]}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="choose a convolutional or hybrid timm model"):
        PrefixVLMProcessor.from_backbones(tmp_path, decoder)


def test_an_earlier_layer_is_refused(decoder, tmp_path):
    saved("resnet10t", tmp_path)
    with pytest.raises(ValueError, match="a timm_wrapper encoder gives only its last layer"):
        PrefixVLMForConditionalGeneration.from_backbones(tmp_path, decoder, vision_feature_layer=-2)


def test_its_flops_are_counted_where_they_are_and_the_card_names_it(decoder, tmp_path):
    saved("resnet10t", tmp_path)
    model = PrefixVLMForConditionalGeneration.from_backbones(tmp_path, decoder)
    call = {"tokens": 20, "squared_lengths": 400, "supervised": 7}
    frozen = {"vision_tower": False, "projector": True, "language_model": False}
    one = training_flops(model, frozen, images=2, encoded_images=1, **call)
    none = training_flops(model, frozen, images=2, encoded_images=0, **call)
    stem = 2 * 32 * 32 * 3 * 9 * 24  # of its first convolution alone
    assert one - none > 10 * stem
    model.save_pretrained(tmp_path / "joined")
    assert "resnet10t, 512 wide" in (tmp_path / "joined" / "README.md").read_text()
    assert json.loads((tmp_path / "joined" / "config.json").read_text())["vision_config"]["architecture"] == "resnet10t"
