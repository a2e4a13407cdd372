"""One evaluation from start to end: what `prefixvlm evaluate` does."""

import json
from pathlib import Path

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.int8 import quantize_int8
from prefixvlm.inference.loading import load
from prefixvlm.inference.peers import is_peer, load_peer
from prefixvlm.train.evaluation import paper_results
from prefixvlm.train.evaluation.answering import processes_and_device
from prefixvlm.train.evaluation.gallery import refuse_without_matplotlib, save_gallery
from prefixvlm.train.evaluation.kept_answers import identity_of_weights
from prefixvlm.train.evaluation.predictions import METRICS, PREDICTIONS, evaluate, read_predictions, scorer
from prefixvlm.train.evaluation.tasks import MAX_NEW_TOKENS, TASKS, Example, load_examples, spread
from prefixvlm.train.recipes.evaluation import EvaluationRun


def run_evaluation(run: EvaluationRun) -> dict:
    """Evaluates a saved model; leaves predictions.jsonl, metrics.json and a gallery in `run.output`, prints the scores.

    The model is a PrefixVLM or any other image-text-to-text model of transformers.

    Returns:
        What metrics.json says.

    Raises:
        ValueError, OSError, ImportError: in one sentence, for input that cannot be used.
    """
    examples, limit = checked_examples(run), run.limit
    task = TASKS[run.task]
    if limit is not None and limit < len(examples):
        examples = spread(examples, limit)
    else:
        limit = None
    decoding = run.decoding(MAX_NEW_TOKENS[task.kind])
    processes, device = processes_and_device(run.device)
    if is_peer(run.model):
        if run.int8:
            raise ValueError(f"--int8 is for a PrefixVLM, which {run.model} is not; leave it out.")
        network, processor = load_peer(run.model, run.dtype, device)
    else:
        network, processor = load(run.model, run.dtype, device=device)
    if run.int8:
        quantize_int8(network)
    settings = {
        "model": run.model,
        "class": type(network).__name__,
        "weights": identity_of_weights(run.model, network),
        "dtype": run.dtype,
        "int8": run.int8,
        "task": run.task,
        "data": run.data or task.default_data or "easy-VQA",
        "images": run.images,
        "split": run.split,
        "keys": run.keys,
        "prompt": run.prompt,
        "shots": {"number": run.shots, "data": run.shots_data, "split": run.shots_split, "seed": run.shots_seed},
        "limit": limit,
    }
    folder, name = Path(run.output), Path(run.model).name
    report = evaluate(network, processor, examples, task.kind, folder, decoding, settings)
    if processes.is_main_process:
        predictions = [row["prediction"] for row in read_predictions(folder)]
        if task.kind == "captions":  # what `prefixvlm score` and COCO's server read
            ids = [index if one.image_id is None else one.image_id for index, one in enumerate(examples)]
            results = [{"image_id": image, "caption": text} for image, text in zip(ids, predictions, strict=True)]
            write_atomically(folder / "captions_results.json", json.dumps(results, indent=1) + "\n")
        pictures = save_gallery(examples, predictions, folder, f"{name}: {run.task}")
        column = None if limit or run.split != "test" else task.column
        print(paper_results.beside_the_paper(column, name, report) if run.table else _plain(report))
        print("".join(f"{note}\n" for note in report["notes"]), end="")
        how = "greedy search" if run.num_beams == 1 else f"{run.num_beams} beams"
        print(f"{len(examples):,} examples by {how}, at most {decoding.max_new_tokens} tokens each.")
        for path in (folder / PREDICTIONS, folder / METRICS, *pictures):
            print(f"Saved to {path}")
    return report


def checked_examples(run: EvaluationRun) -> list[Example]:
    """The examples of an evaluation, after a check of all that it needs.

    Raises:
        ValueError, OSError, ImportError: in one sentence, for what cannot be used.
    """
    examples, kind = load_examples(run), TASKS[run.task].kind
    if run.table and kind != "captions":
        raise ValueError(f"--table is for captions, as Table VI is; {run.task} asks questions.")
    scorer(kind)
    refuse_without_matplotlib()
    return examples


def _plain(report: dict) -> str:
    lines = []
    for name, value in report["scores"].items():
        if name in report["intervals"]:
            low, high = report["intervals"][name]
            lines.append(f"{name:<16} {100 * value:6.2f}  [{100 * low:.2f}, {100 * high:.2f}]")
        else:
            lines.append(f"{name:<16} {value:>6,}")
    return "\n".join([*lines, "Scores are times 100, with 95% intervals."])
