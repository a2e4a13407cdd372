"""Batches with and without images train in any stage and wrapper, with the loss and gradients of each sample alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ragged import IMAGES, PROCESSOR, each_alone, evaluate_ragged, train_ragged
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_model, tiny_tokenizer

import prefixvlm.train.recipes.schema
from prefixvlm.cli import main
from prefixvlm.train.data import Conversation, ConversationCollator

SCRIPT = Path(__file__).with_name("two_processes.py")
SHARDS = Path(prefixvlm.train.recipes.schema.__file__).with_name("accelerate") / "fsdp2.yaml"
ADAPTERS = {"adapters": ["vision_tower", "language_model"]}
STAGES = {f"stage {number}": {"number": number} for number in range(4)}
CHECKPOINTING = {"checkpointing": True}
ALONE = {
    **STAGES,
    "stage 0, cached": {"number": 0, "cached": True},
    "stage 1, cached and packed": {"number": 1, "cached": True, "packed": True, "device_batch": 4},
    "stage 3, packed": {"number": 3, "packed": True, "device_batch": 4},
    "stage 2, checkpointing": {"number": 2, **CHECKPOINTING},
    "stage 3, adapters": {"number": 3, **ADAPTERS},
    "stage 3, adapters, checkpointing": {"number": 3, **ADAPTERS, **CHECKPOINTING},
    "stage 2, bf16": {"number": 2, "bf16": True},
}
IN_TWO = {
    "ddp": {
        "stage 1": {"number": 1},
        "stage 2, two at once": {"number": 2, "device_batch": 2},  # one process ends with a batch of padding samples
        "stage 3, checkpointing": {"number": 3, **CHECKPOINTING},
        "stage 3, adapters, checkpointing": {"number": 3, **ADAPTERS, **CHECKPOINTING},
    },
    "fsdp2": {
        "stage 0": {"number": 0},
        "stage 3, packed, checkpointing": {"number": 3, "packed": True, "device_batch": 2, **CHECKPOINTING},
    },
}
MORE_IN_TWO = {
    "ddp": {
        **STAGES,
        "stage 0, cached": {"number": 0, "cached": True},
        "stage 3, packed": {"number": 3, "packed": True, "device_batch": 2},
        "stage 1, checkpointing": {"number": 1, **CHECKPOINTING},
        "stage 3, adapters": {"number": 3, **ADAPTERS},
        "stage 3, bf16": {"number": 3, "bf16": True},
    },
    "fsdp2": {
        **STAGES,
        "stage 3, packed": {"number": 3, "packed": True, "device_batch": 2},
        "stage 2, checkpointing": {"number": 2, **CHECKPOINTING},
        "stage 2, bf16": {"number": 2, "bf16": True},
    },
}


def run_in_two(folder: Path, kinds: dict[str, dict]) -> dict[str, dict]:
    """The logs of each kind of training by its wrapper, and what `evaluate` finds."""
    jobs = {"evaluate": (None, ["evaluate", str(folder)])}
    for wrapper, some in kinds.items():
        (folder / wrapper).mkdir()
        (folder / wrapper / "kinds.json").write_text(json.dumps(some))
        arguments = ["ragged", str(folder / wrapper), str(folder / wrapper / "kinds.json")]
        jobs[wrapper] = (str(SHARDS) if wrapper == "fsdp2" else None, arguments)
    for name, (shards, arguments) in jobs.items():
        job = {"processes": 2, "sharded_by": shards, "arguments": arguments}
        (folder / f"{name}.json").write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2] / "helpers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *(str(folder / f"{name}.json") for name in jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {wrapper: json.loads((folder / wrapper / "logs.json").read_text()) for wrapper in kinds}
    return {**found, "evaluate": json.loads((folder / "found.json").read_text())}


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    return run_in_two(tmp_path_factory.mktemp("some"), IN_TWO)


@pytest.fixture(scope="module")
def more_in_two_processes(tmp_path_factory):
    return run_in_two(tmp_path_factory.mktemp("more"), MORE_IN_TWO)


def names(kinds: dict[str, dict]) -> list[tuple[str, str]]:
    return [(wrapper, name) for wrapper, some in kinds.items() for name in some]


def assert_as_alone(log: list[dict], kind: dict) -> None:
    assert len(log) == 2
    expected = each_alone(kind["number"], kind.get("adapters", ()))
    assert {name for name in log[0] if name.startswith("grad_norm/")} == set(expected) - {"loss"}
    for name, value in expected.items():
        assert log[0][name] == pytest.approx(value, rel=3e-2 if kind.get("bf16") else 2e-5), name


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name, tmp_path):
    assert_as_alone(train_ragged(tmp_path, **ALONE[name]), ALONE[name])


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "name"), names(IN_TWO))
def test_two_processes(in_two_processes, wrapper, name):
    assert_as_alone(in_two_processes[wrapper][name], IN_TWO[wrapper][name])


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "name"), names(MORE_IN_TWO))
def test_two_processes_in_every_way(more_in_two_processes, wrapper, name):
    assert_as_alone(more_in_two_processes[wrapper][name], MORE_IN_TWO[wrapper][name])


@pytest.mark.slow
def test_the_plain_trainer_evaluates_logits_alone_in_any_number_of_processes(in_two_processes, tmp_path):
    two, one = in_two_processes["evaluate"], evaluate_ragged(tmp_path)
    assert two["eval_asked"] == one["eval_asked"] > len(IMAGES)
    assert two["eval_right"] == pytest.approx(one["eval_right"], rel=1e-6)


def test_the_plain_trainer_evaluates_the_loss_alone(tmp_path):
    found = evaluate_ragged(tmp_path, prediction_loss_only=True)
    assert found["eval_loss"] > 0
    assert "eval_right" not in found


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_trains_rows_without_a_picture_one_by_one_in_every_stage(tmp_path, streaming):
    Image.effect_noise((40, 40), 60).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    asked = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    shown = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    rows = [
        {"conversations": asked},
        {"conversations": asked, "image": ""},
        {"conversations": shown, "image": "whole.jpg"},
        {"conversations": shown, "image": "cut.jpg"},  # found in training: a batch of one padding sample
        {"conversations": shown, "image": ""},  # never trained blind
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = {"source": "llava", "path": str(tmp_path / "rows.jsonl"), "streaming": streaming, "allow_text_only": True}
    stage = {"data": source, "batch_size": 1, "device_batch_size": 1, "max_steps": 4}
    values = {
        "model": {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")},
        "stages": dict.fromkeys(range(4), stage),
    }
    values |= {"max_skipped": 0.5, "logging_steps": 1, "feature_cache_gb": 0.1, "output": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    for number in range(4):
        folder = tmp_path / "out" / f"stage-{number}"
        history = json.loads((folder / "history.json").read_text())
        steps = [entry for entry in history if "loss" in entry]
        assert len(steps) == 4
        assert all(math.isfinite(entry["loss"]) for entry in steps)
        assert [entry["loss"] == 0 for entry in steps].count(True) == (not streaming)
        reasons = (folder / "skipped.jsonl").read_text()
        assert "cut.jpg cannot be read" in reasons
        assert "row 5: the user's turns have 1 <image>, but the row has no image" in reasons
        assert len(reasons.splitlines()) == 2
        assert all(weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values())


def test_packed_rows_may_be_longer_than_the_decoders_context():
    model = tiny_model()
    model.config.text_config.max_position_embeddings = 16
    samples = [Conversation.about([], [("user", ""), ("assistant", "a" * length)]) for length in (4, 9, 6)]
    batch = ConversationCollator(PROCESSOR, "caption", max_tokens_per_row=50, context=16)(samples)
    assert batch["input_ids"].shape[1] > 16
    assert model(**batch, use_cache=False).loss.isfinite()
