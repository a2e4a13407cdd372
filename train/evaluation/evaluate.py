"""One evaluation from start to end: what `prefixvlm evaluate` does."""

import json
from pathlib import Path

import torch
from accelerate import PartialState

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.int8 import quantize_int8
from prefixvlm.inference.loading import DTYPES, load
from prefixvlm.train.evaluation import paper_results
from prefixvlm.train.evaluation.answering import Decoding
from prefixvlm.train.evaluation.gallery import refuse_without_matplotlib, save_gallery
from prefixvlm.train.evaluation.predictions import METRICS, PREDICTIONS, evaluate, read_predictions, scorer
from prefixvlm.train.evaluation.tasks import KINDS, TASKS, load_examples, spread

MAX_NEW_TOKENS = dict(zip(KINDS, (64, 32), strict=True))


def run_evaluation(
    model: str,
    task: str,
    output: str,
    data: str | None = None,
    images: str | None = None,
    split: str = "test",
    texts: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    prompt: str | None = None,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    int8: bool = False,
    limit: int | None = None,
    table: bool = False,
) -> dict:
    """Evaluates a saved model; leaves predictions.jsonl, metrics.json and a gallery in `output`, prints the scores.

    Args: as the command's own help says.

    Returns:
        What metrics.json says.

    Raises:
        ValueError, OSError, ImportError: in one sentence, for input that cannot be used.
    """
    keys = {name: key for name, key in (("texts", texts), ("question", question), ("answer", answer)) if key is not None}
    examples = load_examples(task, data, images, split, prompt, **keys)
    kind = TASKS[task].kind
    if table and kind != "captions":
        raise ValueError(f"--table is for captions, as Table VI is; {task} asks questions.")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"--limit is {limit}; it must be positive.")
        if limit < len(examples):
            examples = spread(examples, limit)
        else:
            limit = None
    decoding = Decoding(num_beams, MAX_NEW_TOKENS[kind] if max_new_tokens is None else max_new_tokens, batch_size)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    scorer(kind)
    refuse_without_matplotlib()
    network, processor = load(model, dtype)
    processes = PartialState(cpu=not torch.cuda.is_available())
    network.to(processes.device)
    if int8:
        quantize_int8(network)
    settings = {
        "model": model,
        "weights": _identity(model, network),
        "dtype": dtype,
        "int8": int8,
        "task": task,
        "data": data or TASKS[task].default_data or "easy-VQA",
        "images": images,
        "split": split,
        "keys": keys,
        "prompt": prompt,
        "limit": limit,
    }
    folder = Path(output)
    report = evaluate(network, processor, examples, kind, folder, decoding, settings)
    if processes.is_main_process:
        predictions = [row["prediction"] for row in read_predictions(folder)]
        if kind == "captions":  # what `prefixvlm score` and COCO's server read
            ids = [index if one.image_id is None else one.image_id for index, one in enumerate(examples)]
            results = [{"image_id": image, "caption": text} for image, text in zip(ids, predictions, strict=True)]
            write_atomically(folder / "captions_results.json", json.dumps(results, indent=1) + "\n")
        pictures = save_gallery(examples, predictions, folder, f"{Path(model).name}: {task}")
        column = None if limit or split != "test" else TASKS[task].column
        print(paper_results.beside_the_paper(column, Path(model).name, report) if table else _plain(report))
        how = "greedy search" if num_beams == 1 else f"{num_beams} beams"
        print(f"{len(examples):,} examples by {how}, at most {decoding.max_new_tokens} tokens each.")
        for path in (folder / PREDICTIONS, folder / METRICS, *pictures):
            print(f"Saved to {path}")
    return report


def _plain(report: dict) -> str:
    lines = []
    for name, value in report["scores"].items():
        if name in report["intervals"]:
            low, high = report["intervals"][name]
            lines.append(f"{name:<16} {100 * value:6.2f}  [{100 * low:.2f}, {100 * high:.2f}]")
        else:
            lines.append(f"{name:<16} {value:>6,}")
    return "\n".join([*lines, "Scores are times 100, with 95% intervals."])


def _identity(name: str, model) -> list:
    """What changes when the weights do: a Hub commit, or the files' sizes and times."""
    folder = Path(name)
    if not folder.is_dir():
        return [getattr(model.config, "_commit_hash", None)]
    files = sorted(folder.glob("*.safetensors*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
