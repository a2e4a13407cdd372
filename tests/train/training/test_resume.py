"""Interrupted runs: resumed, they end with the weights of an undisturbed run, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training.checkpoints import is_whole, newest_whole, seal
from prefixvlm.train.training.run import run_recipe
from prefixvlm.train.training.trainer import StageTrainer

KILLED_RUNS = Path(__file__).parent / "killed_runs.py"
ROWS = 11  # no multiple of the batch
PACKED = {"max_tokens_per_row": 128, "group_by_length": True}
KINDS = {
    "map-style": {},
    "packed": PACKED,
    "streamed": {"streaming": True},
    "lora": {"lora": True},
    "packed lora": {**PACKED, "lora": True},
}
FAST_KINDS = ("map-style", "streamed", "packed lora")


def write_rows(folder: Path) -> None:
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(ROWS):
            Image.effect_noise((16, 16), 80).convert("RGB").save(folder / f"{index}.png")
            texts = [f"picture number {index} " * (1 + index % 4)]
            file.write(json.dumps({"image": f"{index}.png", "texts": texts}) + "\n")


def write_recipe(folder: Path, name: str = "recipe", *, streaming: bool = False, lora: bool = False, **settings) -> str:
    """Stages 0 (noise) and 2, five steps over more than an epoch, a checkpoint after every second step."""
    if lora:
        settings["language_model_lr"] = 1e-3
    if not (folder / "data").exists():
        write_rows(folder / "data")
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
    source = {"source": "captions", "path": str(folder / "data" / "rows.jsonl"), "streaming": streaming}
    stage = {"data": source, "augment": True, "batch_size": 4, "device_batch_size": 2, "max_steps": 5, **settings}
    values = {
        "model": {**SMALL["model"], "tokenizer": str(folder / "tokenizer")},
        "stages": {0: stage, 2: {**stage, "vision_tower_lr": 1e-3}},
        "lora": {"r": 2, "dropout": 0.1} if lora else None,
        "save_steps": 2,
        "logging_steps": 1,
        "output": str(folder / "out"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def killed_runs(folder: Path, kinds: Iterable[str], kills: int, seed: int) -> dict[str, list[dict]]:
    """What `killed_runs.py` reports, for each of these kinds of runs."""
    recipes = {kind: write_recipe(folder, kind, **KINDS[kind]) for kind in kinds}
    runs = folder / "runs"
    runs.mkdir()
    command = [sys.executable, str(KILLED_RUNS), str(runs), str(seed), str(kills), *recipes.values()]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    logs = "".join(path.read_text()[-1500:] for path in runs.glob("*/*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    results = json.loads(done.stdout.splitlines()[-1])
    return {kind: results[path] for kind, path in recipes.items()}


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory):
    return killed_runs(tmp_path_factory.mktemp("twice"), FAST_KINDS, kills=2, seed=1)


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_a_killed_run_ends_as_if_nothing_had_happened(killed_twice, kind):
    assert [result["identical"] for result in killed_twice[kind]] == [True] * 2


@pytest.fixture(scope="module")
def killed_ten_times(tmp_path_factory):
    return killed_runs(tmp_path_factory.mktemp("ten"), KINDS, kills=10, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_random_kills(killed_ten_times, kind):
    assert [result["identical"] for result in killed_ten_times[kind]] == [True] * 10
    assert any(result["checkpoints"] for result in killed_ten_times[kind])  # not all of them before the first


class Stop(Exception):  # noqa: N818 - what a power cut is to a process
    pass


def stopped_run(recipe, monkeypatch, step: int) -> Path:
    """A run of stage 0 that ends at `step`, as a kill would end it."""
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Stage 0 of an undisturbed run in `whole`, and in `out` of one that ended in its last step."""
    folder = tmp_path_factory.mktemp("stopped")
    path = write_recipe(folder)
    run_recipe(load_recipe(path, [f"output={folder / 'whole'}"]), [0])
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(load_recipe(path), patch, step=4)
    return folder


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json", "missing"])
def test_a_damaged_newest_checkpoint_is_skipped(stopped, tmp_path, damage, capfd):
    partial = tmp_path / "out" / "stage-0.partial"
    shutil.copytree(stopped / "out" / "stage-0.partial", partial)
    newest = partial / "checkpoint-4"
    assert newest_whole(partial) == newest
    if damage == "missing":
        (newest / "scheduler.pt").unlink()
    else:
        content = (newest / damage).read_bytes()
        (newest / damage).write_bytes(content[: len(content) // 2])
    assert newest_whole(partial) == partial / "checkpoint-2"
    run_recipe(load_recipe(str(stopped / "recipe.yaml"), [f"output={tmp_path / 'out'}"]), [0], resume=True)
    assert "checkpoint-4 is incomplete or damaged; trying the one before" in capfd.readouterr().err
    found, expected = (
        load_file(output / "stage-0" / "model.safetensors") for output in (tmp_path / "out", stopped / "whole")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path)
    partial = stopped_run(load_recipe(path), monkeypatch, step=3)
    assert main(["train", path, "--stages", "0"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(["train", path, "--stages", "0", "--resume", "stages.0.projector_lr=0.5"]) == 2
    assert "with other settings of stage" in capsys.readouterr().err
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("number", "no."))
    assert main(["train", path, "--stages", "0", "--resume"]) == 2
    assert "with other settings of data_fingerprint" in capsys.readouterr().err
    assert is_whole(partial / "checkpoint-2")


@pytest.mark.parametrize("kind", [pytest.param("map-style", marks=pytest.mark.slow), "lora"])
def test_a_run_that_ends_between_two_stages_goes_on_in_the_next(tmp_path, kind):
    path = write_recipe(tmp_path, **KINDS[kind])
    run_recipe(load_recipe(path, [f"output={tmp_path / 'whole'}"]))
    run_recipe(load_recipe(path), [0])
    torch.rand(3)  # another process has not drawn the same random numbers before
    run_recipe(load_recipe(path), resume=True)
    for number in (0, 2):
        found, expected = (
            load_file(tmp_path / name / f"stage-{number}" / "model.safetensors") for name in ("out", "whole")
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_on_a_quantised_model_resume_bit_for_bit(tmp_path, monkeypatch, kind):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    path, quantize = write_recipe(tmp_path, lora=True), f"lora.quantize={kind}"
    run_recipe(load_recipe(path, [quantize, f"output={tmp_path / 'whole'}"]), [0])
    stopped_run(load_recipe(path, [quantize]), monkeypatch, step=4)
    run_recipe(load_recipe(path, [quantize]), [0], resume=True)
    found, expected = (load_file(tmp_path / name / "stage-0" / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_overwrite_begins_anew(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    stopped_run(load_recipe(path), monkeypatch, step=3)
    assert main(["train", path, "--stages", "0", "--overwrite", "seed=1"]) == 0
    assert not (tmp_path / "out" / "stage-0.partial").exists()
    assert json.loads((tmp_path / "out" / "stage-0" / "run.json").read_text())["seed"] == 1


def test_finished_stages_are_kept(tmp_path, capsys):
    path = write_recipe(tmp_path)
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
