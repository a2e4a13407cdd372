"""`python -m evidence.real`: the four stages on real photographs, evaluated, and the tables of docs/REAL.md made of it.

A job is an arm (how many image tokens) and a seed. Finished jobs are kept, and an unfinished one continues from its last
checkpoint. Everything is below build/real, where evidence/real/halves.py has put the two pretrained halves.
"""

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evidence.data import DESCRIBE
from evidence.real import report, scoring
from evidence.real import workspace as files
from evidence.real.workspace import ANSWERS, CAPTIONS, GIVEN, RECIPE
from prefixvlm.inference.environment import versions
from prefixvlm.train.evaluation.predictions import METRICS
from prefixvlm.train.training.run import RECORD, stage_folder

STAGES = range(4)
# by the number of image tokens, the changes to the recipe
ARMS = {
    "16": [],
    "64": ["model.config.pixel_shuffle=1"],
    "256": ["model.config.pixel_shuffle=1", "model.image_size=224"],
}
# by its name on the page: the stage whose model is asked for captions, and how
ASKED = {
    "stage 2, greedy": (2, []),
    "stage 2, 3 beams": (2, ["--num-beams", "3"]),
    "stage 2, greedy, weights of 8 bits": (2, ["--int8"]),
    "stage 3, greedy": (3, ["--prompt", DESCRIBE]),
    "stage 3, 3 beams": (3, ["--prompt", DESCRIBE, "--num-beams", "3"]),
}
DEFAULTS = {"seeds": 1, "arms": ["16"], "set": [], "limit": None}


@dataclass(frozen=True)
class Job:
    """One training run and its evaluation.

    Attributes:
        changes: to the recipe, beside those of the arm.
        limit: evaluate on so many examples alone; `None` for all.
    """

    arm: str
    seed: int
    changes: list[str]
    limit: int | None

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.seed}"

    @property
    def output(self) -> Path:
        return files.RUNS / self.name

    @property
    def settings(self) -> dict:
        """What decides the result; kept with it."""
        return {"recipe": RECIPE.read_text(encoding="utf-8"), "changes": self.changes, "limit": self.limit}

    def is_done(self) -> bool:
        """Whether its result is there.

        Raises:
            ValueError: if that is of another recipe.
        """
        return files.is_kept(self.name, self.settings)

    def run(self) -> None:
        """Trains, evaluates, and writes the result."""
        was_begun = self.output.exists()
        train = [
            "train",
            str(RECIPE),
            *ARMS[self.arm],
            *self.changes,
            f"seed={self.seed}",
            f"output={self.output}",
            "--resume",
        ]
        seconds, peak = files.prefixvlm(train, self.output / "train.log")
        result = {
            "is_resumed": was_begun,
            "train_seconds": seconds,
            "train_peak_gib": peak,
            "losses": {
                str(number): files.read_json(stage_folder(self.output, number) / "history.json") for number in STAGES
            },
            "steps": {
                str(number): files.read_json(stage_folder(self.output, number) / RECORD)["steps"] for number in STAGES
            },
        }
        started = time.perf_counter()
        result |= {"captions": self._captions(), "vqa_rad": self._vqa_rad()}
        result["evaluation_seconds"] = round(time.perf_counter() - started, 1)
        first = self.output / "captions" / next(iter(ASKED))
        result["examples"] = scoring.examples(files.said(first), self._rows(CAPTIONS))
        files.keep(self.name, self.settings, result)

    def _rows(self, name: str) -> list[dict]:
        return files.test_rows(name, self.limit)

    def _evaluate(self, stage: int, task: str, data: str, output: Path, how: list[str]) -> dict:
        """What metrics.json says, of the test split."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        command = ["evaluate", str(stage_folder(self.output, stage)), "--task", task, "--data", str(GIVEN / data)]
        files.prefixvlm([*command, *how, *limit, "--output", str(output)], output.with_suffix(".log"))
        return files.read_json(output / METRICS)

    def _captions(self) -> dict[str, dict]:
        found = {}
        for name, (stage, how) in ASKED.items():
            output = self.output / "captions" / name
            report = self._evaluate(stage, "captions", CAPTIONS, output, how)
            scores = report["scores"] | {"class_named": scoring.class_named(files.said(output), self._rows(CAPTIONS))}
            found[name] = {"scores": scores, "intervals": report["intervals"]}
        return found

    def _vqa_rad(self) -> dict[str, dict]:
        output = self.output / "vqa_rad"
        self._evaluate(max(STAGES), "vqa", ANSWERS, output, [])
        training = [row for row in files.lines(GIVEN / ANSWERS) if row["split"] == "train"]
        return scoring.by_answer_type(files.said(output), self._rows(ANSWERS), training)


def run(options: argparse.Namespace) -> None:
    """Runs the jobs that are not done, and fills in the page.

    Raises:
        ValueError: in one sentence, for what cannot be used or a command that fails.
    """
    report.check(options.report)  # before hours of work whose results could not be written
    files.prepare(options.data)
    jobs = [Job(arm, seed, options.set, options.limit) for arm in options.arms for seed in range(options.seeds)]
    waiting = [job for job in jobs if not job.is_done()]
    for job in waiting:
        job.run()
    results = {job.name: files.read_json(files.result_file(job.name)) for job in jobs}
    given = [name for name in ("seeds", "arms", "set", "limit") if getattr(options, name) != DEFAULTS[name]]
    values = {name: value if isinstance(value, list) else [value] for name, value in vars(options).items()}
    shown = " ".join(f"--{name} {' '.join(map(str, values[name]))}" for name in given)
    pairs = [(row, text) for row in files.test_rows(CAPTIONS, None) for text in row["texts"]]
    results["run"] = {
        "command": "make real REAL_DATA=folder" + (f' REAL_ARGS="{shown}"' if shown else ""),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "halves": {name: files.read_json(files.BUILD / name / "conversion.json") for name in files.HALVES},
        "people_class_named": scoring.class_named([text for _, text in pairs], [row for row, _ in pairs]),
    }
    report.write(results, options.report, GIVEN / "ucm_captions")
    print(f"Saved to {options.report}")


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m evidence.real", description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="folder with ucm_captions and vqa_rad")
    options.add_argument("--seeds", type=int, help="how many (default: 1)")
    options.add_argument("--arms", nargs="+", choices=ARMS, help="numbers of image tokens (default: 16)")
    options.add_argument("--set", nargs="+", metavar="key=value", help="changes to the recipe")
    options.add_argument("--limit", type=int, metavar="N", help="evaluate on N examples of each test set")
    options.add_argument("--report", type=Path, default=report.PAGE, help="page to fill in (default: docs/REAL.md)")
    options.set_defaults(**DEFAULTS)
    options = options.parse_args()
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"python -m evidence.real: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
