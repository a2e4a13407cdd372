"""Evaluation in the middle of training: its scores are logged, and training does not notice."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_model, tiny_processor
from transformers import TrainerControl

from prefixvlm.train.recipes.evaluation import EvaluationRecipe
from prefixvlm.train.recipes.schema import load_recipe, parse_recipe
from prefixvlm.train.training import evaluation_callback, run
from prefixvlm.train.training.evaluation_callback import EvaluateByGeneration
from prefixvlm.train.training.validation import stage_samples

EVALUATION = {"task": "easy_vqa", "every_steps": 2, "examples": 5, "max_new_tokens": 4, "batch_size": 3}


@pytest.fixture
def trained(tmp_path):
    """Runs stages 0 to 2 with dropout, the last one for five steps; gives its weights and its log."""

    def trained(evaluation):
        output = tmp_path / str(evaluation is not None)
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**SMALL, "output": str(output)}))
        recipe = load_recipe(str(path), ["logging_steps=1", "model.text.attention_dropout=0.2", "stages.2.max_steps=5"])
        recipe.stages = {2: recipe.stages[2]}
        recipe.stages[2].evaluation = evaluation
        folder = run.run_recipe(recipe)
        return load_file(folder / "model.safetensors"), json.loads((folder / "history.json").read_text())

    return trained


def test_training_logs_scores_and_leaves_the_same_weights(trained):
    plain, _ = trained(None)
    watched, history = trained(EvaluationRecipe(**EVALUATION))
    assert all(weight.equal(watched[name]) for name, weight in plain.items())
    scored = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    assert [entry["step"] for entry in scored] == [2, 4]
    assert [entry["eval_questions"] for entry in scored] == [5, 5]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5]


class Accelerator:
    process_index, num_processes, is_main_process = 0, 1, True

    def unwrap_model(self, model):
        return model


class Trainer:
    """As much of a trainer as evaluation sees."""

    is_sharded = False
    accelerator = Accelerator()
    processing_class = tiny_processor()

    def __init__(self):
        self.model = tiny_model().train()
        self.logged, self.left_out = [], 0.0

    def add_callback(self, callback):
        self.callback = callback

    def log(self, logs):
        self.logged.append(logs)

    def leave_out_of_throughput(self, seconds):
        self.left_out += seconds


class State:
    global_step, is_world_process_zero = 2, True


def attached(**changes):
    trainer = Trainer()
    EvaluateByGeneration(EvaluationRecipe(**EVALUATION | changes)).attach(trainer)
    return trainer


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_mode_gradients_and_random_numbers_stay(mode):
    trainer = attached()
    trainer.model.train(mode)
    before = torch.get_rng_state()
    trainer.callback.on_step_end(None, State, TrainerControl())
    assert trainer.model.training == mode
    assert torch.get_rng_state().equal(before)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_examples_are_the_same_each_time_and_spread_over_the_set():
    first, second = attached().callback.examples, attached().callback.examples
    assert [one.question.name for one in first] == [one.question.name for one in second]
    assert [one.question.turns for one in first] == [one.question.turns for one in second]
    assert len({one.question.name for one in first}) == 5


def test_the_same_weights_get_the_same_scores_again():
    trainer = attached()
    for _ in range(2):
        trainer.callback.on_step_end(None, State, TrainerControl())
    assert trainer.logged[0] == trainer.logged[1]
    assert trainer.logged[0]["eval_questions"] == 5


def test_other_steps_are_left_alone():
    trainer = attached(every_steps=3)
    trainer.callback.on_step_end(None, State, TrainerControl())
    assert trainer.logged == []


def test_its_time_does_not_count_as_training():
    trainer = attached()
    trainer.callback.on_step_end(None, State, TrainerControl())
    assert trainer.left_out > 0


def test_each_process_answers_its_share(monkeypatch):
    shares, trainer = [], attached()

    def said(model, processor, questions, indices, *rest, **options):
        shares.append(list(indices))
        yield [(index, "yes") for index in indices]

    monkeypatch.setattr(evaluation_callback, "answers", said)
    monkeypatch.setattr(evaluation_callback, "gather_object", lambda own: [(index, "yes") for index in range(5)])
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for process in range(2):
        monkeypatch.setattr(Accelerator, "process_index", process)
        trainer.callback.on_step_end(None, State, TrainerControl())
    assert shares == [[0, 2, 4], [1, 3]]
    assert trainer.logged[0] == trainer.logged[1]


def test_captions_are_scored_without_meteor(tmp_path, monkeypatch):
    asked = {}

    class Scored:
        scores = {"CIDEr": 1.5}

    def score(predictions, references, metrics):
        asked.update(predictions=predictions, references=references, metrics=metrics)
        return Scored

    rows = [{"image": f"{index}.png", "texts": [f"said {index}"]} for index in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for row in rows:
        Image.new("RGB", (16, 16), "red").save(tmp_path / row["image"])
    monkeypatch.setattr(evaluation_callback, "scorer", lambda kind: score)
    trainer = attached(task="captions", data=str(tmp_path / "rows.json"), examples=3)
    trainer.callback.on_step_end(None, State, TrainerControl())
    assert asked["references"] == [["said 0"], ["said 2"], ["said 4"]]
    assert len(asked["predictions"]) == 3
    assert "METEOR" not in asked["metrics"]
    assert trainer.logged == [{"eval_CIDEr": 1.5}]


def test_sharded_weights_are_refused():
    trainer = Trainer()
    trainer.is_sharded = True
    with pytest.raises(ValueError, match="needs whole weights in each process"):
        EvaluateByGeneration(EvaluationRecipe(**EVALUATION)).attach(trainer)


def recipe(number, evaluation):
    stage = {"data": {"source": "easy_vqa_captions", "split": "test"}, "evaluation": evaluation}
    return {"model": {"start": "somewhere"}, "stages": {number: stage}}


@pytest.mark.parametrize(
    ("number", "evaluation", "says"),
    [
        (0, EVALUATION, "a model that sees later tokens cannot generate; evaluate in stages 1 to 3"),
        (1, EVALUATION | {"every_steps": 0}, "every_steps is 0; it must be at least 1"),
        (1, EVALUATION | {"examples": -1}, "examples is -1; it must be at least 1"),
        (1, EVALUATION | {"every_step": 1}, "unknown key every_step"),
        (1, {"task": "easy_vqa"}, "every_steps is missing"),
        (1, EVALUATION | {"data": 7}, "data is 7"),
        (1, EVALUATION | {"num_beams": 0}, "num_beams is 0"),
        (1, EVALUATION | {"task": "easy_vqs"}, "did you mean 'easy_vqa'"),
        (1, EVALUATION | {"limit": 5}, "unknown key limit"),
        (1, 200, "must be a mapping"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(number, evaluation, says):
    with pytest.raises(ValueError, match=rf"my\.yaml: stages\.{number}\.evaluation") as caught:
        parse_recipe(recipe(number, evaluation), "my.yaml")
    assert says in str(caught.value)


def test_a_test_set_that_is_not_there_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_starting_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"gone\.json: there is no such file"):
        run.run_recipe(parse_recipe(recipe(1, EVALUATION | {"task": "vqa", "data": "gone.json"})))


def test_no_evaluation_decides_the_weights(tmp_path):
    plain, watched = (parse_recipe(recipe(1, evaluation)) for evaluation in (None, EVALUATION))
    samples, _ = stage_samples(plain.stages[1], seed=0)
    assert run._settings(plain, 1, samples, None, False) == run._settings(watched, 1, samples, None, False)
