"""The loss on held-out data in the middle of training: on which samples, when the best model is saved, and when to stop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.held_out import hold_out
from prefixvlm.train.data.order import OrderedSamples
from prefixvlm.train.data.screening import Report
from prefixvlm.train.data.sources import load
from prefixvlm.train.recipes.schema import StageRecipe
from prefixvlm.train.training.checkpoints import is_whole

LOSS = "eval_loss"  # as `Trainer` calls it


def stage_samples(stage_recipe: StageRecipe, seed: int) -> tuple[Any, Any]:
    """The samples that a stage trains on, and those that it is validated on; `None` if it is not.

    Raises:
        ValueError: for data that cannot be read, or of which a share cannot be held out.
    """
    validation = stage_recipe.validation
    samples = load(**stage_recipe.data)
    if validation is None:
        return samples, None
    if validation.data is not None:
        return samples, load(**validation.data)
    assert validation.share is not None  # the recipe has one of the two
    training, held_out = hold_out(samples, validation.share, seed)
    try:
        len(training)
    except ValueError as error:
        raise ValueError(f"stages.{stage_recipe.stage.number}.validation: {error}") from error
    return training, held_out


@dataclass
class Validation:
    """What `StageTrainer` measures the held-out loss on.

    Attributes:
        samples: each of which has the same randomness, and so the same noise, every time.
        collator: makes batches of them, without augmentation.
        report: of those that cannot be used.
    """

    samples: OrderedSamples
    collator: ConversationCollator
    report: Report

    def add_failure(self, seed: str, name: str, reason: str) -> None:
        """Reports a sample that turns out to be unusable, once: a padding sample replaces it from now on."""
        if seed not in self.samples.failed:
            self.samples.failed = {*self.samples.failed, seed}
            self.report.add(name, reason, occurrence=seed)


class Measure(TrainerCallback):
    """Has the loss measured also after the last step, which transformers 4 leaves out."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class KeepBest(TrainerCallback):
    """Saves a checkpoint of each model that is better than those before, beside those of every `save_steps` (0 for none).

    `Trainer` itself would have all checkpoints written at steps at which the loss is measured.
    """

    def __init__(self, save_steps: int):
        self.save_steps = save_steps

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step:  # of a run that is resumed, whose folder may have been moved
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if is_whole(checkpoint):
                state.best_model_checkpoint = str(checkpoint)
            else:
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.save_steps and state.global_step % self.save_steps == 0 and state.global_step < state.max_steps:
            control.should_save = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        is_best = state.best_metric is None or metrics[LOSS] < state.best_metric
        if is_best and state.global_step < state.max_steps:  # the stage's own folder follows the last step at once
            control.should_save = True


class EarlyStopping(EarlyStoppingCallback):
    """transformers', which also serves a stage that ends with its last model, and says that it stops.

    The step at which it stops is not saved: resumed from there, the run would go on.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_save = False
            if state.is_world_process_zero and state.global_step < state.max_steps:
                print(
                    f"Stopped early: the last {self.early_stopping_patience_counter} held-out losses were no smaller than "
                    f"{state.best_metric:.4f}.",
                    flush=True,
                )
