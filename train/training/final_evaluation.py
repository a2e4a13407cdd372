"""The evaluation at the end of a run: what the finished model says about a whole test set."""

import shutil
from pathlib import Path

from accelerate import PartialState

from prefixvlm.train.evaluation.evaluate import checked_examples, run_evaluation
from prefixvlm.train.evaluation.tasks import TASKS
from prefixvlm.train.recipes.evaluation import EvaluationRun
from prefixvlm.train.recipes.schema import Recipe

# of a data source, by the settings of an evaluation
OPTIONS = {"data": "path", "images": "images", "texts": "texts", "question": "question", "answer": "answer"}


def final_evaluation(recipe: Recipe, model: Path) -> EvaluationRun | None:
    """What a recipe's `test` asks of its finished model; `None` if it asks for nothing.

    Without `data` of its own it is the last stage's, as far as its rows are of the kind that the task reads. Karpathy's
    three published sets are known by the names of their files.

    Args:
        model: the folder of the last stage.

    Raises:
        ValueError, ImportError: for what could not be evaluated after hours of training.
    """
    if recipe.test is None:
        return None
    settings = recipe.test.model_dump()
    training = recipe.stages[max(recipe.stages)].data
    if settings["data"] is None and training["source"] == TASKS[recipe.test.task].source:
        settings |= {name: training.get(key) for name, key in OPTIONS.items() if settings[name] is None}
    if recipe.test.task == "karpathy" and settings["data"]:
        published = {f"dataset_{name}.json": name for name, task in TASKS.items() if task.column}
        settings["task"] = published.get(Path(settings["data"]).name, "karpathy")
    run = EvaluationRun(
        **settings,
        model=str(model),
        output=str(Path(recipe.output) / "test"),
        dtype=recipe.model.dtype,
        device=recipe.device,
    )
    checked_examples(run)
    return run


def evaluate_finished(run: EvaluationRun | None, is_new: bool) -> None:
    """Evaluates a finished model, and prints its scores.

    Args:
        run: from `final_evaluation`.
        is_new: what is in the folder belongs to an earlier model.
    """
    if run is None:
        return
    state = PartialState()
    if is_new and state.is_main_process:
        shutil.rmtree(run.output, ignore_errors=True)
    state.wait_for_everyone()
    run_evaluation(run)
