"""The tables of docs/REAL.md, from the results of all jobs; the prose around them is written by hand.

    python -m evidence.real.report

fills in the page's marked places again from docs/real/results.json. The loss curves and the photographs are only where
`make real` was run.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import markdown_table
from evidence import page
from evidence.statistics import mean
from prefixvlm.train.evaluation.figures import save_loss_curve

PAGE = Path(__file__).resolve().parents[2] / "docs" / "REAL.md"
FOLDER, LOSSES = "real", "losses.png"
SCORES = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
    "class_named": "class named, %",
}
TYPES = {"CLOSED": "closed", "OPEN": "open"}


class Results:
    """The results of all jobs by name (arm/seed), and under `run` how they came about."""

    def __init__(self, results: dict[str, dict]):
        self.run = results["run"]
        self.arms: dict[str, list[dict]] = {}  # in the order of seeds
        for name, result in results.items():
            if name != "run":
                self.arms.setdefault(name.partition("/")[0], []).append(result)

    @property
    def first(self) -> dict:
        """The first seed of the first arm, which stands for all where only one can be shown."""
        return next(iter(self.arms.values()))[0]


def write(results: dict[str, dict], file: Path, photographs: Path) -> None:
    """Fills in the page, and writes results.json, the loss curves and the photographs shown into `real/` beside it.

    Args:
        results: of all jobs by name, and under `run` how they came about.
        photographs: the folder that the examples' images lie in.

    Raises:
        ValueError: as `check`.
    """
    found = Results(results)
    fill(file, found)
    folder = file.parent / FOLDER
    folder.mkdir(exist_ok=True)
    kept = {name: {key: value for key, value in one.items() if key != "losses"} for name, one in results.items()}
    (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    save_loss_curve({f"stage {number}": losses for number, losses in found.first["losses"].items()}, folder / LOSSES)
    for example in found.first["examples"]:
        shutil.copyfile(photographs / example["image"], folder / Path(example["image"]).name)


def fill(file: Path, found: Results) -> None:
    """Puts every table into its place on the page.

    Raises:
        ValueError: as `check`.
    """
    page.fill(file, {name: table(found) for name, table in TABLES.items()})


def check(file: Path) -> None:
    """Raises a ValueError for a page without one place for each table, saying which."""
    page.check(file, TABLES)


def _run(found: Results) -> str:
    run = found.run
    halves = ", ".join(one["package"] for one in run["halves"].values())
    names = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    seeds = str(max(map(len, found.arms.values())))
    return markdown_table(
        ["command", "seeds", "machine", "versions", "halves"],
        [[f"`{run['command']}`", seeds, run["machine"], names, halves]],
    )


def _captions(found: Results) -> str:
    rows = []
    for arm, runs in found.arms.items():
        for asked in runs[0]["captions"]:
            scores = [run["captions"][asked] for run in runs]
            rows.append([arm, asked, *(_percent(scores, key) for key in SCORES)])
    people = f"{100 * found.run['people_class_named']:.1f}"
    rows.append(["", "people, each caption by itself", *[""] * (len(SCORES) - 1), people])
    return markdown_table(["image tokens", "captions of", *SCORES.values()], rows)


def _percent(scores: list[dict], key: str) -> str:
    """A score times 100: over seeds their mean with its interval; of one seed, that over photographs, if there is one."""
    values = [100 * one["scores"][key] for one in scores]
    if len(values) > 1:
        return _mean(values)
    if key not in scores[0]["intervals"]:
        return f"{values[0]:.1f}"
    low, high = scores[0]["intervals"][key]
    return f"{values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    average = mean(values)
    return f"{average.value:.1f} [{average.low:.1f}, {average.high:.1f}]"


def _answers(found: Results) -> str:
    rows = []
    for arm, runs in found.arms.items():
        for kind, name in TYPES.items():
            scores = [run["vqa_rad"][kind] for run in runs if kind in run["vqa_rad"]]
            if scores:
                right = _mean([100 * one["accuracy"] for one in scores])
                one = scores[0]
                rows.append(
                    [arm, name, str(one["questions"]), right, one["commonest"], f"{100 * one['commonest_accuracy']:.1f}"]
                )
    heads = ["image tokens", "questions", "how many", "right, %", "commonest answer", "right if always given, %"]
    return markdown_table(heads, rows)


def _costs(found: Results) -> str:
    rows = []
    for arm, runs in found.arms.items():
        # a run that was interrupted knows only what it took since
        whole = [run for run in runs if not run["is_resumed"]] or runs
        minutes = [np.mean([run[key] for run in whole]) / 60 for key in ("train_seconds", "evaluation_seconds")]
        note = "" if not whole[0]["is_resumed"] else " (since an interruption)"
        steps = ", ".join(f"{number}: {count}" for number, count in runs[0]["steps"].items())
        peak = max(run["train_peak_gib"] for run in whole)
        rows.append([arm, steps, f"{minutes[0]:.0f}{note}", f"{minutes[1]:.0f}", f"{peak:.1f}"])
    heads = ["image tokens", "steps of each stage", "minutes of training", "minutes of evaluation", "peak memory, GiB"]
    return markdown_table(heads, rows)


def _examples(found: Results) -> str:
    rows = [
        [
            f"![{one['class']}]({FOLDER}/{Path(one['image']).name})",
            _cell(one["said"]),
            _cell(one["reference"]),
            f"{100 * one['CIDEr']:.0f}",
            str(one["rank"]),
        ]
        for one in found.first["examples"]
    ]
    return markdown_table(["photograph", "the model", "one of five people", "CIDEr", "rank"], rows)


def _cell(text: str) -> str:
    """A text that ends no cell and is no code of Markdown's or HTML's."""
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"), ("*", "&#42;"), ("_", "&#95;")):
        text = text.replace(mark, written)
    return " ".join(text.split())


def _losses(found: Results) -> str:
    return f"![training losses of the four stages]({FOLDER}/{LOSSES})"


TABLES: dict[str, Callable[[Results], str]] = {
    "run": _run,
    "captions": _captions,
    "vqa-rad": _answers,
    "cost": _costs,
    "losses": _losses,
    "examples": _examples,
}

if __name__ == "__main__":
    fill(PAGE, Results(json.loads((PAGE.parent / FOLDER / "results.json").read_text(encoding="utf-8"))))
    print(f"Saved to {PAGE}")
