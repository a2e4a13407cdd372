"""Generation on a fixed part of a test set every N steps of training: texts are scored, logits never gathered."""

import time

from accelerate.utils import gather_object
from transformers import TrainerCallback

from prefixvlm.train.evaluation.answering import answers
from prefixvlm.train.evaluation.predictions import scorer
from prefixvlm.train.evaluation.tasks import MAX_NEW_TOKENS, TASKS, load_examples, spread
from prefixvlm.train.recipes.evaluation import EvaluationRecipe
from prefixvlm.train.training.trainer import StageTrainer

IN_TRAINING = {"captions": ("Bleu_4", "CIDEr")}  # METEOR alone would start a Java process for seconds each time


class EvaluateByGeneration(TrainerCallback):
    """Logs `eval_...` scores, in [0, 1] but for CIDEr in [0, 10], every `every_steps` optimiser steps.

    The examples are the same each time and spread evenly over the set; each process answers its share. Training goes on as
    if nothing had happened: weights come out bit for bit the same.

    Args:
        recipe: what to evaluate on, and how often.

    Raises:
        ValueError: for data that cannot be used.
        ImportError: if what scores need is not installed.
    """

    trainer: StageTrainer  # from `attach` on

    def __init__(self, recipe: EvaluationRecipe):
        self.examples = spread(load_examples(recipe), recipe.examples)
        self.kind = TASKS[recipe.task].kind
        self.score = scorer(self.kind)
        self.every_steps = recipe.every_steps
        self.decoding = recipe.decoding(MAX_NEW_TOKENS[self.kind])

    def attach(self, trainer: StageTrainer) -> None:
        """Adds itself to a `StageTrainer`.

        Raises:
            ValueError: if the trainer's weights are sharded, so that no process can generate alone.
        """
        if trainer.is_sharded:
            raise ValueError("Evaluation in training needs whole weights in each process; leave it out with sharded ones.")
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            started, should_log = time.perf_counter(), control.should_log
            scores = self._scores()
            if state.is_world_process_zero:
                self.trainer.log({f"eval_{name}": value for name, value in scores.items()})
            control.should_log = should_log  # a log clears it, but the loss of this step waits
            self.trainer.leave_out_of_throughput(time.perf_counter() - started)

    def _scores(self) -> dict[str, float]:
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        mine = range(accelerator.process_index, len(self.examples), accelerator.num_processes)
        questions = [example.question for example in self.examples]
        was_training = model.training
        said: list[tuple[int, str]] = []
        for batch in answers(model, self.trainer.processing_class, questions, mine, self.decoding, show_progress=False):
            said += batch
        model.train(was_training)
        predictions = dict(gather_object(said))
        if not accelerator.is_main_process:
            return {}
        options = {"metrics": IN_TRAINING[self.kind]} if self.kind in IN_TRAINING else {}
        scored = self.score(
            [predictions[index] for index in range(len(self.examples))],
            [example.references for example in self.examples],
            **options,
        )
        return scored.scores
