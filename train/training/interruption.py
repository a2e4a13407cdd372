"""Ctrl-C, and the SIGTERM of a scheduler, while a stage trains: the step is finished, and a checkpoint saved."""

import os
import signal
import threading
from types import FrameType

import torch
from transformers import TrainerCallback

NOTICE = b"Stopping after this step, with a checkpoint; a second signal stops at once.\n"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and everything that it has done is saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, said: str, number: int):
        super().__init__(said)
        self.signal = number


class Interruptions:
    """Keeps the first signal to stop until training can; as a context manager, it gives the handlers back at the end.

    Attributes:
        asked: the number of the signal that has come, or `None`.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # by which signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruptions":
        return self

    def listen(self) -> None:
        """From now on signals are kept; before, they end the program at once, as nothing would be lost."""
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(number, signal.signal(number, self._note))

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def end_if_asked(self, where: str) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.asked is not None:
            raise Interrupted(f"stopped {where}; the same command with --resume goes on from there.", self.asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked not in (None, number):
            return  # what starts several processes makes a SIGTERM of each Ctrl-C, which the terminal has sent them, too
        if self.asked is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one must not cut off the end
            raise Interrupted("stopped; the same command with --resume goes on from the last checkpoint.", number)
        self.asked = number
        os.write(2, NOTICE)  # a handler may run in the middle of a `print`


class SaveWhenInterrupted(TrainerCallback):
    """Saves a checkpoint and ends training once a signal has come. To be added after what seals checkpoints."""

    def __init__(self, interruptions: Interruptions, stage: int):
        self.interruptions, self.stage = interruptions, stage

    def on_train_begin(self, args, state, control, **kwargs):
        self.interruptions.listen()

    def on_step_end(self, args, state, control, **kwargs):
        # the last step is followed by the stage's own folder
        if self._is_asked(args, state) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.interruptions.end_if_asked(f"after step {state.global_step:,} of stage {self.stage}")

    def _is_asked(self, args, state) -> bool:
        """Of several processes, whether any was asked; they agree when they log, where they wait for each other anyway."""
        asked = self.interruptions.asked
        if args.world_size > 1:
            if state.global_step % args.logging_steps:
                return False
            highest = torch.tensor(asked or 0, device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            self.interruptions.asked = asked = int(highest) or None
        return asked is not None
