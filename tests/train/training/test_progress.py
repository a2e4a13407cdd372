"""What a person sees of training: a short line for each log, and nothing else."""

import json
import re

import pytest
import yaml
from small_recipe import SMALL
from transformers import TrainerControl, TrainerState

from prefixvlm.train.recipes.evaluation import EvaluationRecipe, ValidationRecipe
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training import progress, run
from prefixvlm.train.training.progress import ProgressLines, duration

TRAINED = {"loss": 2.34567, "learning_rate": 0.5, "learning_rate/projector": 0.0019, "learning_rate/language_model": 2e-5}


@pytest.fixture
def said(capsys, monkeypatch):
    """Gives the lines about these logs, each made ten seconds and ten steps after the one before."""

    def said(*logs, start=0, is_main=True):
        now = [0.0]
        monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
        state, lines = TrainerState(global_step=start, max_steps=1200, is_world_process_zero=is_main), ProgressLines()
        lines.on_train_begin(None, state, TrainerControl())
        for one in logs:
            now[0] += 10
            state.global_step += 10
            lines.on_log(None, state, TrainerControl(), logs=one)
        return capsys.readouterr().out.splitlines()

    return said


def test_a_line_has_step_loss_rate_speed_and_time_left(said):
    logs = {**TRAINED, "learning_rate": 0.0019, "tokens_per_second": 4210.4, "grad_norm": 3.0, "mfu": 0.4, "epoch": 0.1}
    assert said(logs) == ["step 10/1,200  loss 2.3457  rate 0.0019  4,210 tokens/s  20 minutes left"]


def test_the_time_left_counts_the_steps_of_this_run_alone(said):
    (line,) = said({**TRAINED, "tokens_per_second": 1.0}, start=1100)
    assert line.startswith("step 1,110/1,200")
    assert line.endswith("90 s left")


def test_an_evaluation_has_a_line_of_its_own(said):
    timing = {"eval_runtime": 1.0, "eval_samples_per_second": 2.0, "eval_steps_per_second": 2.0, "epoch": 1.0}
    lines = said({"eval_loss": 2.28124, **timing}, {"eval_CIDEr": 1.23456, "eval_Bleu_4": 0.5})
    assert lines == ["step 10/1,200  held-out loss 2.2812", "step 20/1,200  CIDEr 1.235  Bleu_4 0.5"]


def test_the_sum_of_a_run_has_none(said):
    assert said({"train_runtime": 3.0, "train_loss": 2.0, "total_flos": 0.0, "epoch": 1.0}) == []


def test_only_the_main_process_speaks(said):
    assert said(TRAINED, {"eval_loss": 1.0}, is_main=False) == []


def test_a_run_says_nothing_else_and_its_history_keeps_everything(tmp_path, capfd):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "out")}))
    recipe = load_recipe(str(path), ["logging_steps=1"])
    recipe.stages = {2: recipe.stages[2]}
    recipe.stages[2].validation = ValidationRecipe(share=0.01, every_steps=2, keep_best=False)
    recipe.stages[2].evaluation = EvaluationRecipe(task="easy_vqa", every_steps=2, examples=2, max_new_tokens=2)
    folder = run.run_recipe(recipe)
    about_stage, about_held_out, *lines = capfd.readouterr().out.splitlines()
    assert about_stage.startswith("Stage 2: ")
    assert about_held_out.startswith("Held out: ")
    trained = r"step {}/2  loss \d\.\d{{4}}  rate [\d.e-]+  [\d,]+ tokens/s  \d+ s left"
    expected = [trained.format(1), r"step 2/2  questions 2  .*", trained.format(2), r"step 2/2  held-out loss \d\.\d{4}"]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    history = json.loads((folder / "history.json").read_text())
    assert {"grad_norm/projector", "mfu", "peak_memory_gib", "real_token_share"} <= history[0].keys()
    assert any("eval_loss" in entry for entry in history)


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (119, "119 s"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
