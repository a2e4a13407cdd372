"""Checkpoints that can be verified as complete, so that a run killed at any moment can be resumed.

A checkpoint is complete once it has `complete.json`, written last, and every file has the size recorded there.
"""

import json
import re
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from prefixvlm.configuration.writing import write_atomically

MANIFEST = "complete.json"


class SealCheckpoints(TrainerCallback):
    """Writes the manifest of every checkpoint once all processes have written their part."""

    def on_step_end(self, args, state, control, **kwargs):
        # the stage's own folder follows at once; and from a checkpoint of the last step `Trainer` would train one more
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def seal(checkpoint: Path) -> None:
    """Records the size of every file of a checkpoint."""
    write_atomically(checkpoint / MANIFEST, json.dumps(_sizes(checkpoint), indent=1))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely and has not been truncated since."""
    try:
        noted = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return noted == _sizes(checkpoint)


def newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; says on stderr which newer ones are broken."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        print(f"{checkpoint} is incomplete or damaged; trying the one before.", file=sys.stderr)
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}
