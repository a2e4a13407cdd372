"""The dry run: right counts, and nothing written."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from small_recipe import SMALL
from tiny import tiny_config, tiny_model, tiny_tokenizer

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.cli import main
from prefixvlm.inference import environment
from prefixvlm.train.training import plan as planning
from prefixvlm.train.training.cost import peak_memory, peak_rate, training_flops


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = "\n".join(json.dumps({"image": "a.png", "texts": "abcdefghi"}) for _ in range(30))
    (tmp_path / "rows.jsonl").write_text(text)
    return tmp_path / "rows.jsonl"


def test_a_dry_run_counts_and_writes_nothing(rows, capsys, monkeypatch):
    source = {"source": "captions", "path": str(rows)}
    values = {
        "model": {**SMALL["model"], "tokenizer": str(rows.parent / "tokenizer")},
        "stages": {1: {"data": source, "batch_size": 4, "epochs": 2}, 2: {"data": source, "max_steps": 3, "batch_size": 4}},
        "output": str(rows.parent / "out"),
    }
    (rows.parent / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(environment, "product_dtype", lambda dtype, device: torch.float32)
    assert main(["train", str(rows.parent / "recipe.yaml"), "--dry-run", "bf16=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("This CPU has no bfloat16 arithmetic") == 1
    assert "rows        30 (tokens from 30 of the rows)" in out
    tokens = 4 + 9 + 1  # image, text, end
    assert f"tokens      {30 * tokens} ({tokens} per sample, 10 supervised)" in out
    assert "steps       16 of 4 samples" in out
    assert "steps       3 of 4 samples" in out
    assert "vision_tower 0 at 0, projector 544 at 0.001" in out
    assert out.count("time ") == 2
    assert "not measured" not in out
    assert not (rows.parent / "out").exists()
    assert main(["train", str(rows.parent / "recipe.yaml"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["steps"] for stage in found["stages"].values()] == [16, 3]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))


def test_the_paper_recipe_is_planned_without_the_hub(monkeypatch, capsys):
    # at full size a step takes minutes here
    monkeypatch.setattr(planning, "_measured", lambda *args: "not in a test")
    monkeypatch.setattr(PrefixVLMConfig, "from_preset", small_paper)
    assert main(["train", "paper", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [int(rows.replace(",", "")) for rows in re.findall(r"rows +([\d,]+)", out)] == [118000, 118000, 558000, 790000]
    assert [int(n.replace(",", "")) for n in re.findall(r"steps +([\d,]+)", out)] == [922, 922, 4360, 6172]
    assert "cannot be loaded" in out
    assert "128 text tokens per sample are assumed" in out


def small_paper(name, **overrides):
    assert name == "paper"
    for field in ("projector_hidden_size", "vision_config"):
        overrides.pop(field, None)
    return PrefixVLMConfig(**tiny_config().to_dict() | overrides)


def weights_of(module) -> int:
    return sum(
        p.numel() for name, p in module.named_parameters() if p.ndim > 1 and ("embed" not in name or "patch" in name)
    )


@pytest.mark.parametrize(
    "trains", [("projector",), ("projector", "language_model"), ("vision_tower", "projector", "language_model")]
)
def test_flops_are_two_per_weight_forward_and_as_many_for_each_gradient(trains):
    model = tiny_model()
    switch = {module: module in trains for module in ("vision_tower", "projector", "language_model")}
    patches, tokens, supervised = 4, 20, 7
    vision, projector, text = (weights_of(getattr(model, name)) for name in switch)
    head = model.get_output_embeddings().weight.numel()
    expected = 2 * patches * vision * (3 if switch["vision_tower"] else 1)
    expected += 2 * patches * projector * (3 if switch["vision_tower"] or switch["projector"] else 1)
    passes = 3 if switch["language_model"] else 2
    expected += 2 * tokens * text * passes + 2 * supervised * head * passes
    # scores and their use: 2 products of T x T x D per layer, twice as many backward
    expected += 4 * patches**2 * 32 * 2 * (3 if switch["vision_tower"] else 1) + 4 * tokens**2 * 48 * 2 * 3
    assert training_flops(model, switch, 1, tokens, tokens**2, supervised) == expected


def test_flops_of_the_paper_stage_2_are_six_per_weight():
    with torch.device("meta"):
        model = PrefixVLMForConditionalGeneration(PrefixVLMConfig.from_preset("paper"))
    trains = dict.fromkeys(("vision_tower", "projector", "language_model"), True)
    flops = training_flops(model, trains, 1, 384, 384**2, 128)
    rough = 6 * (412e6 * 256 + 18.4e6 * 256 + 358e6 * 384 + 136e6 * 128)
    assert flops == pytest.approx(rough, rel=0.1)


def test_a_cpu_has_a_peak_rate():
    assert peak_rate(torch.device("cpu"), torch.float32) > 1e9


def test_peak_memory_is_this_processes_own():
    """A process starts from nothing, however much its parent has used."""
    held = torch.ones(2**28)  # 1 GiB
    assert peak_memory(torch.device("cpu")) > held.nbytes
    code = "import torch; from prefixvlm.train.training.cost import peak_memory; print(peak_memory(torch.device('cpu')))"
    small = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(small.stdout) < held.nbytes


def test_activations_of_a_sample_do_not_grow_with_the_vocabulary():
    """Neither logits nor the head's gradient, of which there is one however many samples, are a sample's own."""
    recipe = SimpleNamespace(gradient_checkpointing=False, bf16=False)
    size = planning.DataSize(1, 40.0, 30.0, 1.0, "")
    kept = []
    for vocabulary in (264, 5264):
        config = tiny_config()
        config.text_config.vocab_size = vocabulary
        model = PrefixVLMForConditionalGeneration(config)
        kept.append(planning._measured(recipe, model, size, torch.device("cpu"), 0).activation_bytes)
    assert kept[0] == kept[1]
    assert kept[0] > 10_000
