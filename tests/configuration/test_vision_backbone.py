"""One truth about a vision backbone's pictures, for model and processor: their size, and that nothing of them is cut off.

Shapes: S side of a picture.
"""

import pytest
import torch
import transformers
from encoders import VISION, encoder, save_decoder
from PIL import Image
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig, TimmWrapperConfig, ViTConfig
from transformers.utils import is_timm_available

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor, vision_backbone

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
PICTURE = Image.effect_noise((90, 60), 90).convert("RGB")


def pillow(name: str):
    return getattr(transformers, f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name)


def cropping(side: int, whole: int, name: str = "CLIPImageProcessor"):
    """Resizes the shortest edge to `whole` pixels and cuts a square out of the middle, as CLIP and DINOv2 do."""
    return pillow(name)(
        size={"shortest_edge": whole}, crop_size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, resample=2
    )


def resizing(side: int, name: str = "ViTImageProcessor"):
    return pillow(name)(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, resample=2)


def pixels(image_processor, picture=PICTURE) -> torch.Tensor:
    return torch.as_tensor(image_processor(images=picture, return_tensors="pt")["pixel_values"][0])


@pytest.fixture
def save(tmp_path):
    """Saves a vision configuration and a preprocessor; gives the folder."""

    def get(config, image_processor=None):
        config.save_pretrained(tmp_path)
        if image_processor is not None:
            image_processor.save_pretrained(tmp_path)
        return str(tmp_path)

    return get


@pytest.mark.parametrize(
    ("preprocessor", "asked", "side"),
    [
        (None, None, 32),  # as the configuration says
        (cropping(16, 24), None, 16),  # what the preprocessor makes, as of DINOv2: configuration 518, preprocessor 224
        (resizing(24), None, 24),
        (cropping(16, 24), 40, 40),
        (None, 16, 16),
        (pillow("CLIPImageProcessor")(size={"shortest_edge": 24}, do_center_crop=False), None, 32),  # no squares
        (pillow("CLIPImageProcessor")(do_resize=False, do_center_crop=False), None, 32),
    ],
    ids=["alone", "crop", "resize", "asked", "asked_alone", "no_squares", "as_they_are"],
)
def test_model_and_processor_agree_on_the_size(preprocessor, asked, side, save, tmp_path_factory):
    model = encoder("DINOv2")
    folder = save(Dinov2Config(**VISION), preprocessor)
    model.save_pretrained(folder)
    decoder = tmp_path_factory.mktemp("decoder")
    save_decoder(decoder)
    joined = PrefixVLMForConditionalGeneration.from_backbones(folder, decoder, image_size=asked)
    processor = PrefixVLMProcessor.from_backbones(folder, decoder, image_size=asked)
    assert joined.config.vision_config.image_size == side
    assert processor.num_image_tokens == joined.config.num_image_tokens == (side // 8) ** 2
    inputs = processor(images=PICTURE, text="What?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    with torch.no_grad():
        assert torch.isfinite(joined(**inputs).logits).all()


@pytest.mark.parametrize(
    "preprocessor",
    [
        cropping(32, 32),
        cropping(32, 36, "BitImageProcessor"),
        pillow("ConvNextImageProcessor")(
            size={"shortest_edge": 32}, crop_pct=0.8, image_mean=MEAN, image_std=STD, resample=2
        ),
    ],
    ids=["clip", "bit", "convnext"],
)
def test_a_preprocessor_that_cuts_off_edges_is_replaced_by_one_that_scales_alike(preprocessor, save, monkeypatch):
    folder = save(CLIPVisionConfig(**VISION), preprocessor)
    said = []
    monkeypatch.setattr("prefixvlm.configuration.vision_backbone_prefix_vlm.logger.warning_once", said.append)
    backbone = vision_backbone(folder)
    whole = backbone.image_processor()
    assert len(said) == 1
    assert folder in said[0]
    assert "center_crop=True" in said[0]
    expected = siglip_image_processor(32, image_mean=MEAN, image_std=STD, resample=2)
    assert torch.equal(pixels(whole), pixels(expected))
    kept = backbone.image_processor(center_crop=True)
    assert torch.equal(pixels(kept), pixels(preprocessor))
    assert not torch.equal(pixels(kept), pixels(whole))
    assert len(said) == 1


@pytest.mark.parametrize("preprocessor", [resizing(32), siglip_image_processor(32)], ids=["vit", "siglip"])
def test_a_preprocessor_of_whole_pictures_is_kept_without_a_word(preprocessor, save, monkeypatch):
    folder = save(ViTConfig(**VISION), preprocessor)
    said = []
    monkeypatch.setattr("prefixvlm.configuration.vision_backbone_prefix_vlm.logger.warning_once", said.append)
    kept = vision_backbone(folder).image_processor()
    assert type(kept) is type(preprocessor)
    assert torch.equal(pixels(kept), pixels(preprocessor))
    bigger = vision_backbone(folder, 48).image_processor()
    assert pixels(bigger).shape == (3, 48, 48)
    assert bigger.image_mean == preprocessor.image_mean
    assert said == []


def test_a_crop_of_another_size_than_the_models_is_refused(save):
    folder = save(CLIPVisionConfig(**VISION), cropping(32, 36))
    with pytest.raises(ValueError, match="no preprocessor of its own that makes pictures of 48 x 48"):
        vision_backbone(folder, 48).image_processor(center_crop=True)


def test_a_crop_without_a_preprocessor_is_refused(save):
    with pytest.raises(ValueError, match="leave out center_crop"):
        vision_backbone(save(SiglipVisionConfig(**VISION))).image_processor(center_crop=True)


def test_a_timm_model_without_timm_is_refused(save):
    if is_timm_available():
        pytest.skip("timm is installed")
    folder = save(TimmWrapperConfig(architecture="resnet10t", label_names=["a", "b"]))
    with pytest.raises(ValueError, match=r"is a model of timm, which is missing; run: pip install 'prefixvlm\[timm\]'"):
        vision_backbone(folder)
