"""Runs a model over a test set and scores what it says; a run that was interrupted goes on from its predictions.jsonl.

Under accelerate each process answers its share, and writes a file of its own until the main one puts all together.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.environment import choose_device, versions
from prefixvlm.train.evaluation.answering import Decoding, answers
from prefixvlm.train.evaluation.likelihoods import log_likelihoods
from prefixvlm.train.evaluation.metrics.choices import choice_scores
from prefixvlm.train.evaluation.metrics.intervals import bootstrap
from prefixvlm.train.evaluation.metrics.vqa.scores import vqa_scores
from prefixvlm.train.evaluation.tasks import Example

PREDICTIONS, METRICS, SETTINGS = "predictions.jsonl", "metrics.json", "settings.json"


class Said(NamedTuple):
    """What a model answers, and how likely it finds each choice, in nats; without choices there are none."""

    prediction: str
    likelihoods: list[float]


def scorer(kind: str) -> Callable:
    """The function that scores predictions of a kind of task, `captions` or `vqa`, against references.

    Raises:
        ImportError, OSError: if what it needs is not installed.
    """
    if kind == "captions":
        from prefixvlm.train.evaluation.metrics.coco_caption.scores import caption_scores, java

        java()
        return caption_scores
    return lambda predictions, references: vqa_scores(
        predictions, [answers[0] if len(answers) == 1 else answers for answers in references]
    )


def evaluate(
    model, processor, examples: list[Example], kind: str, output: Path, decoding: Decoding, settings: dict
) -> dict:
    """Answers all examples, and leaves predictions.jsonl, metrics.json and settings.json in `output`.

    Args:
        kind: `captions` or `vqa`.
        output: may hold the predictions of an interrupted run of the same settings, which are kept.
        settings: what decides the predictions beside `decoding`: model, task, data.

    Returns:
        What metrics.json says: the scores, their 95% intervals over images or questions, `decoding`, settings, versions.
        Of several processes, each gets it.

    Raises:
        ValueError: for an image that cannot be opened, or an `output` of another evaluation.
        ImportError, OSError: if what scores need is not installed.
    """
    score = scorer(kind)  # what is missing is told before the work
    processes = PartialState(cpu=choose_device().type == "cpu")
    # a run that was out of memory goes on with smaller batches
    how = {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
    settings = json.loads(json.dumps(settings | {"decoding": how, "examples": len(examples)}))
    _refuse_another(output, settings)
    processes.wait_for_everyone()
    if processes.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / SETTINGS, json.dumps(settings, indent=2) + "\n")
        _gather(output, examples)
    processes.wait_for_everyone()
    done = _read(output / PREDICTIONS, examples)
    processes.wait_for_everyone()
    waiting = [index for index in range(len(examples)) if index not in done]
    if done and processes.is_main_process:
        print(f"{len(done):,} of {len(examples):,} were answered before.", file=sys.stderr)
    # whoever comes first may be slower: shares are dealt out by length, as batches are
    waiting.sort(key=lambda index: sum(len(text) for _, text in examples[index].question.said))
    mine = waiting[processes.process_index :: processes.num_processes]
    questions = [example.question for example in examples]
    with _own_file(output, processes.process_index).open("a", encoding="utf-8") as file:
        for batch in answers(model, processor, questions, mine, decoding, processes.is_main_process):
            asked = [examples[index] for index, _ in batch]
            choices = [one.choices for one in asked]
            likelihoods = log_likelihoods(model, processor, [one.question for one in asked], choices, decoding.batch_size)
            for (index, text), values in zip(batch, likelihoods, strict=True):
                file.write(_line(index, examples[index], Said(text, values)))
            file.flush()
    processes.wait_for_everyone()
    if processes.is_main_process:
        said = _gather(output, examples)
        in_order = [said[index] for index in range(len(examples))]
        scored = score([one.prediction for one in in_order], [one.references for one in examples])
        chosen = choice_scores(
            [one.likelihoods for one in in_order], [one.choices for one in examples], [one.right for one in examples]
        )
        report = {
            "scores": scored.scores | chosen.scores,
            "notes": getattr(scored, "notes", []),  # those of captions have some
            "intervals": bootstrap(lambda rows: scored.resampled(rows) | chosen.resampled(rows), len(examples)),
            "interval": "95%, percentile bootstrap over test items, 1,000 resamples, seed 0",
            **settings,
            "command": " ".join(sys.argv),
            "versions": versions(),
        }
        write_atomically(output / METRICS, json.dumps(report, indent=2) + "\n")
    processes.wait_for_everyone()
    return json.loads((output / METRICS).read_text(encoding="utf-8"))


def read_predictions(output: Path) -> list[dict]:
    """The rows of predictions.jsonl: `index`, `name`, `question`, `references` and `prediction`.

    Those of questions with choices also have `choices`, `right` and `log_likelihoods`.
    """
    return [json.loads(line) for line in (output / PREDICTIONS).read_text(encoding="utf-8").splitlines()]


def _own_file(output: Path, process: int) -> Path:
    return output / (f"predictions.{process}.jsonl" if process else PREDICTIONS)


def _line(index: int, example: Example, said: Said) -> str:
    row = {"index": index, "name": example.question.name, "question": example.question.turns[-1].text}
    row |= {"references": example.references, "prediction": said.prediction}
    if example.choices:
        row |= {"choices": example.choices, "right": example.right, "log_likelihoods": said.likelihoods}
    return json.dumps(row) + "\n"


def _read(path: Path, examples: list[Example]) -> dict[int, Said]:
    """What was said, by index; what a kill has cut off is left out."""
    found: dict[int, Said] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line)
            index, name, question, prediction = (row[key] for key in ("index", "name", "question", "prediction"))
        except (ValueError, KeyError, TypeError):
            continue
        if index not in range(len(examples)) or not isinstance(prediction, str):
            continue
        of = examples[index].question
        likelihoods = row.get("log_likelihoods", [])
        if (of.name, of.turns[-1].text) == (name, question) and len(likelihoods) == len(examples[index].choices):
            found[index] = Said(prediction, likelihoods)
    return found


def _gather(output: Path, examples: list[Example]) -> dict[int, Said]:
    """Puts the files of all processes together as predictions.jsonl, in the order of the examples, each once."""
    others = sorted(output.glob("predictions.*.jsonl"))
    found: dict[int, Said] = {}
    for path in (output / PREDICTIONS, *others):
        found |= _read(path, examples)
    lines = [_line(index, examples[index], found[index]) for index in sorted(found)]
    write_atomically(output / PREDICTIONS, "".join(lines))
    for path in others:
        os.unlink(path)
    return found


def _refuse_another(output: Path, settings: dict) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose a folder.")
    if not any(path.stat().st_size for path in output.glob("predictions*.jsonl")):
        return  # nothing to lose, nothing to mix up
    if not (output / SETTINGS).exists():
        raise ValueError(f"{output} has predictions but no {SETTINGS} to say of what; choose another folder.")
    try:
        old = dict(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{output / SETTINGS} cannot be read; remove {output}, or choose another folder.") from error
    changed = sorted(name for name in settings if settings[name] != old.get(name))
    if changed:
        raise ValueError(
            f"{output} is of another evaluation, with other settings of {', '.join(changed)}; choose another folder."
        )
