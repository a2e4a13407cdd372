"""What a person sees of training: one short line for each log. Everything that is logged is in history.json."""

import time

from transformers import TrainerCallback

from prefixvlm.train.training.validation import LOSS

EVALUATED = "eval_"  # what `Trainer` puts before the scores of an evaluation
UNTOLD = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class ProgressLines(TrainerCallback):
    """Prints loss, rate, speed and the time that is left, on the main process; alike to a terminal and to a file."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.perf_counter(), state.global_step  # not 0 in a run that is resumed

    def on_log(self, args, state, control, logs=None, **kwargs):
        told = _of_training(logs) if "learning_rate" in logs else _of_evaluation(logs)
        if "learning_rate" in logs and (done := state.global_step - self.first_step):
            each = (time.perf_counter() - self.started) / done
            told.append(f"{duration(each * (state.max_steps - state.global_step))} left")
        if told and state.is_world_process_zero:
            print("  ".join([f"step {state.global_step:,}/{state.max_steps:,}", *told]), flush=True)


def _of_training(logs: dict) -> list[str]:
    rates = [value for name, value in logs.items() if name.startswith("learning_rate")]
    speed = [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
    return [f"loss {logs['loss']:.4f}", f"rate {max(rates):.2g}", *speed]


def _of_evaluation(logs: dict) -> list[str]:
    scores = {name: value for name, value in logs.items() if name.startswith(EVALUATED) and name not in UNTOLD}
    loss = [f"held-out loss {scores.pop(LOSS):.4f}"] if LOSS in scores else []
    return loss + [f"{name.removeprefix(EVALUATED)} {value:.4g}" for name, value in scores.items()]


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:,.1f} hours"
