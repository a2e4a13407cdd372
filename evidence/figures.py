"""The figures of docs/EVIDENCE.md, from the results of all jobs."""

from pathlib import Path

import numpy as np

from evidence import studies
from evidence.results import ARM_NAMES, DECODER_NAMES, MASKS, Results
from evidence.statistics import mean
from prefixvlm.train.evaluation.figures import panels


def draw(found: Results, folder: Path) -> None:
    """Writes the figures of those studies that were run."""
    scores = {"easy": ("overall_accuracy", "easy-VQA, accuracy %"), "pairs": ("overall_accuracy", "two images, accuracy %")}
    if found.has("ucm"):
        scores["ucm"] = ("CIDEr", "UCM captions, CIDEr")
    masks = [
        (title, {mode: found.values(f"{study}/{mode}", key) for mode in MASKS[study]})
        for study, (key, title) in scores.items()
    ]
    _bar_panels(masks, folder / "masks.png")
    if not found.has("ucm"):
        return
    stages = [
        (title, {name: found.values(f"ucm/{arm}", key) for arm, name in ARM_NAMES.items()})
        for key, title in (("CIDEr", "UCM captions, CIDEr"), ("class_accuracy", "class named, %"))
    ]
    _bar_panels(stages, folder / "stages.png")
    _curves({mode: found.arm(f"ucm/{mode}") for mode in MASKS["ucm"]}, ("0", "1", "2", "3"), folder / "losses.png")
    writers = {writer: found.arm(f"coco/{writer}") for writer in ("human", "machine")}
    _curves(writers, ("1", "2"), folder / "convergence.png")
    texts = [
        (f"{name}\n({DECODER_NAMES[decoder]})", report["sets"])
        for decoder in studies.DECODERS
        for name, report in found.all[f"texts/{decoder}"]["reports"].items()
    ]
    text_points(texts, folder / "text_loss.png")
    _noise_curves(found, folder / "noise.png")


def _bar_panels(scores: list[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    with panels(path, len(scores), 4.4, 3.4) as axes:
        for axis, (title, arms) in zip(axes, scores, strict=True):
            for place, values in enumerate(arms.values()):
                average = mean(values)
                errors = [[average.value - average.low], [average.high - average.value]]
                axis.bar(place, average.value, color="#2a9d8f", alpha=0.6, yerr=errors, capsize=4)
                axis.plot([place] * len(values), values, "k.", markersize=4)
            axis.set_xticks(range(len(arms)), arms, rotation=15 if len(arms) > 3 else 0, fontsize=8)
            axis.set_ylim(bottom=max(0.0, 0.8 * min(min(values) for values in arms.values())))
            axis.set_title(f"{title}\n(axis cut; dots are seeds)", fontsize=9)


def _curves(arms: dict[str, list[dict]], numbers: tuple[str, ...], path: Path) -> None:
    with panels(path, len(numbers), 3.8, 3.2) as axes:
        for axis, number in zip(axes, numbers, strict=True):
            for name, runs in arms.items():
                steps = [entry["step"] for entry in runs[0]["losses"][number]]
                losses = np.array([[entry["loss"] for entry in run["losses"][number]] for run in runs])
                (line,) = axis.plot(steps, losses.mean(axis=0), label=name, linewidth=1.2)
                axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), alpha=0.2, color=line.get_color())
            axis.set_title(f"stage {number}")
            axis.set_xlabel("step")
            axis.set_ylabel("cross-entropy")
            axis.legend()


def text_points(rows: list[tuple[str, dict[str, dict]]], path: Path) -> None:
    """Draws the losses of human and of machine texts with their intervals.

    Args:
        rows: the name of each and its sets of texts by writer, of `text_loss.summarise`; who is not human is a machine.
    """
    with panels(path, 1, 7, 0.6 * len(rows) + 1) as (axis,):
        for place, (_, sets) in enumerate(rows):
            named = {"human": "human", next(reversed(sets)): "machine"}
            for writer, numbers in sets.items():
                color, offset = ("#6a4c93", 0.12) if writer == "human" else ("#e76f8a", -0.12)
                axis.plot(numbers["loss_interval"], [place + offset] * 2, color=color, linewidth=2)
                axis.plot(numbers["loss"], place + offset, "o", color=color, label=None if place else named.get(writer))
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.set_xlabel("nats per token")
        axis.legend()


def _noise_curves(found: Results, path: Path) -> None:
    with panels(path, 2, 4.5, 3.4, sharey=True) as axes:
        for axis, trained in zip(axes, ("projector", "everything"), strict=True):
            for level in studies.NOISES:
                history = found.arm(f"noise/{trained}/{level}")[0]["losses"]["0"]
                color = None
                # without noise only the targets in the input have a loss
                kinds = {"loss_clean": ("-", "targets in the input"), "loss_noised": (":", "targets that are noise")}
                for key, (style, targets) in list(kinds.items())[: 2 if level else 1]:
                    points = [(entry["step"], entry.get(key, entry["loss"])) for entry in history]
                    label = f"{100 * level:.0f}% noise, {targets}"
                    (line,) = axis.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.2)
                    color = line.get_color()
            axis.set_title(f"trained: {trained} (seed 0)")
            axis.set_xlabel("step")
        axes[0].set_ylabel("training loss of stage 0")
        axes[1].legend(fontsize=7)
