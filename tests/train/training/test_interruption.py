"""Ctrl-C and SIGTERM in the middle of training: a checkpoint is left, and the run goes on from it bit for bit."""

import json
import os
import signal
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.train.training.checkpoints import is_whole
from prefixvlm.train.training.trainer import StageTrainer

STEPS = 5
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals of this kind")


@pytest.fixture
def folder(tmp_path):
    """Stages 0 and 2 of five steps without any checkpoint of their own."""
    for index in range(8):
        Image.effect_noise((16, 16), 80).convert("RGB").save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "texts": [f"picture number {index}"]} for index in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    stage = {"data": {"source": "captions", "path": str(tmp_path / "rows.jsonl")}, "batch_size": 2, "max_steps": STEPS}
    values = {"model": {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")}}
    values |= {"stages": {0: stage, 2: {**stage, "vision_tower_lr": 1e-3}}, "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def train(folder, output: str, *further: str) -> int:
    return main(["train", str(folder / "recipe.yaml"), f"output={folder / output}", *further])


def signalled(monkeypatch, stage: int, step: int, *numbers: int) -> None:
    """Has this process get signals in the middle of a step."""
    before_step = StageTrainer.before_step

    def before(self):
        before_step(self)
        if self.stage.number == stage and self.state.global_step == step - 1:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(StageTrainer, "before_step", before)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "stage-2" / "model.safetensors")


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGTERM], 130),  # as torchrun's processes get them
    ],
)
def test_a_run_that_is_stopped_in_a_step_goes_on_as_if_it_had_not_been(folder, numbers, code, monkeypatch, capfd):
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert train(folder, "undisturbed") == 0
    with monkeypatch.context() as patch:
        signalled(patch, 2, 3, *numbers)
        assert train(folder, "stopped") == code
    said = capfd.readouterr().err
    assert "Stopping after this step, with a checkpoint; a second signal stops at once." in said
    last = said.splitlines()[-1]
    assert last == "prefixvlm: stopped after step 3 of stage 2; the same command with --resume goes on from there."
    assert is_whole(folder / "stopped" / "stage-2.partial" / "checkpoint-3")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train(folder, "stopped", "--resume") == 0
    assert "Stage 2 resumes from" in capfd.readouterr().out
    found, expected = weights(folder / "stopped"), weights(folder / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_signal_in_the_last_step_lets_the_stage_be_finished(folder, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signalled(patch, 0, STEPS, signal.SIGINT)
        assert train(folder, "stopped") == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("prefixvlm: stopped after stage 0, which is finished; the same command with --resume")
    assert sorted(path.name for path in (folder / "stopped").glob("stage*")) == ["stage-0"]
    assert train(folder, "stopped", "--resume") == 0
    assert train(folder, "undisturbed") == 0
    found, expected = weights(folder / "stopped"), weights(folder / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_signal_stops_at_once(folder, monkeypatch, capfd):
    signalled(monkeypatch, 0, 2, signal.SIGINT, signal.SIGINT)
    assert train(folder, "stopped") == 130
    assert not list((folder / "stopped" / "stage-0.partial").glob("checkpoint-*"))
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "prefixvlm: stopped; the same command with --resume goes on from the last checkpoint."


def test_ctrl_c_outside_of_training_says_how_to_go_on(folder, monkeypatch, capfd):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixvlm.train.training.run.stage_samples", stop)
    assert train(folder, "stopped") == 130
    assert capfd.readouterr().err.splitlines()[-1] == (
        "prefixvlm: stopped; the same command with --resume goes on from there."
    )
