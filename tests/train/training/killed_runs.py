"""Run by `test_resume.py`: kills training runs with SIGKILL at random moments, resumes them, and compares the weights.

    killed_runs.py FOLDER SEED KILLS RECIPE.yaml ...

Prints JSON, for each recipe and each kill of it: the checkpoints there were, and whether the resumed run ended with the
very weights of an undisturbed run. Forks, so that everything is imported only once.
"""

import functools
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - each run would import it for itself
import torch
from safetensors.torch import load_file

from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training import trainer
from prefixvlm.train.training.run import run_recipe

torch.set_num_threads(1)


def start(recipe_path: str, output: Path, resume: bool) -> int:
    """Runs the recipe in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    with open(f"{output}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            run_recipe(load_recipe(recipe_path, [f"output={output}"]), resume=resume)
        except BaseException as error:
            print(repr(error), file=log, flush=True)
            os._exit(1)
        log.flush()
    os._exit(0)


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status


def weights(output: Path) -> dict:
    return {
        f"{folder.name}/{name}": tensor
        for folder in sorted(output.glob("stage-?"))
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def killed(recipe_path: str, folder: Path, seed: int, kills: int) -> list[dict]:
    folder.mkdir()
    started = time.perf_counter()
    finish(start(recipe_path, folder / "whole", resume=False))
    duration = time.perf_counter() - started
    expected = weights(folder / "whole")
    draw, results = random.Random(seed), []
    for kill in range(kills):
        output = folder / f"killed-{kill}"
        child = start(recipe_path, output, resume=False)
        time.sleep(draw.uniform(0.1, 1.0) * duration)
        try:
            os.kill(child, signal.SIGKILL)
        finally:
            os.waitpid(child, 0)
        reached = [str(path.relative_to(output)) for path in sorted(output.glob("stage-*/checkpoint-*"))]
        finish(start(recipe_path, output, resume=True))
        found = weights(output)
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        results.append({"checkpoints": reached, "identical": same})
    return results


def main(folder: Path, seed: int, kills: int, *recipes: str) -> None:
    # what each run would measure for its log
    trainer.peak_rate = functools.cache(trainer.peak_rate)
    trainer.peak_rate(torch.device("cpu"), torch.float32)
    gc.freeze()  # else the collector of each run traverses everything that was imported, repeatedly
    print(json.dumps({path: killed(path, folder / Path(path).stem, seed, kills) for path in recipes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
