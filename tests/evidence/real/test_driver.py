"""`python -m evidence.real` runs what is not done, job by job, and refuses in a sentence what it cannot use."""

import sys
from pathlib import Path

import pytest

from evidence.real import __main__ as driver
from evidence.real import workspace
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.recipes.stages import PAPER_STAGES


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evidence.real", *map(str, arguments), "--report", "REAL.md"])
    return driver.main()


def test_finished_jobs_are_kept_and_the_page_is_filled(given, commands, monkeypatch):
    assert main(monkeypatch, "--data", given) == 0
    assert [command[0] for command in commands] == ["train"] + ["evaluate"] * 6
    commands.clear()
    assert main(monkeypatch, "--data", given, "--seeds", 2) == 0
    assert sum(command[0] == "train" for command in commands) == 1
    assert "seed=1" in commands[0]
    commands.clear()
    assert main(monkeypatch, "--data", given, "--seeds", 2) == 0
    assert not commands
    page = Path("REAL.md").read_text()
    assert '`make real REAL_DATA=folder REAL_ARGS="--seeds 2"`' in page
    assert str(given) not in page + Path("real/results.json").read_text()


def test_a_job_that_failed_is_tried_again_and_said_so(given, commands, monkeypatch, capsys):
    run = workspace.prefixvlm

    def fails(arguments, log):
        if "vqa" in arguments:
            raise ValueError("it broke")
        return run(arguments, log)

    monkeypatch.setattr(workspace, "prefixvlm", fails)
    assert main(monkeypatch, "--data", given) == 1
    assert capsys.readouterr().err == "python -m evidence.real: it broke\n"
    assert not workspace.RESULTS.exists()


def test_arms_differ_by_their_image_tokens(given, commands, monkeypatch):
    assert main(monkeypatch, "--data", given, "--arms", "16", "64", "256", "--set", "stages.2.max_steps=5") == 0
    trained = [command for command in commands if command[0] == "train"]
    assert all(set(driver.ARMS[arm]) <= set(command) for arm, command in zip(driver.ARMS, trained, strict=True))
    assert all("stages.2.max_steps=5" in command for command in trained)
    assert len({command[-2] for command in trained}) == 3  # outputs


def test_a_result_of_another_recipe_is_refused(given, commands, monkeypatch, capsys):
    assert main(monkeypatch, "--data", given) == 0
    assert main(monkeypatch, "--data", given, "--set", "bf16=false") == 1
    assert "is of another recipe or other settings; remove it and build/real/runs/16/0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("given/vqa_rad/qa.jsonl", "has no vqa_rad/qa.jsonl; docs/REAL.md says"),
        ("build/real/smollm2/conversion.json", "There is no build/real/smollm2; `make real` converts it"),
        ("REAL.md", "There is no page REAL.md"),
    ],
)
def test_what_is_missing_is_said_before_any_work(gone, message, given, commands, monkeypatch, capsys):
    Path(gone).unlink()
    if "smollm2" in gone:
        Path(gone).parent.rmdir()
    assert main(monkeypatch, "--data", given) == 1
    assert message in capsys.readouterr().err
    assert not commands


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`prefixvlm train` failed \(prefixvlm train: There is no recipe no-such"):
        workspace.prefixvlm(["train", "no-such"], tmp_path / "logs" / "train.log")


def test_a_command_is_measured(tmp_path):
    seconds, peak = workspace.prefixvlm(["train", "--help"], tmp_path / "train.log")
    assert 0 < seconds < 600
    assert 0.005 < peak < 8  # GiB


def test_masks_noise_and_what_trains_are_the_papers():
    recipe = load_recipe(str(workspace.RECIPE))
    assert list(recipe.stages) == list(PAPER_STAGES)
    for number, paper in PAPER_STAGES.items():
        stage = recipe.stages[number].stage
        for kept in ("attention_mode", "text_format", "noise", "trains"):
            assert getattr(stage, kept) == getattr(paper, kept)
    paths = [recipe.stages[number].data["path"] for number in (0, 1, 2)]
    paths += [part["path"] for part in recipe.stages[3].data["parts"]]
    captions, answers = (str(workspace.GIVEN / name) for name in (workspace.CAPTIONS, workspace.ANSWERS))
    assert paths == [captions] * 3 + [str(workspace.QUESTIONS), answers]
    for changes in driver.ARMS.values():
        load_recipe(str(workspace.RECIPE), changes)
