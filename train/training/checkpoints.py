"""Folders that are complete or absent, and checkpoints that can be verified as complete, so that a run killed at any
moment can be resumed.

A checkpoint is complete once it has `complete.json`, written last, and every file has the size recorded there.
"""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.environment import choose_device

MANIFEST = "complete.json"
# what a checkpoint has beside the model or the adapter, to go on training: of `Trainer`, of FSDP, of DeepSpeed
TO_RESUME = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin", MANIFEST),
    *("pytorch_model_fsdp*", "global_step*", "latest", "zero_to_fp32.py"),
)


def processes(device: str | None = None) -> PartialState:
    """The processes of the run; the first call decides by `device`, as for `choose_device`, what they run on."""
    return PartialState(cpu=choose_device(device).type == "cpu")


def partial_folder(folder: Path) -> Path:
    """Where a folder is until it is complete."""
    return folder.with_name(folder.name + ".partial")


@contextmanager
def complete_or_absent(folder: Path, keep: bool = False):
    """A folder to write into that takes the name `folder` at the end, replacing what was there; on an error it does not.

    Of several processes, the main one creates and renames it while the others wait. With `keep`, what an earlier attempt
    left is kept.
    """
    partial = partial_folder(folder)
    if processes().is_main_process:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    processes().wait_for_everyone()
    yield partial
    processes().wait_for_everyone()
    if processes().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    processes().wait_for_everyone()


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
        noted = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return noted == _sizes(checkpoint)


def newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; says on stderr which newer ones are broken."""
    for checkpoint in _checkpoints(folder):
        if is_whole(checkpoint):
            return checkpoint
        if processes().is_main_process:
            print(f"{checkpoint} is incomplete or damaged; trying the one before.", file=sys.stderr)
    return None


def keep_models(folder: Path) -> None:
    """Reduces the checkpoints in the folder of a finished stage to models, which have a fraction of the size."""
    for checkpoint in _checkpoints(folder):
        for pattern in TO_RESUME:
            for path in checkpoint.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copies the model, or the adapter, of a checkpoint into a folder."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*TO_RESUME), dirs_exist_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}
