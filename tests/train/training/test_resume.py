"""Interrupted runs: resumed, they end with the weights of a run that nobody disturbed, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL

from prefixvlm.cli import main
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training.checkpoints import is_whole, newest_whole, seal
from prefixvlm.train.training.run import run_recipe
from prefixvlm.train.training.trainer import StageTrainer

KILLED_RUNS = Path(__file__).parent / "killed_runs.py"
ROWS = 23  # no multiple of the batch


@pytest.fixture
def data_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(ROWS):
            Image.effect_noise((16, 16), 80).convert("RGB").save(folder / f"{index}.png")
            file.write(
                json.dumps({"image": f"{index}.png", "texts": [f"picture number {index} " * (1 + index % 4)]}) + "\n"
            )
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write_recipe(tmp_path, data_folder, tokenizer, **settings) -> str:
    """Stages 0 (noise) and 2, a dozen steps over more than an epoch, a checkpoint after every second step."""
    source = {"source": "captions", "path": str(data_folder / "rows.jsonl"), "streaming": settings.pop("streaming", False)}
    stage = {"data": source, "augment": True, "batch_size": 4, "device_batch_size": 2, "max_steps": 8, **settings}
    values = {
        "model": {**SMALL["model"], "tokenizer": tokenizer},
        "stages": {0: stage, 2: {**stage, "vision_tower_lr": 1e-3}},
        "save_steps": 2,
        "logging_steps": 1,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def killed_runs(recipe: str, folder: Path, points: int, seed: int) -> list[dict]:
    folder.mkdir()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(KILLED_RUNS), recipe, str(folder), str(seed), str(points)],
        capture_output=True,
        text=True,
        env=environment,
    )
    logs = "".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    return json.loads(done.stdout.splitlines()[-1])


KINDS = {"map-style": {}, "packed": {"max_tokens_per_row": 128, "group_by_length": True}, "streamed": {"streaming": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, data_folder, tokenizer, kind):
    recipe = write_recipe(tmp_path, data_folder, tokenizer, **KINDS[kind])
    results = killed_runs(recipe, tmp_path / "runs", points=2, seed=1)
    assert [result["identical"] for result in results] == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_random_kills(tmp_path, data_folder, tokenizer, kind):
    recipe = write_recipe(tmp_path, data_folder, tokenizer, **KINDS[kind])
    results = killed_runs(recipe, tmp_path / "runs", points=10, seed=2)
    assert [result["identical"] for result in results] == [True] * 10
    assert any(result["checkpoints"] for result in results)  # not all of them before the first


class Stop(Exception):  # noqa: N818 - what a power cut is to a process
    pass


def stopped_run(recipe, monkeypatch, step: int) -> Path:
    """A run of stage 0 that ends after so many steps, as a kill would end it."""
    original = StageTrainer.before_step

    def before_step(self):
        if self.state.global_step == step:
            raise Stop
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "before_step", before_step)
        with pytest.raises(Stop):
            run_recipe(recipe, [0])
    return Path(recipe.output) / "stage-0.partial"


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, data_folder, tokenizer, damage, monkeypatch, capfd):
    path = write_recipe(tmp_path, data_folder, tokenizer)
    run_recipe(load_recipe(path, [f"output={tmp_path / 'whole'}"]), [0])
    partial = stopped_run(load_recipe(path), monkeypatch, step=7)
    newest = partial / "checkpoint-6"
    assert newest_whole(partial) == newest
    if damage == "missing":
        (newest / "scheduler.pt").unlink()
    else:
        content = (newest / damage).read_bytes()
        (newest / damage).write_bytes(content[: len(content) // 2])
    assert newest_whole(partial) == partial / "checkpoint-4"
    run_recipe(load_recipe(path), [0], resume=True)
    assert "checkpoint-6 is incomplete or damaged; trying the one before" in capfd.readouterr().err
    found, expected = (load_file(tmp_path / name / "stage-0" / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(tmp_path, data_folder, tokenizer, monkeypatch, capsys):
    path = write_recipe(tmp_path, data_folder, tokenizer)
    partial = stopped_run(load_recipe(path), monkeypatch, step=5)
    assert main(["train", path, "--stages", "0"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(["train", path, "--stages", "0", "--resume", "stages.0.projector_lr=0.5"]) == 2
    assert "with other settings of stage" in capsys.readouterr().err
    (data_folder / "rows.jsonl").write_text((data_folder / "rows.jsonl").read_text().replace("number", "no."))
    assert main(["train", path, "--stages", "0", "--resume"]) == 2
    assert "with other settings of data_fingerprint" in capsys.readouterr().err
    assert is_whole(partial / "checkpoint-4")


def test_finished_stages_are_kept(tmp_path, data_folder, tokenizer, capsys):
    path = write_recipe(tmp_path, data_folder, tokenizer)
    run_recipe(load_recipe(path), [0])
    before = (tmp_path / "out" / "stage-0" / "model.safetensors").stat().st_mtime_ns
    run_recipe(load_recipe(path), resume=True)
    assert "Stage 0 is finished." in capsys.readouterr().out
    assert (tmp_path / "out" / "stage-0" / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "stage-2" / "run.json").is_file()
    assert run_recipe(load_recipe(path), resume=True) == tmp_path / "out" / "stage-2"


def test_a_checkpoint_is_whole_only_with_all_it_had(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "a").write_text("abc")
    (checkpoint / "inner" / "b").write_text("de")
    assert not is_whole(checkpoint)
    seal(checkpoint)
    assert is_whole(checkpoint)
    (checkpoint / "inner" / "b").write_text("d")
    assert not is_whole(checkpoint)
    assert newest_whole(tmp_path) is None
