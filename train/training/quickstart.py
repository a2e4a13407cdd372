"""The whole method on real data in a quarter of an hour: four stages on easy-VQA, then a test by generation.

The last step answers questions in a fresh process that has no `prefixvlm`, only the folder that was saved.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.environment import choose_device, versions
from prefixvlm.inference.loading import load
from prefixvlm.train.data import easy_vqa
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation import figures
from prefixvlm.train.evaluation.answering import answer
from prefixvlm.train.recipes.schema import Recipe
from prefixvlm.train.training import run
from prefixvlm.train.training.checkpoints import complete_or_absent

SHOWN_QUESTIONS = 6

# Run by `python -c` where `import prefixvlm` fails, as for a user who has only transformers.
FRESH_PROCESS = """
import json, sys
sys.modules["prefixvlm"] = None
import transformers
from transformers import AutoProcessor
AutoModel = getattr(transformers, "AutoModelForVision2Seq", None) or transformers.AutoModelForImageTextToText
folder, questions = sys.argv[1], json.loads(sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for image, question in questions:
    messages = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def quickstart(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> dict:
    """Trains, tests and shows; leaves `final/`, metrics.json, loss.png and masks.png in `recipe.output`.

    Args:
        resume, overwrite: as for `run_recipe`.

    Returns:
        What metrics.json says: accuracies in [0, 1] over the test questions, seconds, parameters, versions.

    Raises:
        ValueError: as `run_recipe`, or if the fresh process cannot answer.
    """
    output = Path(recipe.output)
    started = time.perf_counter()
    last = run.run_recipe(recipe, resume=resume, overwrite=overwrite)
    seconds = {"training": time.perf_counter() - started}
    with complete_or_absent(output / "final") as partial:
        shutil.copytree(
            last, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "loss.png", "history.json")
        )
    histories = {
        f"stage {n}": json.loads((run.stage_folder(output, n) / "history.json").read_text(encoding="utf-8"))
        for n in recipe.stages
    }
    figures.save_loss_curve(histories, output / "loss.png")
    figures.save_masks(output / "masks.png")

    started = time.perf_counter()
    device = choose_device(recipe.device)
    metrics = test(str(output / "final"), device)
    seconds["testing"] = time.perf_counter() - started
    started = time.perf_counter()
    show(output / "final", device)
    seconds["fresh_process"] = time.perf_counter() - started
    seconds["total"] = sum(seconds.values())
    metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    metrics["seed"] = recipe.seed
    metrics["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
    metrics["versions"] = versions()
    write_atomically(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def test(folder: str, device: torch.device) -> dict:
    """Exact-match accuracy over all 9,673 test questions, each asked alone and answered by greedy generation."""
    model, processor = load(folder, device=device)
    questions, references = [], []
    for image, pairs in easy_vqa.questions_by_image("test").items():
        for question, reference in pairs:
            questions.append(Conversation.about([str(image)], [("user", question)], str(image)))
            references.append(reference)
    predictions = answer(model, processor, questions)
    right: dict[str, list[bool]] = {"shape": [], "color": [], "yes_no": []}
    for prediction, reference in zip(predictions, references, strict=True):
        kind = "shape" if reference in easy_vqa.SHAPES else "color" if reference in easy_vqa.COLORS else "yes_no"
        right[kind].append(prediction == reference)
    return {
        "questions": len(references),
        "accuracy": sum(map(sum, right.values())) / len(references),
        "accuracy_by_answer": {kind: sum(hits) / len(hits) for kind, hits in right.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def show(folder: Path, device: torch.device) -> None:
    """Prints test questions and the answers of a process that loads `folder` through the Auto classes alone."""
    asked: list[tuple[str, str, str]] = []
    for image, pairs in list(easy_vqa.questions_by_image("test").items())[:SHOWN_QUESTIONS]:
        question, reference = pairs[len(asked) % len(pairs)]
        asked.append((str(image), question, reference))
    arguments = [str(folder.resolve()), json.dumps([(image, question) for image, question, _ in asked]), str(device)]
    # in UTF-8 on every platform, here and there
    command = [sys.executable, "-X", "utf8", "-c", FRESH_PROCESS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"A fresh process could not load {folder}: {done.stderr.strip().splitlines()[-1:]}")
    print("\nA fresh process without prefixvlm, through the Auto classes with trust_remote_code=True, answers:")
    for (path, question, reference), said in zip(asked, done.stdout.splitlines()[-len(asked) :], strict=True):
        print(f"  {Path(path).name:>8}  {question:<45} {said:<12} (truth: {reference})")
