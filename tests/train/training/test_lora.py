"""LoRA: adapters where they are asked for and nowhere else, adapter-only checkpoints, and a merged model at the end."""

import json
import re
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor

from prefixvlm import PrefixVLMForConditionalGeneration
from prefixvlm.cli import main
from prefixvlm.train.recipes.schema import LoraRecipe
from prefixvlm.train.recipes.stages import PAPER_STAGES, Stage
from prefixvlm.train.training import lora

pytest.importorskip("peft")

STAGE = Stage(3, "prefix", "conversation", 0.0, 1e-2, 1e-2)


@pytest.fixture
def start(tmp_path):
    folder = tmp_path / "start"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"what {i}?", "answer": f"it is {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(start, **lora_settings) -> str:
    stage = {
        "data": {"source": "vqa", "path": str(start / "rows.jsonl")},
        "batch_size": 4,
        "device_batch_size": 4,
        "epochs": 4,
        "vision_tower_lr": 0.0,
        "projector_lr": 1e-2,
        "language_model_lr": 1e-2,
    }
    values = {"model": {"start": str(start)}, "lora": {"r": 4, **lora_settings}, "stages": {3: stage}, "save_steps": 3}
    path = start.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output": str(start.parent / "out")}))
    return str(path)


def adapted(modules: list[str], stage=STAGE):
    model = tiny_model()
    stage.prepare(model)
    return lora.add_adapters(model, LoraRecipe(r=4, modules=modules), stage)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_by_default_the_decoder_gets_adapters_and_the_projector_trains():
    model = adapted(["language_model"])
    names = trainable(model)
    assert not any("vision_tower" in name for name in names)
    layers = {re.search(r"(\w+)\.lora_A", name)[1] for name in names if "lora_A" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum("lora_A" in name for name in names) == 7 * 2  # layers
    assert sum("projector.modules_to_save" in name for name in names) == 4
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_the_vision_tower_gets_adapters_if_asked():
    names = trainable(adapted(["vision_tower"], PAPER_STAGES[3]))
    layers = {re.search(r"(\w+)\.lora_A", name)[1] for name in names if "lora_A" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert not any("language_model" in name for name in names)


def test_a_module_that_does_not_learn_gets_no_adapters():
    with pytest.raises(ValueError, match="vision_tower, whose learning rate is 0"):
        adapted(["vision_tower"])


def test_training_leaves_a_merged_model_and_adapter_only_checkpoints(start):
    assert main(["train", recipe(start)]) == 0
    folder = start.parent / "out" / "stage-3"
    names = {path.name for path in (folder / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "projector" in name for name in adapter)

    before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    assert changed == {
        name for name in before if re.search(rf"language_model.*({layers})\.weight", name) or "projector" in name
    }
    # the adapter on the old model is the merged model
    model = lora.merged(folder / "adapter", PrefixVLMForConditionalGeneration.from_pretrained(start))
    merged = PrefixVLMForConditionalGeneration.from_pretrained(folder)
    inputs = {"input_ids": torch.tensor([[1, 1, 1, 1, 9, 8]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert {"config.json", "modeling_prefix_vlm.py", "processor_config.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }


def test_without_merging_the_adapter_alone_is_left(start):
    assert main(["train", recipe(start, merge=False)]) == 0
    folder = start.parent / "out" / "stage-3"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()


def test_a_dry_run_counts_adapters(start, capsys):
    assert main(["train", recipe(start), "--dry-run"]) == 0
    adapters = sum(p.numel() for n, p in adapted(["language_model"]).named_parameters() if "lora_" in n)
    assert f"language_model {adapters:,} at 0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": ["head"]}, "lora.modules.0 is 'head'; choose one of"),
        ({"modules": []}, "lora.modules has 0 entries"),
        ({"r": 0}, "lora.r is 0; it must be at least 1"),
        ({"quantize": "int3"}, "lora.quantize is 'int3'"),
        ({"rank": 3}, "unknown key rank"),
        ({"modules": ["vision_tower"]}, "set vision_tower_lr"),
    ],
)
def test_bad_settings_are_named(start, settings, message, capsys):
    assert main(["train", recipe(start, **settings)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_few_bits_need_bitsandbytes(start, kind, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["train", recipe(start, quantize=kind)]) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_of_few_bits_leaves_a_whole_model(start, kind):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    assert main(["train", recipe(start, quantize=kind)]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (start, start.parent / "out" / "stage-3"))
    assert {name: weight.dtype for name, weight in before.items()} == {name: w.dtype for name, w in after.items()}
    untouched = [name for name in before if "vision_tower" in name or "norm" in name]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    for name in ("projector.linear_1.weight", "language_model.model.layers.0.mlp.up_proj.weight"):
        assert not torch.equal(before[name], after[name])
