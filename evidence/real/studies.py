"""`python -m evidence.real.studies`: the paper's claims on the two pretrained halves, for docs/EVIDENCE.md.

An arm is evidence/real/recipe.yaml with fewer steps and what the arm is named for. Finished jobs are kept, an unfinished
one continues from its last checkpoint, and none is begun that would probably end after `--hours`: what is left out then is
said on the page.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from evidence import report
from evidence.data import DESCRIBE, lines, write_lines
from evidence.real import claims, scoring
from evidence.real import workspace as files
from evidence.real.workspace import ANSWERS, CAPTIONS, GIVEN, RECIPE
from evidence.studies import operations
from prefixvlm.inference.environment import versions
from prefixvlm.train.evaluation.predictions import METRICS
from prefixvlm.train.evaluation.tasks import spread
from prefixvlm.train.evaluation.text_loss import compare
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training.run import stage_folder

SEEDS, HOURS = 3, 8.0
STEPS = {0: 20, 1: 60, 2: 120, 3: 20}
ONE_STAGE = 147  # steps of a single stage that come to the same floating-point operations
TEXTS = "human_vs_machine_text"
COCO_ROWS = 300


def _one_stage(recipe: dict) -> None:
    """Everything trains from the start as in stage 2, on what the four stages see, in the same shares."""
    stages = recipe["stages"]
    *alignment, last = sorted(stages)
    samples = {number: stages[number]["max_steps"] * stages[number]["batch_size"] for number in stages}
    captions = stages[last - 1]["data"] | {"weight": sum(samples[number] for number in alignment)}
    talks = stages[last]["data"]["parts"]
    parts = [captions, *(part | {"weight": samples[last] / len(talks)} for part in talks)]
    changes = {"data": {"source": "mixture", "parts": parts}, "max_steps": ONE_STAGE}
    changes["projector_lr"] = PAPER_STAGES[last - 1].projector_lr  # which the recipe leaves to the stage's number
    recipe["stages"] = {last: stages[last - 1] | changes}


def _without_stage_0(recipe: dict) -> None:
    recipe["stages"][1]["max_steps"] += recipe["stages"].pop(0)["max_steps"]


def _causal(recipe: dict) -> None:
    for number, stage in recipe["stages"].items():
        if number:  # stage 0 is bidirectional in every arm
            stage["attention_mode"] = "causal"


def _stage_0(**changes) -> Callable[[dict], None]:
    return lambda recipe: recipe["stages"][0].update(changes)


# by its name in evidence.real.claims; what matters most first, since time may run out
ARMS: dict[str, Callable[[dict], None]] = {
    "prefix": lambda recipe: None,
    "causal": _causal,
    "single-stage": _one_stage,
    "without-stage-0": _without_stage_0,
    "noise-0": _stage_0(noise=0.0),
    "noise-40": _stage_0(noise=0.4),
    "noise-mask": _stage_0(noise_token="mask"),
    "noise-random": _stage_0(noise_token="random"),
}


def recipe_of(arm: str, seed: int, output: Path) -> dict:
    """The recipe of an arm, as values."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {"seed": seed, "output": str(output)}
    for number, steps in STEPS.items():
        recipe["stages"][number]["max_steps"] = steps
    ARMS[arm](recipe)
    return recipe


def train_and_ask(arm: str, seed: int, limit: int | None) -> dict:
    """Trains an arm; scores greedy captions of the test split, of the last model and of stage 2's where there is one."""
    output = files.RUNS / "studies" / arm / str(seed)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(arm, seed, output)), encoding="utf-8")
    _, peak = files.prefixvlm(["train", str(file), "--resume"], output / "train.log")
    recipe = load_recipe(str(file))
    last = max(recipe.stages)
    asked = {last: ["--prompt", DESCRIBE]} | ({2: []} if 2 in recipe.stages else {})
    return {
        "teraflops": operations(output, stage_folder(output, last), recipe) / 1e12,
        "peak_gib": peak,
        "scores": {f"stage {number}": _scores(output, number, how, limit) for number, how in asked.items()},
    }


def _scores(output: Path, stage: int, how: list[str], limit: int | None) -> dict[str, float]:
    folder = output / f"captions of stage {stage}"
    few = [] if limit is None else ["--limit", str(limit)]
    command = ["evaluate", str(stage_folder(output, stage)), "--task", "captions", "--data", str(GIVEN / CAPTIONS)]
    files.prefixvlm([*command, *how, *few, "--output", str(folder)], folder.with_suffix(".log"))
    scores = files.read_json(folder / METRICS)["scores"]
    named = scoring.class_named(files.said(folder), files.test_rows(CAPTIONS, limit))
    return {key: 100 * value for key, value in (scores | {"class_named": named}).items()}


def texts(limit: int | None) -> dict:
    """`prefixvlm text-loss` of the decoder on human and machine texts: GPT's, and the captions of nine captioners."""
    folder = files.BUILD / "data" / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for path in sorted((GIVEN / TEXTS).glob("*_gpt-*.jsonl")):
        rows = [{"human": row["human"], "machine": row["ai"]} for row in lines(path)]
        reports[path.stem] = _compared(folder / path.name, spread(rows, limit or len(rows)))
    rows = lines(GIVEN / TEXTS / "coco_captions_paired.jsonl")
    captions = [{"human": row["human"], **row["machine"]} for row in rows if all(row["machine"].values())]
    reports["coco"] = _compared(folder / "coco.jsonl", spread(captions, limit or COCO_ROWS))
    return {"reports": reports}


def _compared(file: Path, rows: list[dict]) -> dict:
    write_lines(file, rows)
    print(f"prefixvlm text-loss of {', '.join(rows[0])} in {file}", flush=True)
    report = compare(str(files.BUILD / files.HALVES[0]), [f"{writer}={file}:{writer}" for writer in rows[0]])
    kept = ("loss", "loss_interval", "loss_per_character", "loss_per_character_interval", "rows", "texts", "tokens")
    return {
        "sets": {writer: {key: one[key] for key in kept} for writer, one in report["sets"].items()},
        "pairs": report["pairs"],
    }


def jobs(seeds: int, limit: int | None) -> dict[str, Callable[[], dict]]:
    """The jobs by name, in the order in which they are run."""

    def job(arm: str, seed: int) -> Callable[[], dict]:
        return lambda: train_and_ask(arm, seed, limit)

    masks = ("prefix", "causal")
    order = [(arm, seed) for seed in range(seeds) for arm in masks]
    order += [(arm, seed) for arm in ARMS if arm not in masks for seed in range(seeds)]
    return {"texts": lambda: texts(limit)} | {f"{arm}/{seed}": job(arm, seed) for arm, seed in order}


def settings(limit: int | None) -> dict:
    """What decides the results; kept with each."""
    recipe = RECIPE.read_text(encoding="utf-8")
    return {"recipe": recipe, "steps": {str(key): value for key, value in STEPS.items()}, "limit": limit}


def run(options: argparse.Namespace) -> None:
    """Runs the jobs that are not done and fit into the time, and fills in the page.

    Raises:
        ValueError: in one sentence, for what cannot be used or a command that fails.
    """
    report.check(options.report)  # before hours of work whose results could not be written
    files.prepare(options.data, (CAPTIONS, ANSWERS, f"{TEXTS}/coco_captions_paired.jsonl"))
    shared = settings(options.limit)
    results: dict[str, dict] = {}
    for name, job in jobs(options.seeds, options.limit).items():
        kept = f"studies/{name}"
        if not files.is_kept(kept, shared):
            spent = [one["job_seconds"] for one in results.values()]
            if sum(spent) + max(spent, default=0) > 3600 * options.hours:
                print(f"Not run, for want of time: {name}", flush=True)
                continue
            started = time.perf_counter()
            found = job()
            files.keep(kept, shared, found | {"job_seconds": round(time.perf_counter() - started, 1)})
        results[name] = files.read_json(files.result_file(kept))
    results["run"] = {
        "command": "make evidence-real REAL_DATA=folder",
        "seeds": options.seeds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
    }
    claims.save(results, options.report.parent / report.FOLDER)
    report.fill_real(options.report, results)
    print(f"Saved to {options.report}")


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m evidence.real.studies", description=__doc__.splitlines()[0])
    needed = f"folder with ucm_captions, vqa_rad and {TEXTS}"
    options.add_argument("--data", type=Path, required=True, help=needed)
    options.add_argument("--seeds", type=int, default=SEEDS, help=f"of every arm (default: {SEEDS})")
    options.add_argument("--hours", type=float, default=HOURS, help=f"for all jobs together (default: {HOURS:g})")
    options.add_argument(
        "--limit", type=int, metavar="N", help="evaluate on N examples, and read N rows of each set of texts"
    )
    options.add_argument("--report", type=Path, default=report.PAGE, help="page to fill in (default: docs/EVIDENCE.md)")
    options = options.parse_args()
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"python -m evidence.real.studies: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
