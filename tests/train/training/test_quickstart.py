"""The quickstart with the training cut short: everything it promises is there and true."""

import json

import pytest

from prefixvlm.cli import main
from prefixvlm.inference.loading import load
from prefixvlm.train.data import easy_vqa
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation.answering import answer
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training import quickstart as module


def test_a_finished_quickstart_is_not_replaced_without_asking(tmp_path, monkeypatch, capsys):
    (tmp_path / "stage-0").mkdir()
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"prefixvlm quickstart: {tmp_path / 'stage-0'} is there already;")
    assert "--overwrite" in said
    assert "--resume" in said

    def stop(recipe, **options):
        raise ValueError(str(options))

    monkeypatch.setattr(module.run, "run_recipe", stop)
    assert main(["quickstart", "--output", str(tmp_path), "--overwrite"]) == 2
    assert "{'resume': False, 'overwrite': True}" in capsys.readouterr().err
    assert main(["quickstart", "--output", str(tmp_path), "--resume"]) == 2
    assert "{'resume': True, 'overwrite': False}" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_leaves_what_it_promises_and_counts_right(tmp_path, monkeypatch, capsys):
    whole = easy_vqa.questions_by_image
    monkeypatch.setattr(easy_vqa, "questions_by_image", lambda split: dict(list(whole(split).items())[:40]))
    overrides = [f"stages.{number}.max_steps={steps}" for number, steps in enumerate((2, 2, 60, 60))]
    recipe = load_recipe("quickstart", overrides)
    recipe.output = str(tmp_path)
    metrics = module.quickstart(recipe)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    for name in ("loss.png", "masks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    model, processor = load(str(tmp_path / "final"))
    right = {"shape": 0, "color": 0, "yes_no": 0}
    asked = dict.fromkeys(right, 0)
    for image, pairs in easy_vqa.questions_by_image("test").items():
        for question, truth in pairs:
            kind = "shape" if truth in easy_vqa.SHAPES else "color" if truth in easy_vqa.COLORS else "yes_no"
            asked[kind] += 1
            right[kind] += answer(model, processor, [Conversation.about([str(image)], [("user", question)])]) == [truth]
    assert metrics["questions"] == sum(asked.values())
    assert metrics["accuracy"] == pytest.approx(sum(right.values()) / sum(asked.values()), abs=0.01)
    assert metrics["accuracy"] > 0.2  # a broken chat format or loss would leave next to nothing

    printed = capsys.readouterr().out
    assert "A fresh process without prefixvlm" in printed
    assert printed.count("(truth: ") == module.SHOWN_QUESTIONS
