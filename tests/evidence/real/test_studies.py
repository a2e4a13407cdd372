"""`python -m evidence.real.studies`: arms differ by what they are named for, time that runs out is said, kept is kept."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from evidence import report
from evidence.data import write_lines
from evidence.real import claims, studies, workspace
from prefixvlm.train.recipes.schema import parse_recipe


def arm(name: str):
    return parse_recipe(studies.recipe_of(name, 0, Path("output")))


@pytest.fixture
def trained(given, commands, monkeypatch) -> list[list[str]]:
    """The commands of the jobs, with texts beside the data and a page to fill in."""
    folder = given / studies.TEXTS
    folder.mkdir()
    write_lines(folder / "writing_gpt-4.jsonl", [{"human": "A road.", "ai": "There is a road."}] * 3)
    captions = {"human": ["A road."], "machine": {"one": "a road", "two": "a house"}}
    write_lines(folder / "coco_captions_paired.jsonl", [captions] * 3)
    Path("EVIDENCE.md").write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(studies, "operations", lambda *given: 2e12)
    numbers = {"loss": 3.0, "loss_interval": [2.9, 3.1], "loss_per_character": 0.7, "loss_per_character_interval": [0, 1]}
    counts = {"rows": 3, "texts": 3, "tokens": 9, "file": "/somewhere"}
    pair = {"rows": 3, "difference": -0.5, "difference_interval": [-0.6, -0.4], "p_value": 0.001, "share_lower": 1.0}

    def compare(model: str, sets: list[str]) -> dict:
        names = [one.partition("=")[0] for one in sets]
        return {"sets": dict.fromkeys(names, numbers | counts), "pairs": [pair] * (len(names) - 1)}

    monkeypatch.setattr(studies, "compare", compare)
    return commands


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evidence.real.studies", *map(str, arguments), "--report", "EVIDENCE.md"])
    return studies.main()


def place(table: str, page: Path = Path("EVIDENCE.md")) -> str:
    return page.read_text().partition(f"<!-- table: {table} -->")[2].partition("<!-- /table -->")[0]


def test_every_arm_has_a_name_and_a_table():
    compared = [name for names in claims.COMPARED.values() for name in names]
    assert sorted([claims.PAPER, *compared]) == sorted(studies.ARMS) == sorted(claims.ARM_NAMES)


def test_masks_differ_after_stage_0_alone():
    paper, causal = arm("prefix"), arm("causal")
    assert [stage.stage.attention_mode for stage in paper.stages.values()] == ["bidirectional", *["prefix"] * 3]
    assert [stage.stage.attention_mode for stage in causal.stages.values()] == ["bidirectional", *["causal"] * 3]


def test_every_arm_has_the_steps_of_the_paper_in_all():
    whole = sum(studies.STEPS.values())
    for name in studies.ARMS:
        steps = sum(stage.max_steps for stage in arm(name).stages.values())
        assert steps == (studies.ONE_STAGE if name == "single-stage" else whole)


def test_the_single_stage_sees_the_data_of_all_in_their_shares():
    (stage,) = arm("single-stage").stages.values()
    weights = [part["weight"] for part in stage.data["parts"]]
    paper = arm("prefix").stages
    seen = {number: one.max_steps * one.stage.batch_size for number, one in paper.items()}
    assert weights == [seen[0] + seen[1] + seen[2], *[seen[3] / 2] * 2]
    assert stage.stage.learning_rates == paper[2].stage.learning_rates
    batches = ("group_by_length", "max_tokens_per_row", "device_batch_size")
    assert [getattr(stage, name) for name in batches] == [getattr(paper[2], name) for name in batches]
    assert stage.data["parts"][0]["path"] == str(workspace.GIVEN / workspace.CAPTIONS)


def test_noise_arms_differ_in_stage_0_alone():
    changed = {"noise-0": (0.0, "auto"), "noise-40": (0.4, "auto")}
    changed |= {"noise-mask": (0.2, "mask"), "noise-random": (0.2, "random"), "prefix": (0.2, "auto")}
    for name, expected in changed.items():
        first, *others = arm(name).stages.values()
        assert (first.stage.noise, first.stage.noise_token) == expected
        assert others == list(arm("prefix").stages.values())[1:]


def test_jobs_are_kept_and_the_page_is_filled(trained, monkeypatch):
    assert main(monkeypatch, "--data", "given", "--seeds", 2) == 0
    assert sum(command[0] == "train" for command in trained) == 2 * len(studies.ARMS)
    asked = [dict(pairwise(command)) for command in trained if command[0] == "evaluate"]
    assert len(asked) == 2 * (2 * len(studies.ARMS) - 1)  # the single stage has no stage 2
    trained.clear()
    assert main(monkeypatch, "--data", "given", "--seeds", 2) == 0
    assert not trained
    assert "| causal mask in stages 1 to 3 | 2 | 2 |" in place("real-masks")
    assert "writing_gpt-4 | 3 | 3.000 | 3.000 | -0.500 [-0.600, -0.400]" in place("real-texts")
    assert "coco, two" in place("real-texts")
    assert place("easy-vqa") == place("easy-vqa", report.PAGE)
    assert Path("evidence/real_text_loss.png").exists()
    assert "/somewhere" not in Path("evidence/real.json").read_text()


def test_what_does_not_fit_into_the_time_is_said(trained, monkeypatch, capsys):
    monkeypatch.setattr(studies.time, "perf_counter", iter(range(0, 10**6, 900)).__next__)  # each job takes 15 minutes
    assert main(monkeypatch, "--data", "given", "--seeds", 2, "--hours", 1.3) == 0
    assert sum(command[0] == "train" for command in trained) == 4
    assert "Not run, for want of time: noise-random/1" in capsys.readouterr().out
    assert "| one single stage | 0 | not run (2 seeds were asked for)" in place("real-stages")


def test_results_of_other_settings_are_refused(trained, monkeypatch, capsys):
    assert main(monkeypatch, "--data", "given", "--seeds", 2) == 0
    assert main(monkeypatch, "--data", "given", "--seeds", 2, "--limit", 1) == 1
    assert "is of another recipe or other settings; remove it and build/real/runs/studies/texts." in capsys.readouterr().err


def test_missing_texts_are_said_before_any_work(trained, monkeypatch, capsys):
    Path("given", studies.TEXTS, "coco_captions_paired.jsonl").unlink()
    assert main(monkeypatch, "--data", "given") == 1
    assert "given has no human_vs_machine_text/coco_captions_paired.jsonl" in capsys.readouterr().err
    assert not trained
