"""Runs a model over a test set and scores what it says; a run that was interrupted goes on from its predictions.jsonl.

Under accelerate each process answers its share, and writes a file of its own until the main one puts all together.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.environment import choose_device, versions
from prefixvlm.train.evaluation.answering import Decoding, answers
from prefixvlm.train.evaluation.kept_answers import KeptAnswers
from prefixvlm.train.evaluation.likelihoods import log_likelihoods
from prefixvlm.train.evaluation.metrics.choices import choice_scores
from prefixvlm.train.evaluation.metrics.intervals import bootstrap
from prefixvlm.train.evaluation.metrics.vqa.scores import vqa_scores
from prefixvlm.train.evaluation.tasks import Example

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"


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
    kept = KeptAnswers(output, Path(PREDICTIONS).stem, partial(_parsed, examples))
    line = partial(_line, examples)
    processes = PartialState(cpu=choose_device().type == "cpu")
    # a run that was out of memory goes on with smaller batches
    how = {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
    settings = json.loads(json.dumps(settings | {"decoding": how, "examples": len(examples)}))
    kept.refuse_another(settings)
    processes.wait_for_everyone()
    if processes.is_main_process:
        kept.begin(settings)
        kept.gather(line)
    processes.wait_for_everyone()
    done = kept.read()
    processes.wait_for_everyone()
    waiting = [index for index in range(len(examples)) if index not in done]
    if done and processes.is_main_process:
        print(f"{len(done):,} of {len(examples):,} were answered before.", file=sys.stderr)
    # whoever comes first may be slower: shares are dealt out by length, as batches are
    waiting.sort(key=lambda index: sum(len(text) for _, text in examples[index].question.said))
    mine = waiting[processes.process_index :: processes.num_processes]
    questions = [example.question for example in examples]
    with kept.file(processes.process_index).open("a", encoding="utf-8") as file:
        for batch in answers(model, processor, questions, mine, decoding, processes.is_main_process):
            asked = [examples[index] for index, _ in batch]
            choices = [one.choices for one in asked]
            likelihoods = log_likelihoods(model, processor, [one.question for one in asked], choices, decoding.batch_size)
            for (index, text), values in zip(batch, likelihoods, strict=True):
                file.write(line(index, Said(text, values)))
            file.flush()
    processes.wait_for_everyone()
    if processes.is_main_process:
        said = kept.gather(line)
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


def _line(examples: list[Example], index: int, said: Said) -> str:
    example = examples[index]
    row = {"index": index, "name": example.question.name, "question": example.question.turns[-1].text}
    row |= {"references": example.references, "prediction": said.prediction}
    if example.choices:
        row |= {"choices": example.choices, "right": example.right, "log_likelihoods": said.likelihoods}
    return json.dumps(row) + "\n"


def _parsed(examples: list[Example], row: dict) -> tuple[int, Said] | None:
    """What a line says, if it is of these examples."""
    index, name, question, prediction = (row[key] for key in ("index", "name", "question", "prediction"))
    if index not in range(len(examples)) or not isinstance(prediction, str):
        return None
    of = examples[index].question
    likelihoods = row.get("log_likelihoods", [])
    is_same = (of.name, of.turns[-1].text) == (name, question) and len(likelihoods) == len(examples[index].choices)
    return (index, Said(prediction, likelihoods)) if is_same else None
