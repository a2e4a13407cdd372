"""Keeps from the command line's output what libraries say and nobody can act on.

Only the command line calls this, as a program: who imports the package hears everything.
"""

import logging
import os
import re
import warnings

# the beginning of each message, and why nobody can act on it
UNTOLD = (
    "Using a slow image processor",  # transformers 4: it is the one that the model is trained and saved with
    "The tokenizer has new PAD/BOS/EOS tokens",  # `Trainer` aligns the model's configuration, which is right
    "mtime may not be reliable",  # `Trainer`, where checkpoints are less than a second apart
    "`gradient_checkpointing_enable` is deprecated",  # transformers 5, which knows a name that 4.x does not
    "`is_gradient_checkpointing` is deprecated",  # the same, to peft
)
LOGGERS = (
    "transformers.models.auto.image_processing_auto",
    "transformers.processing_utils",
    "transformers.trainer",
    "transformers.trainer_utils",
)
BAR_DELAY = "2"  # seconds


def leave_out_noise() -> None:
    """Leaves out `UNTOLD`, and progress bars of what takes no time; to be called before libraries are imported."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_told)
    for beginning in UNTOLD:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    os.environ.setdefault("TQDM_DELAY", BAR_DELAY)


def _is_told(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNTOLD)
