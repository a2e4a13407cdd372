"""The cache of a frozen encoder's features: the same results, computed once, bounded, and safe against damage."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_model, tiny_processor, tiny_tokenizer

from prefixvlm.modeling_vlm import cpu_prefix_vlm
from prefixvlm.modeling_vlm.modeling_prefix_vlm import PrefixVLMModel
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.feature_cache import FeatureCache, image_key
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training.run import run_recipe

GIGABYTE = 10**9


class Encoder:
    """The model's encoder, counting the images it is given."""

    def __init__(self, model):
        self.model, self.images = model, 0

    def __call__(self, pixel_values):
        self.images += len(pixel_values)
        return self.model.get_vision_features(pixel_values)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def cache_in(folder, model, max_bytes=GIGABYTE, **options) -> FeatureCache:
    return FeatureCache(folder, model.vision_tower, torch.float32, max_bytes, **options)


def test_features_are_computed_once_and_come_back_the_same(tmp_path):
    model = tiny_model()
    encoder, cache, pixels = Encoder(model), cache_in(tmp_path, model), images(5)
    expected = model.get_vision_features(pixels)
    for _ in range(3):
        torch.testing.assert_close(cache.complete(cache.look_up(pixels), encoder), expected)
    again = torch.cat([pixels[[3, 1]], images(1, seed=1), pixels[[0]]])
    found = cache.complete(cache.look_up(again), encoder)
    torch.testing.assert_close(found, model.get_vision_features(again))
    assert encoder.images == 5 + 1
    other = cache_in(tmp_path, model)  # as a later stage opens it
    assert "pixel_values" not in other.look_up(again)


def test_one_pixel_or_one_weight_makes_another_entry(tmp_path):
    model, pixels = tiny_model(), images(1)
    cache = cache_in(tmp_path, model)
    cache.complete(cache.look_up(pixels), Encoder(model))
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 1e-6
    assert image_key(changed[0]) != image_key(pixels[0])
    assert not cache.look_up(changed)["is_cached"].any()
    with torch.no_grad():
        next(model.vision_tower.parameters()).view(-1)[0] += 1e-3
    assert not cache_in(tmp_path, model).look_up(pixels)["is_cached"].any()
    assert len(list(tmp_path.iterdir())) == 1  # what belonged to the other weights is gone


def test_disk_is_bounded_and_what_does_not_fit_is_computed(tmp_path):
    model = tiny_model()
    entry = model.get_vision_features(images(1)).nbytes
    cache, encoder, pixels = cache_in(tmp_path, model, max_bytes=3 * entry), Encoder(model), images(8)
    for _ in range(2):
        torch.testing.assert_close(cache.complete(cache.look_up(pixels), encoder), model.get_vision_features(pixels))
    assert encoder.images == 8 + 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 3 * entry


def test_processes_share_what_each_has_written(tmp_path):
    model, pixels = tiny_model(), images(4)
    first, second = (cache_in(tmp_path, model, rank=rank, processes=2) for rank in (0, 1))
    encoder = Encoder(model)
    first.complete(first.look_up(pixels[:2]), encoder)
    second.complete(second.look_up(pixels), encoder)
    first.complete(first.look_up(pixels), encoder)
    assert encoder.images == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_features_are_computed_again(tmp_path, damage):
    model, pixels = tiny_model(), images(3)
    cache = cache_in(tmp_path, model)
    expected = cache.complete(cache.look_up(pixels), Encoder(model))
    (path,) = tmp_path.rglob("*.bin")
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content) - 1) + b"\1")
    fresh = cache_in(tmp_path, model)
    torch.testing.assert_close(fresh.complete(fresh.look_up(pixels), Encoder(model)), expected)


def test_model_takes_features_in_place_of_pixels():
    model, processor = tiny_model(), tiny_processor()
    sample = Conversation.about([Image.effect_noise((16, 16), 60).convert("RGB")], [("user", "q"), ("assistant", "a")])
    batch = ConversationCollator(processor, "conversation")([sample])
    expected = model(**batch)
    pixel_values = batch.pop("pixel_values")
    found = model(**batch, vision_features=model.get_vision_features(pixel_values))
    torch.testing.assert_close(found.logits, expected.logits)
    with pytest.raises(ValueError, match="at most one of"):
        model(**batch, pixel_values=pixel_values, vision_features=model.get_vision_features(pixel_values))


def trained(tmp_path: Path, name: str, **settings) -> Path:
    """Stages 0 and 1 on the same eight pictures, twice over."""
    folder = tmp_path / "data"
    if not folder.exists():
        folder.mkdir()
        for index in range(8):
            Image.effect_noise((16, 16), 80).convert("RGB").save(folder / f"{index}.png")
        rows = [{"image": f"{index}.png", "texts": f"picture {index}"} for index in range(8)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = {"source": "captions", "path": str(folder / "rows.jsonl")}
    stage = {"data": source, "batch_size": 4, "device_batch_size": 4, "epochs": 2, "max_tokens_per_row": 100}
    values = {
        "model": {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")},
        "stages": {0: stage, 1: stage},
        "output": str(tmp_path / name),
        **settings,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return run_recipe(load_recipe(str(path)))


@pytest.mark.parametrize("bf16", [False, True])
def test_training_with_the_cache_is_training_without_it(bf16, tmp_path, monkeypatch):
    """Also where bf16 is asked of a CPU without its arithmetic: features computed in float32 are kept in it."""
    monkeypatch.setattr(cpu_prefix_vlm, "_has_bfloat16_arithmetic", lambda: False)
    encoded = []
    original = PrefixVLMModel.get_vision_features

    def counting(self, pixel_values):
        encoded.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(PrefixVLMModel, "get_vision_features", counting)
    without = load_file(trained(tmp_path, "without", bf16=bf16) / "model.safetensors")
    assert sum(encoded) == 2 * 2 * 8
    encoded.clear()
    with_cache = load_file(trained(tmp_path, "with", bf16=bf16, feature_cache_gb=0.1) / "model.safetensors")
    assert sum(encoded) == 8
    for name, weight in without.items():
        torch.testing.assert_close(with_cache[name], weight, rtol=1e-5, atol=1e-7)
    names = ("pixel_values", "projector.linear_1.weight")
    assert not torch.equal(without[names[1]], load_file(tmp_path / "with" / "stage-0" / "model.safetensors")[names[1]])
