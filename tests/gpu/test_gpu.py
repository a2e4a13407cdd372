"""What only a GPU can show: `make test-gpu` runs these; elsewhere they are skipped.

PREFIXVLM_GPU_TESTS_ON=cpu runs all but the benchmarks on the CPU, to try the tests themselves.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import layout_batch, tiny_model

import prefixvlm.train.recipes.schema
from prefixvlm.train.recipes.schema import parse_recipe
from prefixvlm.train.training.run import run_recipe
from prefixvlm.train.training.trainer import StageTrainer

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process has one GPU
DEVICE = os.environ.get("PREFIXVLM_GPU_TESTS_ON", "cuda")
ROOT = Path(__file__).parents[2]
CONFIGS = Path(prefixvlm.train.recipes.schema.__file__).with_name("accelerate")
MODES = ["causal", "prefix", "prefix_all_images", "bidirectional"]
LORA = {"r": 4, "alpha": 8, "modules": ["language_model"]}

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def small(output: Path, stages=(0, 1, 2, 3), of_stage: dict | None = None, **settings) -> dict:
    values = copy.deepcopy(SMALL)
    values["stages"] = {number: {**values["stages"][number], **(of_stage or {})} for number in stages}
    return {**values, "output": str(output), "bf16": True, "logging_steps": 1, **settings}


def losses(output: Path, stages=(0, 1, 2, 3)) -> list[float]:
    histories = [json.loads((output / f"stage-{number}" / "history.json").read_text()) for number in stages]
    return [entry["loss"] for history in histories for entry in history if "loss" in entry]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_forward_in_bfloat16_is_close_to_float32_on_the_cpu(mode):
    model = tiny_model(mode)
    batch = layout_batch(model, ["wIwIw", "Iww"], seed=1)
    expected = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    model.to(DEVICE, torch.bfloat16)
    found = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}, use_cache=False).logits
    found = found.float().cpu()[batch["attention_mask"].bool()]
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("mode", MODES[:3])
def test_every_way_to_generate_agrees(mode):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(mode)
    model.generation_config.eos_token_id = None
    batch = layout_batch(model, ["wIwIw", "Iww"], seed=1, padding_side="left")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    model.to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    for way in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**batch, **options, **way).cpu(), expected), way


@pytest.mark.parametrize("kind", ["plain", "packed", "checkpointing"])
def test_each_stage_trains_in_bfloat16(kind, tmp_path):
    of_stage = {"max_tokens_per_row": 64} if kind == "packed" else {}
    run_recipe(parse_recipe(small(tmp_path, of_stage=of_stage, gradient_checkpointing=kind == "checkpointing")))
    found = losses(tmp_path)
    assert len(found) == 8
    assert all(math.isfinite(loss) and loss > 0 for loss in found)
    before, after = (load_file(tmp_path / f"stage-{number}" / "model.safetensors") for number in (2, 3))
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith("q_proj.weight"))


def test_adapters_train_and_merge(tmp_path):
    run_recipe(parse_recipe(small(tmp_path, stages=(2, 3), of_stage={"language_model_lr": 1e-3}, lora=LORA)))
    before, after = (load_file(tmp_path / f"stage-{number}" / "model.safetensors") for number in (2, 3))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_the_feature_cache_gives_the_same_losses(tmp_path):
    settings = {"stages": (0, 1), "of_stage": {"epochs": 1.0}}
    run_recipe(parse_recipe(small(tmp_path / "plain", **settings)))
    run_recipe(parse_recipe(small(tmp_path / "cached", **settings, feature_cache_gb=0.1)))
    assert any((tmp_path / "cached" / "features").iterdir())
    assert losses(tmp_path / "cached", (0, 1)) == pytest.approx(losses(tmp_path / "plain", (0, 1)), rel=0.02)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    settings = {"stages": (2,), "of_stage": {"max_steps": 4}, "save_steps": 1}
    run_recipe(parse_recipe(small(tmp_path / "whole", **settings)))
    original, steps = StageTrainer.training_step, []

    def stopping(self, *args, **kwargs):
        steps.append(1)
        if len(steps) > 5:  # two device batches a step
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stopping)
    recipe = parse_recipe(small(tmp_path / "stopped", **settings))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    monkeypatch.setattr(StageTrainer, "training_step", original)
    run_recipe(recipe, resume=True)
    expected, found = (load_file(tmp_path / name / "stage-2" / "model.safetensors") for name in ("whole", "stopped"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


def test_one_process_trains_with_sharded_weights(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(small(tmp_path / "out", stages=(0, 2))))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    on_cpu = ["--cpu"] if DEVICE == "cpu" else []
    command = [*launch, *on_cpu, "--num_processes", "1", "-m", "prefixvlm", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out", (0, 2)))


@pytest.mark.skipif(DEVICE != "cuda", reason="full size takes a GPU")
@pytest.mark.parametrize("part", ["first_token", "decoding", "training_step"])
def test_benchmarks_measure(part, tmp_path):
    output = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--only", part, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert [json.loads(line) for line in output.read_text().splitlines()]
