"""Validation in a stage: the held-out loss is right and disturbs nothing, the best model is kept, training stops early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.inference.loading import load
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.sources import load as load_samples
from prefixvlm.train.recipes.schema import load_recipe, parse_recipe
from prefixvlm.train.training import run
from prefixvlm.train.training.trainer import StageTrainer

PICTURES = 12
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of two texts each to train on, `rows.jsonl`, and of one, `held_out.jsonl`; a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(PICTURES):
        Image.effect_noise((16, 16), 80).convert("RGB").save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "texts": [f"number {index} " * (1 + index % 4), "no"]} for index in range(PICTURES)]
    held_out = [{"image": f"{index}.png", "texts": "so " * (1 + index)} for index in range(5)]
    for name, written in (("rows", rows), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def recipe(data, tmp_path):
    """Makes a recipe of stages 0 and 2 with this validation, whose data are `held_out.jsonl` if it names none."""

    def recipe(validation, output="out", stages=(2,), top=None, dropout=0.2, **stage):
        if validation is not None and not {"data", "share"} & validation.keys():
            validation = {"data": {"source": "captions", "path": str(data / "held_out.jsonl")}, **validation}
        source = {"source": "captions", "path": str(data / "rows.jsonl")}
        rates = {"vision_tower_lr": 1e-3, "language_model_lr": 1e-3}
        values = {
            "model": {**SMALL["model"], "tokenizer": str(data / "tokenizer")},
            "stages": {
                number: {
                    "data": source,
                    "augment": True,
                    "batch_size": 4,
                    "device_batch_size": 2,
                    "max_steps": STEPS,
                    **(rates if number else {}),
                    "validation": validation,
                    **stage,
                }
                for number in stages
            },
            "output": str(tmp_path / output),
            "logging_steps": 1,
            **(top or {}),
        }
        # wide enough that the losses of tokens differ
        values["model"]["text"] = {**values["model"]["text"], "attention_dropout": dropout, "initializer_range": 0.3}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_recipe(str(path))

    return recipe


@pytest.fixture
def losses(monkeypatch):
    """Lets a test say which held-out loss is found at which step."""
    said: dict[int, float] = {}
    measure = StageTrainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        output = measure(self, *args, **kwargs)
        output.metrics["eval_loss"] = said[self.state.global_step]
        return output

    monkeypatch.setattr(StageTrainer, "evaluation_loop", evaluation_loop)
    return said


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "history.json").read_text())


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(weight.equal(other[name]) for name, weight in one.items())


@pytest.mark.parametrize("stage", [0, 2])
def test_training_does_not_notice(recipe, stage):
    plain = run.run_recipe(recipe(None, "plain", (stage,)))
    watched = run.run_recipe(recipe({"every_steps": 4, "keep_best": False}, "watched", (stage,)))
    assert same(weights(plain), weights(watched))
    assert [entry["step"] for entry in history(watched) if "eval_loss" in entry] == [4, STEPS]
    trained = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (plain, watched)]
    assert trained[0] == trained[1]


def test_the_loss_is_the_mean_over_all_supervised_tokens_however_they_are_batched(recipe, data):
    found = []
    kinds = [{}, {"device_batch_size": 1}, {"device_batch_size": 4}, {"max_tokens_per_row": 64}]
    for number, kind in enumerate(kinds):
        settings = {"every_steps": 1, "keep_best": False}
        folder = run.run_recipe(recipe(settings, f"out{number}", dropout=0.0, max_steps=1, **kind))
        found += [entry["eval_loss"] for entry in history(folder) if "eval_loss" in entry]
        if not kind:
            model, processor = load(str(folder))
    samples = load_samples("captions", path=str(data / "held_out.jsonl"))
    with torch.no_grad():
        each = [
            model(**ConversationCollator(processor, "caption")([sample])).token_losses
            for sample in (samples[index] for index in range(len(samples)))
        ]
    assert len({len(losses) for losses in each}) == len(each)
    assert found[0] == pytest.approx(torch.cat(each).mean().item(), rel=1e-5)
    assert found == pytest.approx([found[0]] * len(kinds), rel=1e-5)
    assert found[0] != pytest.approx(sum(losses.mean().item() for losses in each) / len(each), rel=1e-5)


def test_the_same_weights_have_the_same_loss_again_with_noise_and_without_augmentation(recipe, monkeypatch):
    found = []
    evaluate = StageTrainer.evaluate

    def twice(self, *args, **kwargs):
        found.append([evaluate(self, *args, **kwargs)["eval_loss"] for _ in range(2)])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "evaluate", twice)
    run.run_recipe(recipe({"every_steps": 3, "keep_best": False}, stages=(0,)))
    assert all(first == second for first, second in found)
    assert found[0] != found[1]


def test_the_best_model_is_the_result_and_the_next_stage_starts_from_it(recipe, losses, monkeypatch, capsys):
    starts, train = [], StageTrainer.train

    def noted(self, *args, **kwargs):
        starts.append({name: weight.clone() for name, weight in self.model.state_dict().items() if "projector" in name})
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", noted)
    losses |= {2: 3.0, 4: 2.0, 6: 2.5}
    run.run_recipe(recipe({"every_steps": 2}, stages=(0, 2)))
    first = run.stage_folder(Path(recipe(None).output), 0)
    best = weights(first / "checkpoint-4")
    assert same(weights(first), best)
    assert not same(best, weights(first / "checkpoint-2"))
    assert all(weight.equal(best[name]) for name, weight in starts[1].items())
    assert record(first)["steps"] == STEPS
    assert record(first)["validation"] == {"read": 5, "used": 5, "skipped": 0, "best_step": 4, "best_loss": 2.0}
    assert "Stage 0 ends with step 4, whose held-out loss of 2.0000 is the smallest." in capsys.readouterr().out


def test_the_last_model_may_be_the_best(recipe, losses):
    losses |= {4: 3.0, 6: 2.0}
    folder = run.run_recipe(recipe({"every_steps": 4}))
    plain = run.run_recipe(recipe(None, "plain"))
    assert same(weights(folder), weights(plain))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_adapters_end_with_the_best_too(recipe, losses):
    losses |= {2: 3.0, 4: 2.0, 6: 2.5}
    adapters = {"lora": {"r": 2, "dropout": 0.1}}
    folder = run.run_recipe(recipe({"every_steps": 2}, top=adapters, vision_tower_lr=0.0))
    ended, best, other = (
        load_file(path / "adapter_model.safetensors")
        for path in (folder / "adapter", *map(folder.joinpath, ("checkpoint-4", "checkpoint-2")))
    )
    assert same(ended, best)
    assert not same(ended, other)


def test_the_best_stays_beside_the_newest_checkpoints(recipe, losses):
    losses |= {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.5, 5: 2.5, 6: 2.5}
    folder = run.run_recipe(recipe({"every_steps": 1}, top={"save_steps": 1, "keep_checkpoints": 2}))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert same(weights(folder), weights(folder / "checkpoint-2"))


@pytest.mark.parametrize("keep_best", [True, False])
def test_it_stops_when_the_loss_no_longer_falls(recipe, losses, capsys, keep_best):
    losses |= {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0}
    folder = run.run_recipe(recipe({"every_steps": 1, "patience": 2, "keep_best": keep_best}, top={"save_steps": 2}))
    assert record(folder)["steps"] == 4
    assert "Stopped early: the last 2 held-out losses were no smaller than 2.0000." in capsys.readouterr().out
    assert same(weights(folder), weights(folder / "checkpoint-2")) == keep_best
    assert [entry["eval_loss"] for entry in history(folder) if "eval_loss" in entry] == [3.0, 2.0, 2.5, 2.0]


class Stop(Exception):  # noqa: N818 - what a power cut is to a process
    pass


def stop(*args, **kwargs):
    raise Stop


SETTINGS = {"every_steps": 1, "patience": 3}
SAVED = {"save_steps": 1, "keep_checkpoints": 2}


@pytest.fixture
def interrupted(recipe, losses, monkeypatch):
    """A run with its best in step 2 that stops after step 5, undisturbed; and one that ended at a moment like this."""
    losses |= {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.4, 5: 2.3, 6: 1.0}
    whole = run.run_recipe(recipe(SETTINGS, "whole", top=SAVED))

    def interrupted(moment: str):
        with monkeypatch.context() as patch:
            if moment == "in the middle":
                before = StageTrainer.before_step
                patch.setattr(
                    StageTrainer, "before_step", lambda self: stop() if self.state.global_step == 4 else before(self)
                )
            else:
                patch.setattr(run, "_save", stop)
            with pytest.raises(Stop):
                run.run_recipe(recipe(SETTINGS, "out", top=SAVED))
        return Path(recipe(None).output)

    assert record(whole)["steps"] == 5
    return whole, interrupted


@pytest.mark.parametrize("moment", ["in the middle", "after it has stopped early"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_a_resumed_run_knows_the_best_and_the_patience_that_is_left(recipe, interrupted, moment, is_moved):
    whole, interrupt = interrupted
    output = interrupt(moment)
    if is_moved:
        output = output.rename(output.with_name("moved"))
    folder = run.run_recipe(recipe(SETTINGS, output.name, top=SAVED), resume=True)
    assert same(weights(folder), weights(whole))
    assert same(weights(folder), weights(whole / "checkpoint-2"))
    assert record(folder)["steps"] == record(whole)["steps"]
    assert record(folder)["validation"] == record(whole)["validation"]
    found = [
        [(entry["step"], entry["eval_loss"]) for entry in history(one) if "eval_loss" in entry] for one in (folder, whole)
    ]
    assert found[0] == found[1]


def test_without_its_checkpoint_the_best_is_sought_anew(recipe, interrupted, losses):
    _, interrupt = interrupted
    output = interrupt("in the middle")
    shutil.rmtree(output / "stage-2.partial" / "checkpoint-2")
    losses |= {5: 2.45, 6: 2.46}
    folder = run.run_recipe(recipe(SETTINGS, top=SAVED), resume=True)
    assert record(folder)["validation"]["best_step"] == 5


@pytest.mark.parametrize(
    ("change", "name"),
    [({"patience": 4}, "validation"), ({"share": 0.2, "every_steps": 1}, "data_fingerprint, validation")],
)
def test_another_validation_is_another_run(recipe, interrupted, change, name):
    interrupted[1]("in the middle")
    settings = {**SETTINGS, **change} if "share" not in change else change
    with pytest.raises(ValueError, match=f"belongs to a run with other settings of {name}"):
        run.run_recipe(recipe(settings, top=SAVED), resume=True)


def test_rows_that_cannot_be_used_are_reported_once_and_are_not_fatal(recipe, data, tmp_path, capsys):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    whole = (data / "0.png").read_bytes()
    for name, content in (("whole", whole), ("broken", b"no picture"), ("truncated", whole[:200])):
        (held_out / f"{name}.png").write_bytes(content)
    rows = "".join(json.dumps({"image": f"{name}.png", "texts": "so"}) + "\n" for name in ("whole", "broken", "truncated"))
    (held_out / "rows.jsonl").write_text(rows)
    source = {"source": "captions", "path": str(held_out / "rows.jsonl")}
    folder = run.run_recipe(recipe({"data": source, "every_steps": 2}))
    reported = [json.loads(line) for line in (folder / "validation_skipped.jsonl").read_text().splitlines()]
    assert [next(name for name in ("broken", "truncated") if name in line["reason"]) for line in reported] == [
        "broken",
        "truncated",
    ]
    counts = record(folder)["validation"]
    assert (counts["read"], counts["used"], counts["skipped"]) == (3, 1, 2)
    assert record(folder)["samples"]["skipped"] == 0
    assert "Held out: 2 samples (1 cannot be used, see validation_skipped.jsonl)" in capsys.readouterr().out


def test_a_share_is_not_trained_on(recipe, monkeypatch):
    seen: dict[bool, set] = {True: set(), False: set()}
    loss = StageTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        for picture in inputs["pixel_values"]:
            seen[model.training].add(picture.sort().values.sum().item())
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)
    folder = run.run_recipe(recipe({"share": 0.25, "every_steps": STEPS}, augment=False, max_steps=12))
    assert len(seen[False]) == PICTURES // 4
    assert len(seen[True]) == PICTURES - PICTURES // 4
    assert not seen[True] & seen[False]
    assert record(folder)["samples"]["read"] + record(folder)["validation"]["read"] == 2 * PICTURES


def test_as_many_examples_as_asked_for_are_measured(recipe):
    folder = run.run_recipe(recipe({"every_steps": STEPS, "examples": 2}))
    assert record(folder)["validation"]["used"] == 2


def test_a_stream_is_validated_on_data_of_its_own(recipe, data):
    source = {"source": "captions", "path": str(data / "rows.jsonl"), "streaming": True}
    folder = run.run_recipe(recipe({"every_steps": 4, "keep_best": False}, "streamed", data=source, max_tokens_per_row=64))
    plain = run.run_recipe(recipe(None, "plain", data=source, max_tokens_per_row=64))
    assert same(weights(folder), weights(plain))
    assert [entry["step"] for entry in history(folder) if "eval_loss" in entry] == [4, STEPS]


STREAM = {"source": "llava", "path": "x", "streaming": True}


@pytest.mark.parametrize(
    ("validation", "stage", "says"),
    [
        ({"every_steps": 1}, {}, "needs `data` of its own or a `share`"),
        ({"every_steps": 1, "share": 0.1, "data": {"source": "llava"}}, {}, "needs `data` of its own or a `share`"),
        ({"share": 0.1}, {}, "every_steps is missing"),
        ({"share": 0.1, "every_steps": 0}, {}, "every_steps is 0; it must be at least 1"),
        ({"share": 0, "every_steps": 1}, {}, "share is 0; it must be greater than 0"),
        ({"share": 1, "every_steps": 1}, {}, "share is 1; it must be less than 1"),
        ({"share": 0.1, "every_steps": 1, "patience": 0}, {}, "patience is 0; it must be at least 1"),
        ({"share": 0.1, "every_steps": 1, "patiense": 1}, {}, "did you mean 'patience'?"),
        ({"data": {"split": "x"}, "every_steps": 1}, {}, "data needs a `source`"),
        ({"share": 0.1, "every_steps": 1}, {"data": STREAM, "max_steps": 9}, "no share of a stream can be held out"),
        (
            {"share": 0.1, "every_steps": 1},
            {"data": {"source": "mixture", "parts": [STREAM]}, "max_steps": 9},
            "no share of a stream can be held out",
        ),
        ({"data": STREAM, "every_steps": 1}, {}, "validation.data is read as a whole each time; leave out streaming"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(validation, stage, says):
    stage = {"data": {"source": "easy_vqa_captions", "split": "test"}, "validation": validation, **stage}
    with pytest.raises(ValueError, match=r"my\.yaml: stages\.2") as caught:
        parse_recipe({"model": {"start": "somewhere"}, "stages": {2: stage}}, "my.yaml")
    assert says in str(caught.value)


def test_a_dry_run_says_what_is_held_out(recipe, tmp_path, capsys):
    recipe({"share": 0.25, "every_steps": 4, "patience": 3})
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rows        18 " in out
    expected = "6 rows held out, measured every 4 steps; the best checkpoint is kept; ends after 3 without a better one"
    assert f"validation  {expected}" in out


def test_a_path_that_leads_nowhere_is_named_before_anything_is_read(recipe, tmp_path, capsys):
    recipe({"data": {"source": "captions", "path": "./gone.jsonl"}, "every_steps": 4})
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "stages.2.validation.data.path is ./gone.jsonl: there is no such file" in capsys.readouterr().err
