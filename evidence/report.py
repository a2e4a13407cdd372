"""docs/EVIDENCE.md and its figures, from the results of all jobs; no figure and no verdict in it is written by hand."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

from evidence import backbones, studies
from evidence.statistics import Difference, difference, mean
from prefixvlm.train.evaluation.figures import save

ARM_NAMES = {
    "prefix": "prefix",
    "causal": "causal",
    "prefix_all_images": "prefix_all_images",
    "without-stage-0": "without stage 0",
    "without-stage-1": "without stage 1",
    "single-stage": "one single stage",
}


class Results:
    """The results of all jobs, by study and arm."""

    def __init__(self, results: dict[str, dict]):
        self.all = results

    def arm(self, prefix: str) -> list[dict]:
        """The results of an arm, in the order of seeds."""
        found = [(int(name.rpartition("/")[2]), value) for name, value in self.all.items() if name.startswith(prefix + "/")]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def values(self, prefix: str, key: str) -> list[float]:
        return [value[key] for value in self.arm(prefix)]

    def has(self, study: str) -> bool:
        return any(name.startswith(study + "/") for name in self.all)


def write(results: dict[str, dict], path: Path, minutes: float, command: str) -> None:
    """Writes the page, its figures and results.json below the folder `evidence/` beside it."""
    found = Results(results)
    figures = path.parent / "evidence"
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "results.json").write_text(json.dumps(_kept(results), indent=1) + "\n")
    parts = [_head(found, minutes, command), *_claim_1(found, figures)]
    if found.has("ucm"):
        parts += [*_claim_2(found, figures), *_claim_3(found, figures), *_noise(found, figures)]
    else:
        parts.append("Claims 2 and 3 and stage 0's noise need `--data` and were not run.")
    parts.append(_limits())
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _kept(results: dict[str, dict]) -> dict:
    """Everything but the loss curves, which would be megabytes, and where files lay on this machine."""
    kept = {name: {key: value for key, value in one.items() if key != "losses"} for name, one in results.items()}
    for one in kept.values():
        if "reports" in one:
            one["reports"] = {name: _numbers(report) for name, report in one["reports"].items()}
    return kept


def _numbers(report: dict) -> dict:
    sets = {writer: {k: v for k, v in one.items() if k != "file"} for writer, one in report["sets"].items()}
    return {"sets": sets, "pairs": report["pairs"]}


def _head(found: Results, minutes: float, command: str) -> str:
    seconds = sum(one.get("job_seconds", 0) for one in found.all.values())
    return f"""# Evidence: the paper's claims at small scale

Written by `{command}` in {minutes:.0f} minutes ({seconds / 60:.0f} minutes of computing, one thread a job) on
{os.cpu_count()} cores, {platform.machine()}, no GPU; torch {torch.__version__}, transformers {transformers.__version__},
Python {platform.python_version()}. Every number below comes from that command; those behind the tables are in
[evidence/results.json](evidence/results.json). Nobody has edited a verdict: "no difference shown" stands wherever the
p-value of a paired t-test over seeds is 0.05 or more. Intervals are 95% over seeds, p-values are not corrected for how many
there are.

The models are tiny: an encoder of {backbones.VISION["num_hidden_layers"]} layers on 36 patches, trained as SigLIP is, and a
decoder of {backbones.DECODER["num_hidden_layers"]} layers, both of width 96, pretrained on the training split alone
(`evidence/backbones.py`), then aligned by the recipes of `evidence/studies.py`. All arms of a study share the pretrained
backbones; seeds change the projector's start, the order of the data and the noise."""


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def _by_mask(found: Results, study: str, keys: dict[str, str], modes: list[str]) -> str:
    heads = ["mask", *keys.values()]
    rows = [[mode, *(str(mean(found.values(f"{study}/{mode}", key))) for key in keys)] for mode in modes]
    first, *others = modes
    for other in others:
        apart = [difference(found.values(f"{study}/{first}", key), found.values(f"{study}/{other}", key)) for key in keys]
        rows.append([f"{first} - {other}", *map(str, apart)])
    return _table(heads, rows)


def _claim_1(found: Results, figures: Path) -> list[str]:
    seeds = len(found.arm("easy/prefix"))
    accuracies = {
        "overall_accuracy": "accuracy, %",
        "yes_no_accuracy": "yes/no, %",
        "open_accuracy": "colours and shapes, %",
    }
    apart = {"easy-VQA": _against_causal(found, "easy", "overall_accuracy")}
    parts = [
        '## Claim 1: "no mask on visual inputs"',
        f"""The same four stages, steps and {seeds} seeds; the arms differ in the mask of stages 1 to 3 (stage 0 is
bidirectional in all). With one image in front `prefix_all_images` allows exactly what `prefix` allows: the weights after
all stages of seed 0 {_same(found)}. It is therefore compared where it differs, on questions about one of two images.

### easy-VQA, one image ({studies.EASY_QUESTIONS:,} test questions, greedy answers)

{_by_mask(found, "easy", accuracies, ["prefix", "causal"])}

### easy-VQA, two images ("second: what color is the shape?"; {studies.TWO_IMAGES:,} test questions)

{_by_mask(found, "pairs", accuracies, ["prefix", "causal", "prefix_all_images"])}""",
    ]
    apart["easy-VQA, two images"] = _against_causal(found, "pairs", "overall_accuracy")
    if found.has("ucm"):
        keys = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "class_accuracy": "class named, %"}
        parts.append(
            f"### UCM captions (210 test images, greedy captions)\n\n{_by_mask(found, 'ucm', keys, ['prefix', 'causal'])}"
        )
        apart["UCM captions"] = _against_causal(found, "ucm", "CIDEr")
    lines = [
        f"- {name}: **{one.verdict('holds here', 'the opposite holds here')}** ({one})." for name, one in apart.items()
    ]
    parts.append("\n".join(["prefix - causal:", "", *lines]))
    _bars(found, figures / "masks.png")
    parts.append("![accuracy and CIDEr by mask](evidence/masks.png)")
    if found.has("ucm"):
        _curves(
            {arm: found.arm(f"ucm/{arm}") for arm in ("prefix", "causal")}, ("0", "1", "2", "3"), figures / "losses.png"
        )
        parts.append(
            "Training losses of the four stages, as in the paper's Fig. 4 (mean and range over seeds, UCM captions):\n\n"
            "![training losses](evidence/losses.png)"
        )
    return parts


def _against_causal(found: Results, study: str, key: str) -> Difference:
    return difference(found.values(f"{study}/prefix", key), found.values(f"{study}/causal", key))


def _same(found: Results) -> str:
    studies_compared = [study for study in ("easy", "ucm") if found.has(study)]
    same = [
        found.arm(f"{study}/prefix_all_images")[0]["weights_sha256"] == found.arm(f"{study}/prefix")[0]["weights_sha256"]
        for study in studies_compared
    ]
    names = " and ".join({"easy": "easy-VQA", "ucm": "UCM captions"}[study] for study in studies_compared)
    return f"are the same bit for bit on {names}" if all(same) else f"are NOT the same on {names}, which is a defect"


def _claim_2(found: Results, figures: Path) -> list[str]:
    arms = list(studies.UCM_ARMS)
    arms.remove("causal")
    rows = []
    for arm in arms:
        steps = ", ".join(f"{number}: {count}" for number, count in studies.UCM_ARMS[arm][1].items())
        operations = np.mean(found.values(f"ucm/{arm}", "teraflops"))
        scores = [str(mean(found.values(f"ucm/{arm}", key))) for key in ("CIDEr", "class_accuracy")]
        name = "all four stages" if arm == "prefix" else ARM_NAMES[arm]
        rows.append([name, steps, f"{operations:.1f}", *scores])
    lines = []
    for arm in arms[1:]:
        apart = difference(found.values("ucm/prefix", "CIDEr"), found.values(f"ucm/{arm}", "CIDEr"))
        verdict = apart.verdict("holds here", "the opposite holds here")
        lines.append(f"- all four stages against {ARM_NAMES[arm]}: **{verdict}** ({apart} CIDEr).")
    _ablation(found, arms, figures / "stages.png")
    return [
        '## Claim 2: "more alignment work"',
        "UCM captions, prefix mask. Without a stage its steps go to the other alignment stage; the single stage trains "
        "everything at once on what the four stages see, for as many floating-point operations (counted as the trainer "
        "counts them for MFU).",
        _table(["arm", "steps of each stage", "TFLOP", "CIDEr", "class named, %"], rows),
        "\n".join(lines),
        "![CIDEr by stages](evidence/stages.png)",
    ]


def _claim_3(found: Results, figures: Path) -> list[str]:
    rows, held = [], []
    for decoder in studies.DECODERS:
        for name, report in found.all[f"texts/{decoder}"]["reports"].items():
            (pair,) = report["pairs"]
            human, machine = (report["sets"][writer] for writer in ("human", "machine"))
            low, high = pair["difference_interval"]
            rows.append(
                [
                    DECODER_NAMES[decoder],
                    name,
                    f"{pair['rows']:,}",
                    f"{human['loss']:.3f}",
                    f"{machine['loss']:.3f}",
                    f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
                    f"{pair['p_value']:.4f}",
                    f"{100 * pair['share_lower']:.0f}%",
                    f"{human['loss_per_character']:.3f} / {machine['loss_per_character']:.3f}",
                ]
            )
            below = pair["p_value"] < 0.05 and pair["difference"] < 0
            above = pair["p_value"] < 0.05 and pair["difference"] > 0
            held.append((decoder, name, "lower" if below else "higher" if above else "not shown to differ"))
    heads = ["decoder trained on", "texts", "pairs", "human", "machine", "machine - human", "p", "machine lower in"]
    summary = ", ".join(f"{name} ({DECODER_NAMES[decoder]}): {what}" for decoder, name, what in held)
    human, machine = (found.values(f"coco/{writer}", "last_loss") for writer in ("human", "machine"))
    apart = difference(human, machine)
    started = [mean(found.values(f"coco/{writer}", "first_loss")) for writer in ("human", "machine")]
    _text_points(found, figures / "text_loss.png")
    _curves(
        {writer: found.arm(f"coco/{writer}") for writer in ("human", "machine")}, ("1", "2"), figures / "convergence.png"
    )
    verdict = apart.verdict("holds here", "the opposite holds here")
    return [
        '## Claim 3: "faster on AI text"',
        "### A decoder's loss on human and on machine texts (Fig. 5a)\n\n"
        "`prefixvlm text-loss`, nats per token, of decoders that were trained here: on neutral prose (Python's language "
        "reference, neither caption nor machine), on captions by humans alone, and on as many captions by machines as by "
        "humans (of COCO images that are not tested on). Machine captions are those of nine captioners, the other texts "
        "are GPT's answers to the same prompts. Differences are row by row.",
        _table([*heads, "nats per character, human / machine"], rows),
        f"Machine text's loss per token is: {summary}.",
        "![losses on texts](evidence/text_loss.png)",
        "### How fast a captioner learns them (Fig. 5b)\n\n"
        "144 COCO photos with five human or five machine captions each, the same steps and seeds; the decoder had seen "
        f"both kinds equally. Loss at the first log {started[0]} (human) and {started[1]} (machine), over the last 20 "
        f"steps {mean(human)} and {mean(machine)}; human - machine {apart}: **{verdict}**. Ending lower is what the paper "
        "calls faster convergence; a text that varies less ends lower however it is learnt.",
        "![convergence](evidence/convergence.png)",
    ]


DECODER_NAMES = {"neutral": "neutral prose", "human": "human captions", "both": "both kinds of captions"}


def _noise(found: Results, figures: Path) -> list[str]:
    rows = []
    for trained in ("projector", "everything"):
        for level in studies.NOISES:
            study = f"noise/{trained}/{level}"
            rows.append(
                [
                    "projector (as the paper)" if trained == "projector" else "everything",
                    f"{100 * level:.0f}%",
                    *(str(mean(found.values(study, key))) for key in ("target_visible", "target_noised", "prefix_mask")),
                ]
            )
    verdicts = []
    for trained, who in (("projector", "the projector alone"), ("everything", "everything")):
        without, with_noise = (_price_of_hiding(found, trained, level) for level in (0.0, 0.2))
        more = difference(without, with_noise)
        verdict = more.verdict("the short-cut appears", "the opposite of a short-cut appears")
        verdicts.append(
            f"- {who} trained without noise: a target that is noise in the input costs {mean(without)} nats more than one "
            f"that can be seen, after training with 20% noise {mean(with_noise)}; difference {more}: **{verdict}**."
        )
    _noise_curves(found, figures / "noise.png")
    return [
        "## Stage 0's noise",
        "In stage 0 a position sees the token that it has to predict; the paper puts noise into 20% of the input so that "
        f"copying it (the identity short-cut) does not pay. {studies.NOISE_STEPS} steps on UCM captions, "
        f"{len(studies.NOISE_SEEDS)} seeds; then held-out captions with 20% noise, the loss on targets that stand in the "
        "input and on those that are noise there apart, and the loss of the same weights under the later stages' prefix "
        "mask, where nothing can be copied.",
        _table(["trained", "noise", "target can be seen", "target is noise", "prefix mask"], rows),
        "\n".join(verdicts),
        "![losses in stage 0](evidence/noise.png)",
    ]


def _price_of_hiding(found: Results, trained: str, level: float) -> list[float]:
    """For each seed, the loss on targets that are noise in the input minus that on targets that can be seen there."""
    study = f"noise/{trained}/{level}"
    pairs = zip(found.values(study, "target_noised"), found.values(study, "target_visible"), strict=True)
    return [hidden - visible for hidden, visible in pairs]


def _limits() -> str:
    return """## What this cannot say

Models of a million weights on pictures of 48 pixels say little about 0.9 billion weights and photographs. One pair of
backbones a data set was pretrained, so the intervals hold for that pair. Learning rates were set once, by hand, for the
prefix arm, and not tuned for any other. A larger variant on a GPU: not measured."""


def _bars(found: Results, path: Path) -> None:
    panels = [("easy", "overall_accuracy", "easy-VQA, accuracy %"), ("pairs", "overall_accuracy", "two images, accuracy %")]
    if found.has("ucm"):
        panels.append(("ucm", "CIDEr", "UCM captions, CIDEr"))
    modes = {"easy": ("prefix", "causal"), "ucm": ("prefix", "causal"), "pairs": ("prefix", "causal", "prefix_all_images")}
    _bar_panels(
        [(title, {m: found.values(f"{study}/{m}", key) for m in modes[study]}) for study, key, title in panels], path
    )


def _ablation(found: Results, arms: list[str], path: Path) -> None:
    names = {arm: "all four" if arm == "prefix" else ARM_NAMES[arm] for arm in arms}
    _bar_panels(
        [
            (title, {names[arm]: found.values(f"ucm/{arm}", key) for arm in arms})
            for key, title in (("CIDEr", "UCM captions, CIDEr"), ("class_accuracy", "class named, %"))
        ],
        path,
    )


def _bar_panels(panels: list[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, arms) in zip(axes[0], panels, strict=True):
        for place, values in enumerate(arms.values()):
            average = mean(values)
            errors = [[average.value - average.low], [average.high - average.value]]
            axis.bar(place, average.value, color="#2a9d8f", alpha=0.6, yerr=errors, capsize=4)
            axis.plot([place] * len(values), values, "k.", markersize=4)
        axis.set_xticks(range(len(arms)), arms, rotation=15 if len(arms) > 3 else 0, fontsize=8)
        axis.set_ylim(bottom=max(0.0, 0.8 * min(min(values) for values in arms.values())))
        axis.set_title(f"{title}\n(axis cut; dots are seeds)", fontsize=9)
    save(figure, path)


def _curves(arms: dict[str, list[dict]], numbers: tuple[str, ...], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(numbers), figsize=(3.8 * len(numbers), 3.2), squeeze=False, layout="constrained")
    for axis, number in zip(axes[0], numbers, strict=True):
        for name, runs in arms.items():
            steps = [entry["step"] for entry in runs[0]["losses"][number]]
            losses = np.array([[entry["loss"] for entry in run["losses"][number]] for run in runs])
            (line,) = axis.plot(steps, losses.mean(axis=0), label=name, linewidth=1.2)
            axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), alpha=0.2, color=line.get_color())
        axis.set_title(f"stage {number}")
        axis.set_xlabel("step")
        axis.set_ylabel("cross-entropy")
        axis.legend()
    save(figure, path)


def _text_points(found: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [
        (f"{name}\n({DECODER_NAMES[decoder]})", report["sets"])
        for decoder in studies.DECODERS
        for name, report in found.all[f"texts/{decoder}"]["reports"].items()
    ]
    figure, axis = plt.subplots(figsize=(7, 0.6 * len(rows) + 1), layout="constrained")
    for place, (_, sets) in enumerate(rows):
        for writer, color, offset in (("human", "#6a4c93", 0.12), ("machine", "#e76f8a", -0.12)):
            low, high = sets[writer]["loss_interval"]
            axis.plot([low, high], [place + offset] * 2, color=color, linewidth=2)
            axis.plot(sets[writer]["loss"], place + offset, "o", color=color, label=None if place else writer)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.set_xlabel("nats per token")
    axis.legend()
    save(figure, path)


def _noise_curves(found: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, trained in zip(axes, ("projector", "everything"), strict=True):
        for level in studies.NOISES:
            runs = found.arm(f"noise/{trained}/{level}")
            color = None
            for key, style in (("loss_clean", "-"), ("loss_noised", ":")):
                if not level and key == "loss_noised":
                    continue
                points = [(e["step"], e.get(key, e["loss"])) for e in runs[0]["losses"]["0"]]
                label = f"{100 * level:.0f}% noise, {'targets in the input' if style == '-' else 'targets that are noise'}"
                (line,) = axis.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.2)
                color = line.get_color()
        axis.set_title(f"trained: {trained} (seed 0)")
        axis.set_xlabel("step")
    axes[0].set_ylabel("training loss of stage 0")
    axes[1].legend(fontsize=7)
    save(figure, path)
