"""The tables of docs/EVIDENCE.md, from the results of all jobs; the prose around them is written by hand.

    python -m evidence.report

fills in the page's marked places again from docs/evidence/results.json, and from real.json those of the pretrained
halves. The figures also need the loss curves, which only `make evidence` has.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.report import markdown_table
from evidence import figures, page, studies
from evidence.real import claims
from evidence.results import ARM_NAMES, DECODER_NAMES, MASKS, Results
from evidence.statistics import Difference, difference, mean

PAGE = Path(__file__).resolve().parent.parent / "docs" / "EVIDENCE.md"
FOLDER = "evidence"  # beside the page
ACCURACIES = {"overall_accuracy": "accuracy, %", "yes_no_accuracy": "yes/no, %", "open_accuracy": "colours and shapes, %"}
TALK_SCORES = {
    f"{turn}_{kind}": f"{name}, {what}"
    for turn, name in (("first", "two pictures"), ("second", "third picture, second turn"))
    for kind, what in (("yes_no", "yes/no, %"), ("open", "other, %"))
}
CAPTION_SCORES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "class_accuracy": "class named, %"}


def write(results: dict[str, dict], file: Path, has_curves: bool = True) -> None:
    """Fills in the page, and writes results.json and the figures into the folder `evidence/` beside it.

    Args:
        results: of all jobs by name, and under `run` the command, time, machine and versions.
        has_curves: results that were kept have no loss curves, and then the figures stay as they are.

    Raises:
        ValueError: as `check`.
    """
    found = Results(results)
    fill(file, found)
    folder = file.parent / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found.kept(), indent=1) + "\n", encoding="utf-8")
    if has_curves:
        figures.draw(found, folder)


def kept(file: Path) -> dict[str, dict]:
    """The results that were last written beside a page."""
    saved = file.parent / FOLDER / "results.json"
    return json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}


def fill(file: Path, found: Results) -> None:
    """Puts every table into its place on the page.

    Raises:
        ValueError: as `check`.
    """
    bodies = {}
    for name, (study, table, figure) in TABLES.items():
        is_run = study is None or found.has(study)
        parts = [table(found), figure] if is_run else ["Not run: this needs `--data`."]
        bodies[name] = "\n\n".join(filter(None, parts))
    page.fill(file, bodies, claims.TABLES)


def fill_real(file: Path, results: dict[str, dict]) -> None:
    """Puts the tables of the studies on pretrained halves into their places on the page.

    Raises:
        ValueError: as `check`.
    """
    page.fill(file, claims.bodies(results), TABLES)


def check(file: Path) -> None:
    """Raises a ValueError for a page without one place for each table, saying which."""
    page.check(file, [*TABLES, *claims.TABLES])


def _verdict(apart: Difference, better: str = "holds here", worse: str = "the opposite holds here") -> str:
    return f"**{apart.verdict(better, worse)}**"


def _run(found: Results, study: str | None = None) -> str:
    """How all studies were run, or one that was run by itself."""
    run = found.all.get(f"run/{study}", found.all["run"])
    heads = ["command", "minutes", "CPU minutes, one thread per job", "machine", "versions"]
    row = [f"`{run['command']}`", f"{run['minutes']:.0f}", f"{run['cpu_minutes']:.0f}", run["machine"]]
    return markdown_table(heads, [[*row, ", ".join(f"{name} {version}" for name, version in run["versions"].items())]])


def _same_weights(found: Results) -> str:
    rows = []
    for study, name in (("easy", "easy-VQA"), ("ucm", "UCM captions")):
        if found.has(study):
            ours, other = (found.arm(f"{study}/{mode}")[0]["weights_sha256"] for mode in ("prefix", "prefix_all_images"))
            rows.append([name, "the same bit for bit" if ours == other else "NOT the same, which is a defect"])
    return markdown_table(["data", "weights under `prefix` and `prefix_all_images`, seed 0"], rows)


def _by_mask(found: Results, study: str, keys: dict[str, str]) -> str:
    first, *others = MASKS[study]
    rows = [[mode, *(str(mean(found.values(f"{study}/{mode}", key))) for key in keys)] for mode in MASKS[study]]
    for other in others:
        rows.append([f"{first} - {other}", *(str(_masks_apart(found, study, key, other)) for key in keys)])
    return markdown_table(["mask", *keys.values()], rows)


def _masks_apart(found: Results, study: str, key: str, other: str = "causal") -> Difference:
    return difference(found.values(f"{study}/prefix", key), found.values(f"{study}/{other}", key))


def _masks(found: Results) -> str:
    scores = {
        "easy-VQA, accuracy, %": ("easy", "overall_accuracy"),
        "easy-VQA, two images, accuracy, %": ("pairs", "overall_accuracy"),
        "UCM captions, CIDEr": ("ucm", "CIDEr"),
    }
    apart = {name: _masks_apart(found, *score) for name, score in scores.items() if found.has(score[0])}
    rows = [[name, str(one), _verdict(one)] for name, one in apart.items()]
    return markdown_table(["score", "prefix - causal", "the claim"], rows)


def _stages(found: Results) -> str:
    rows = []
    for arm, name in ARM_NAMES.items():
        steps = ", ".join(f"{number}: {count}" for number, count in studies.UCM_ARMS[arm][1].items())
        operations = f"{np.mean(found.values(f'ucm/{arm}', 'teraflops')):.1f}"
        scores = [str(mean(found.values(f"ucm/{arm}", key))) for key in ("CIDEr", "class_accuracy")]
        apart = difference(found.values("ucm/prefix", "CIDEr"), found.values(f"ucm/{arm}", "CIDEr"))
        compared = ["", ""] if arm == "prefix" else [str(apart), _verdict(apart)]
        rows.append([name, steps, operations, *scores, *compared])
    heads = ["arm", "steps of each stage", "TFLOP", "CIDEr", "class named, %", "all four stages - this, CIDEr", "the claim"]
    return markdown_table(heads, rows)


def _texts(found: Results) -> str:
    rows = []
    for decoder in studies.DECODERS:
        for name, report in found.all[f"texts/{decoder}"]["reports"].items():
            (pair,) = report["pairs"]
            human, machine = (report["sets"][writer] for writer in ("human", "machine"))
            low, high = pair["difference_interval"]
            shown = "lower" if pair["difference"] < 0 else "higher"
            rows.append(
                [
                    DECODER_NAMES[decoder],
                    name,
                    f"{pair['rows']:,}",
                    f"{human['loss']:.3f}",
                    f"{machine['loss']:.3f}",
                    f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
                    f"{pair['p_value']:.4f}",
                    f"**{shown}**" if pair["p_value"] < 0.05 else "**not shown to differ**",
                    f"{100 * pair['share_lower']:.0f}%",
                    f"{human['loss_per_character']:.3f} / {machine['loss_per_character']:.3f}",
                ]
            )
    heads = ["decoder trained on", "texts", "pairs", "human", "machine", "machine - human", "p", "machine's loss"]
    heads += ["machine lower in", "nats per character, human / machine"]
    return markdown_table(heads, rows)


def _convergence(found: Results) -> str:
    keys = ("first_loss", "last_loss")
    losses = {writer: [found.values(f"coco/{writer}", key) for key in keys] for writer in ("human", "machine")}
    rows = [[f"{writer}s", *map(str, map(mean, values)), ""] for writer, values in losses.items()]
    apart = difference(losses["human"][1], losses["machine"][1])
    rows.append(["human - machine", "", str(apart), _verdict(apart)])
    heads = ["captions by", "loss at the first log", "loss over the last 20 steps", "the claim"]
    return markdown_table(heads, rows)


def _noise(found: Results) -> str:
    keys = ("target_visible", "target_noised", "prefix_mask")
    rows = [
        [name, f"{100 * level:.0f}%", *(str(mean(found.values(f"noise/{trained}/{level}", key))) for key in keys)]
        for trained, name in (("projector", "projector (as the paper)"), ("everything", "everything"))
        for level in studies.NOISES
    ]
    return markdown_table(["trained", "noise", "target can be seen", "target is noise", "prefix mask"], rows)


def _short_cut(found: Results) -> str:
    rows = []
    for trained, name in (("projector", "the projector alone"), ("everything", "everything")):
        without, with_noise = (_price_of_hiding(found, trained, level) for level in (0.0, 0.2))
        apart = difference(without, with_noise)
        verdict = _verdict(apart, "the short-cut appears", "the opposite of a short-cut appears")
        rows.append([name, str(mean(without)), str(mean(with_noise)), str(apart), verdict])
    heads = ["trained", "without noise", "with 20% noise", "difference", "verdict"]
    return markdown_table(heads, rows)


def _price_of_hiding(found: Results, trained: str, level: float) -> list[float]:
    """For each seed, the loss on targets that are noise in the input minus that on targets that can be seen there."""
    study = f"noise/{trained}/{level}"
    return np.subtract(found.values(study, "target_noised"), found.values(study, "target_visible")).tolist()


# by its name on the page, each table: the study that it needs, what makes it, and the figure below it
TABLES = {
    "run": (None, _run, ""),
    "talks-run": ("talks", lambda found: _run(found, "talks"), ""),
    "same-weights": ("easy", _same_weights, ""),
    "easy-vqa": ("easy", lambda found: _by_mask(found, "easy", ACCURACIES), ""),
    "two-images": ("pairs", lambda found: _by_mask(found, "pairs", ACCURACIES), ""),
    "talks-easy": ("talks/easy", lambda found: _by_mask(found, "talks/easy", TALK_SCORES), ""),
    "talks-rad": ("talks/rad", lambda found: _by_mask(found, "talks/rad", TALK_SCORES), ""),
    "ucm-captions": ("ucm", lambda found: _by_mask(found, "ucm", CAPTION_SCORES), ""),
    "masks": ("easy", _masks, "![accuracy and CIDEr by mask](evidence/masks.png)"),
    "losses": ("ucm", lambda found: "", "![training losses](evidence/losses.png)"),
    "stages": ("ucm", _stages, "![CIDEr by stages](evidence/stages.png)"),
    "texts": ("texts", _texts, "![losses on texts](evidence/text_loss.png)"),
    "convergence": ("coco", _convergence, "![convergence](evidence/convergence.png)"),
    "noise": ("noise", _noise, ""),
    "short-cut": ("noise", _short_cut, "![losses in stage 0](evidence/noise.png)"),
}

if __name__ == "__main__":
    folder = PAGE.parent / FOLDER
    fill(PAGE, Results(json.loads((folder / "results.json").read_text(encoding="utf-8"))))
    if (folder / claims.RESULTS).exists():
        fill_real(PAGE, json.loads((folder / claims.RESULTS).read_text(encoding="utf-8")))
    print(f"Saved to {PAGE}")
