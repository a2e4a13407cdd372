"""A picture that cannot be decoded, found in the middle of training: a resumed run does with it what the first one did."""

import json

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.train.data.order import EpochSampler, OrderedSamples
from prefixvlm.train.training.trainer import StageTrainer

ROWS, FAILING_STEP, KILLED_STEP, SAVE_STEPS = 9, 4, 6, 3
SEED = 3  # of the order of stage 3 of a recipe with seed 0


@pytest.fixture
def folder(tmp_path):
    """Rows of which the one that is seen in `FAILING_STEP` has a picture that is cut off."""
    order = [index for _, index, _ in EpochSampler(OrderedSamples([None] * ROWS, list(range(ROWS)), None, SEED), 1, 1)]
    for index in range(ROWS):
        Image.effect_noise((40, 40), 20 + index).save(tmp_path / f"{index}.jpg")
    broken = tmp_path / f"{order[FAILING_STEP - 1]}.jpg"
    (tmp_path / "whole.jpg").write_bytes(broken.read_bytes())
    broken.write_bytes(broken.read_bytes()[:-200])
    rows = [{"image": f"{index}.jpg", "question": "which?", "answer": f"number {index}"} for index in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    stage = {"data": {"source": "vqa", "path": str(tmp_path / "rows.jsonl")}, "batch_size": 1, "vision_tower_lr": 1e-3}
    values = {"model": {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")}, "stages": {3: stage}}
    values |= {"max_skipped": 0.2, "save_steps": SAVE_STEPS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path, broken


def train(folder, output: str, *further: str) -> int:
    return main(["train", str(folder / "recipe.yaml"), f"output={folder / output}", *further])


def test_a_resumed_run_repeats_a_failure(folder, monkeypatch):
    folder, broken = folder
    assert train(folder, "undisturbed") == 0

    calls = []
    compute_loss = StageTrainer.compute_loss

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == KILLED_STEP:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", killed)
        assert train(folder, "resumed") == 130
    (line,) = (folder / "resumed" / "stage-3.partial" / "skipped.jsonl").read_text().splitlines()
    assert str(broken) in json.loads(line)["reason"]

    broken.write_bytes((folder / "whole.jpg").read_bytes())
    assert train(folder, "resumed", "--resume") == 0
    assert (folder / "resumed" / "stage-3" / "skipped.jsonl").read_text() == line + "\n"
    one, other = (load_file(folder / name / "stage-3" / "model.safetensors") for name in ("undisturbed", "resumed"))
    assert all((one[name] == other[name]).all() for name in one)

    assert train(folder, "repaired") == 0  # a run of its own sees the picture
    repaired = load_file(folder / "repaired" / "stage-3" / "model.safetensors")
    assert not all((one[name] == repaired[name]).all() for name in one)
