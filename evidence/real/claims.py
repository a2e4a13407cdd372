"""The tables of docs/EVIDENCE.md that say what the pretrained halves say of the paper's claims.

A score is that of greedy captions of the UCM test split; arms are compared with the four stages under the prefix mask, seed
by seed.
"""

import json
from pathlib import Path

from benchmarks.report import markdown_table
from evidence.figures import text_points
from evidence.statistics import difference, mean

RESULTS, FIGURE = "real.json", "real_text_loss.png"
PAPER = "prefix"  # the arm that all others are compared with
ARM_NAMES = {
    PAPER: "four stages, prefix mask, 20% noise (padding token)",
    "causal": "causal mask in stages 1 to 3",
    "single-stage": "one single stage",
    "without-stage-0": "without stage 0",
    "noise-0": "no noise in stage 0",
    "noise-40": "40% noise",
    "noise-mask": "noise is an added mask token",
    "noise-random": "noise is random words",
}
# by the table's name, the arms in it beside the paper's
COMPARED = {
    "real-masks": ("causal",),
    "real-stages": ("single-stage", "without-stage-0"),
    "real-noise": ("noise-0", "noise-40", "noise-mask", "noise-random"),
}
TABLES = ("real-run", *COMPARED, "real-texts")
VERDICTS = ("the paper's is better here", "the paper's is worse here")
SCORES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "class_named": "class named, %"}


def bodies(results: dict[str, dict]) -> dict[str, str]:
    """What belongs into each table's place.

    Args:
        results: of the jobs that were run by name (arm/seed, and texts), and under `run` how they came about.
    """
    tables = {name: _arms(results, arms) for name, arms in COMPARED.items()}
    return {"real-run": _run(results), **tables, "real-texts": _texts(results)}


def save(results: dict[str, dict], folder: Path) -> None:
    """Writes the results and the figure of texts into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if "texts" in results:
        text_points([(name, one["sets"]) for name, one in results["texts"]["reports"].items()], folder / FIGURE)


def _run(results: dict[str, dict]) -> str:
    run, jobs = results["run"], [one for name, one in results.items() if name != "run"]
    minutes = sum(one["job_seconds"] for one in jobs) / 60
    peak = max((one["peak_gib"] for one in jobs if "peak_gib" in one), default=0)
    names = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return markdown_table(
        ["command", "minutes of all jobs", "peak memory, GiB", "machine", "versions"],
        [[f"`{run['command']}`", f"{minutes:.0f}", f"{peak:.1f}", run["machine"], names]],
    )


def _arms(results: dict[str, dict], arms: tuple[str, ...]) -> str:
    rows = []
    for arm in (PAPER, *arms):
        runs = _runs(results, arm)
        if len(runs) < 2:  # no interval
            rows.append([ARM_NAMES[arm], str(len(runs)), f"not run ({results['run']['seeds']} seeds were asked for)"])
            continue
        operations = sum(one["teraflops"] for one in runs.values()) / len(runs)
        scores = [str(mean([_last(one)[key] for one in runs.values()])) for key in SCORES]
        rows.append([ARM_NAMES[arm], str(len(runs)), f"{operations:.0f}", _after_stage_2(runs), *scores])
        rows[-1] += ["", ""] if arm == PAPER else _compared(_runs(results, PAPER), runs)
    heads = ["arm", "seeds", "TFLOP", "CIDEr after stage 2", *SCORES.values(), "the paper's - this, CIDEr", "verdict"]
    return markdown_table(heads, [[*row, *[""] * (len(heads) - len(row))] for row in rows])


def _runs(results: dict[str, dict], arm: str) -> dict[int, dict]:
    """The runs of an arm by seed."""
    return {int(name.rpartition("/")[2]): one for name, one in results.items() if name.startswith(f"{arm}/")}


def _last(run: dict) -> dict[str, float]:
    return run["scores"][max(run["scores"])]


def _after_stage_2(runs: dict[int, dict]) -> str:
    scores = [one["scores"]["stage 2"]["CIDEr"] for one in runs.values() if "stage 2" in one["scores"]]
    return str(mean(scores)) if scores else ""


def _compared(paper: dict[int, dict], other: dict[int, dict]) -> list[str]:
    both = sorted(paper.keys() & other.keys())
    if len(both) < 2:
        return ["", "not compared"]
    apart = difference(*([_last(runs[seed])["CIDEr"] for seed in both] for runs in (paper, other)))
    return [str(apart), f"**{apart.verdict(*VERDICTS)}**"]


def _texts(results: dict[str, dict]) -> str:
    if "texts" not in results:
        return "Not run."
    rows = []
    for name, report in results["texts"]["reports"].items():
        human, *machines = report["sets"]
        for writer, pair in zip(machines, report["pairs"], strict=True):
            low, high = pair["difference_interval"]
            losses = [f"{report['sets'][one]['loss']:.3f}" for one in (human, writer)]
            apart = f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            written = name if writer == "machine" else f"{name}, {writer}"
            rows.append([written, f"{pair['rows']:,}", *losses, apart, f"{pair['p_value']:.4f}"])
            rows[-1] += [f"{100 * pair['share_lower']:.0f}%"]
    heads = ["texts", "pairs", "human", "machine", "machine - human", "p", "machine lower in"]
    return f"{markdown_table(heads, rows)}\n\n![losses on texts of a pretrained decoder](evidence/{FIGURE})"
