"""The studies: what is trained, arm by arm and seed by seed, and what is measured of it.

An arm is a recipe of the product's own; only the backbones come from `evidence.backbones`.
Shapes: B batch, T tokens.
"""

import hashlib
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evidence import backbones, data
from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.inference.loading import load
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.screening import screen
from prefixvlm.train.data.sources import load as load_samples
from prefixvlm.train.evaluation import text_loss
from prefixvlm.train.evaluation.answering import answer
from prefixvlm.train.evaluation.metrics.coco_caption.scores import caption_scores
from prefixvlm.train.evaluation.metrics.vqa.scores import vqa_scores
from prefixvlm.train.recipes.schema import parse_recipe
from prefixvlm.train.training.cost import training_flops
from prefixvlm.train.training.run import RECORD, run_recipe, stage_folder

SEEDS = range(5)
BATCH = 32
PROJECTOR_ONLY = {"vision_tower_lr": 0.0, "projector_lr": 3e-3, "language_model_lr": 0.0}
EVERYTHING = {"vision_tower_lr": 2e-4, "projector_lr": 2e-3, "language_model_lr": 1e-3}
FOUR_STAGES = {0: 40, 1: 40, 2: 120, 3: 80}  # steps on UCM captions
ONE_STAGE = 230  # steps of a single stage that come to the same floating-point operations
UCM_ARMS = {
    "prefix": ("prefix", FOUR_STAGES),
    "causal": ("causal", FOUR_STAGES),
    "without-stage-0": ("prefix", {1: 80, 2: 120, 3: 80}),
    "without-stage-1": ("prefix", {0: 80, 2: 120, 3: 80}),
    "single-stage": ("prefix", {3: ONE_STAGE}),
}
EASY_STEPS = {0: 40, 1: 40, 2: 80, 3: 250}
EASY_QUESTIONS = 2400  # of the 9,673 for testing, evenly spread
PAIR_STEPS = 100
TALK_STEPS = {1: 60, 3: 100}
TWO_IMAGES = data.TWO_IMAGE_QUESTIONS // 6  # questions for testing
NOISES = (0.0, 0.2, 0.4)
NOISE_SEEDS, NOISE_STEPS = range(3), 80
COCO_STEPS = {1: 30, 2: 90}
TEXT_SETS = ("coco", "pubmed_gpt-4", "writing_gpt-4", "xsum_gpt-3.5-turbo", "xsum_gpt-4")
DECODERS = ("neutral", "human", "both")


@dataclass(frozen=True)
class Workspace:
    """The folders of a run: the given data, and the output that everything is written to."""

    given: Path | None
    output: Path

    @property
    def data(self) -> Path:
        return self.output / "data"

    def backbone(self, name: str) -> Path:
        return self.output / "backbones" / name

    def run(self, *parts) -> Path:
        return self.output.joinpath("runs", *map(str, parts))

    def texts(self, name: str, key: str) -> list[str]:
        """The training captions of a prepared data set."""
        rows = data.lines(self.data / name)
        return [text for row in rows if row.get("split", "train") == "train" for text in row[key]]


def prepare(workspace: Workspace) -> dict:
    """Prepares the pictures and rows of all data sets."""
    data.prepare_easy_vqa(workspace.data / "easy")
    if workspace.given:
        data.prepare_ucm(workspace.given / "ucm_captions", workspace.data / "ucm")
        data.prepare_coco(workspace.given / "coco_photos", workspace.data / "coco")
        data.prepare_texts(workspace.given / "human_vs_machine_text", workspace.data / "texts")
        if has_radiographs(workspace):
            data.prepare_radiographs(workspace.given / "vqa_rad", workspace.data / "rad")
    return {}


def has_radiographs(workspace: Workspace) -> bool:
    """Whether VQA-RAD was given."""
    return workspace.given is not None and (workspace.given / "vqa_rad").is_dir()


def ucm_backbones(workspace: Workspace) -> dict:
    """Trains encoder and decoder on the training split of UCM captions."""
    rows = [row for row in data.lines(workspace.data / "ucm" / "captions.jsonl") if row["split"] == "train"]
    texts = [text for row in rows for text in row["texts"]]
    tokenizer = backbones.tokenizer_of([*texts, data.DESCRIBE, data.WHAT], 600)
    pairs = [(workspace.data / "ucm" / row["image"], row["texts"]) for row in rows]
    backbones.train_encoder(pairs, tokenizer, 500, 0, workspace.backbone("ucm-encoder"))
    return {"decoder_loss": backbones.train_decoder(texts, tokenizer, 150, 0, workspace.backbone("ucm-decoder"))}


def easy_backbones(workspace: Workspace) -> dict:
    """Trains an encoder on easy-VQA's training pictures and captions, a decoder on its captions, questions and answers."""
    rows = data.lines(workspace.data / "easy" / "captions-train.jsonl")
    captions = [text for row in rows for text in row["texts"]]
    said = []
    for row in data.lines(workspace.data / "easy" / "conversations-train.jsonl"):
        said += [f"{question} {reply}" for question, reply in data.asked_and_said(row)]
    tokenizer = backbones.tokenizer_of([*captions, *said, "first: second:"], 512)
    pairs = [(workspace.data / "easy" / row["image"], row["texts"]) for row in rows]
    backbones.train_encoder(pairs, tokenizer, 300, 0, workspace.backbone("easy-encoder"))
    return {
        "decoder_loss": backbones.train_decoder(captions * 2 + said, tokenizer, 150, 0, workspace.backbone("easy-decoder"))
    }


def rad_backbones(workspace: Workspace) -> dict:
    """Trains an encoder on VQA-RAD's training pictures and captions, a decoder on those and on what is said of them."""
    folder = workspace.data / "rad"
    rows = data.lines(folder / "captions-train.jsonl")
    captions = [text for row in rows for text in row["texts"]]
    said = []
    for row in data.lines(folder / "talks-train.jsonl"):
        texts = [turn["content"][-1]["text"] if turn["role"] == "user" else turn["content"] for turn in row["messages"]]
        said += [" ".join(texts[:2]), " ".join(texts[2:])]
    tokenizer = backbones.tokenizer_of([*captions, *said], 1000)
    pairs = [(folder / row["image"], row["texts"]) for row in rows]
    backbones.train_encoder(pairs, tokenizer, 300, 0, workspace.backbone("rad-encoder"))
    return {"decoder_loss": backbones.train_decoder(captions + said, tokenizer, 150, 0, workspace.backbone("rad-decoder"))}


def text_decoder(workspace: Workspace, kind: str) -> dict:
    """Trains a decoder for the comparison of texts: on `neutral` prose, on `human` captions, or on `both` kinds."""
    if kind == "neutral":
        texts, vocabulary = data.neutral_texts(), 2000
    else:
        human, machine = (workspace.texts("texts/coco-train.jsonl", key) for key in ("human", "machine"))
        texts = human if kind == "human" else human + machine[: len(human)]
        vocabulary = 1000
    tokenizer = backbones.tokenizer_of(texts, vocabulary)
    return {"decoder_loss": backbones.train_decoder(texts, tokenizer, 250, 0, workspace.backbone(f"text-{kind}"))}


def stage(source: dict, steps: int, rates: dict, changes: dict | None = None) -> dict:
    """A stage of a recipe, as values."""
    sizes = {"batch_size": BATCH, "device_batch_size": BATCH, "max_steps": steps, "epochs": 1000, "warmup": 0.05}
    return {"data": source, **sizes, **rates, "beta2": 0.99, **(changes or {})}


def stages_of(steps: dict[int, int], captions: dict, talks: dict, mode: str, last_rates: dict, **last) -> dict[int, dict]:
    """The stages that `steps` counts the steps of: 0 to 2 on captions, 3 on conversations; 0 is bidirectional.

    Args:
        mode: the mask of stages 1 to 3.
        last_rates: learning rates of stage 3.
        last: what else is special about stage 3.
    """
    mask = {"attention_mode": mode}
    made_of = {
        0: (captions, PROJECTOR_ONLY, {}),
        1: (captions, PROJECTOR_ONLY, mask),
        2: (captions, EVERYTHING, mask),
        3: (talks, last_rates, mask | last),
    }
    return {number: stage(made_of[number][0], count, *made_of[number][1:]) for number, count in steps.items()}


def train(output: Path, seed: int, model: dict, stages: dict[int, dict]) -> tuple[Path, dict]:
    """Runs a recipe; returns the last stage's folder and the run's losses, operations, seconds and hash of weights."""
    recipe = parse_recipe({"output": str(output), "seed": seed, "logging_steps": 5, "model": model, "stages": stages})
    started = time.perf_counter()
    folder = run_recipe(recipe, overwrite=True)  # a run may be whole, and what it came to not yet written
    losses = {}
    for number in stages:
        history = json.loads((stage_folder(output, number) / "history.json").read_text())
        keys = ("step", "loss", "loss_noised", "loss_clean")
        losses[number] = [{key: entry[key] for key in keys if key in entry} for entry in history if "loss" in entry]
    return folder, {
        "losses": losses,
        "teraflops": operations(output, folder, recipe) / 1e12,
        "seconds": round(time.perf_counter() - started, 1),
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }


def operations(output: Path, folder: Path, recipe) -> float:
    """Floating-point operations of a run, by the count that the trainer's MFU uses, for samples of mean length."""
    model, processor = load(str(folder))
    total = 0.0
    for number, stage_recipe in recipe.stages.items():
        record = json.loads((stage_folder(output, number) / RECORD).read_text())
        collator = ConversationCollator(processor, stage_recipe.stage.text_format)
        sizes = screen(load_samples(**stage_recipe.data), collator, stage_recipe.max_length, measure=True)
        images, tokens, supervised = map(statistics.fmean, (sizes.images, sizes.lengths, sizes.supervised))
        a_sample = training_flops(
            model.requires_grad_(True), stage_recipe.stage.trains, images, tokens, tokens**2, supervised
        )
        total += a_sample * record["steps"] * stage_recipe.stage.batch_size
    return total


def from_backbones(workspace: Workspace, encoder: str, decoder: str) -> dict:
    """The `model` part of a recipe."""
    return {
        "vision": str(workspace.backbone(encoder)),
        "text": str(workspace.backbone(decoder)),
        "config": {"projector_hidden_size": 384},
    }


def ucm(workspace: Workspace, arm: str, seed: int, mode: str | None = None) -> dict:
    """An arm on UCM captions: CIDEr and BLEU-4 of greedy captions of the test split, and how often the class is right."""
    own_mode, steps = UCM_ARMS[arm]
    mode = mode or own_mode
    folder = workspace.data / "ucm"
    captions = {"source": "captions", "path": str(folder / "captions.jsonl")}
    talks = {"source": "llava", "path": str(folder / "conversations.jsonl")}
    if len(steps) == 1:  # what the four stages see, in the same shares
        share = {"captions": FOUR_STAGES[0] + FOUR_STAGES[1] + FOUR_STAGES[2], "talks": FOUR_STAGES[3]}
        parts = [captions | {"weight": share["captions"]}, talks | {"weight": share["talks"]}]
        talks = {"source": "mixture", "parts": parts}
    output = workspace.run("ucm", mode if mode != own_mode else arm, seed)
    last, result = train(
        output,
        seed,
        from_backbones(workspace, "ucm-encoder", "ucm-decoder"),
        stages_of(steps, captions, talks, mode, EVERYTHING),
    )
    model, processor = load(str(last))
    rows = [row for row in data.lines(folder / "captions.jsonl") if row["split"] == "test"]
    asked = [Conversation.about([str(folder / row["image"])], [("user", data.DESCRIBE)]) for row in rows]
    said = answer(model, processor, asked, batch_size=70, max_new_tokens=30)
    again = [
        Conversation.about(one.images, [*one.said, ("assistant", caption), ("user", data.WHAT)])
        for one, caption in zip(asked, said, strict=True)
    ]
    classes = answer(model, processor, again, batch_size=70, max_new_tokens=10)
    scores = caption_scores(said, [row["texts"] for row in rows], metrics=("Bleu_4", "CIDEr")).scores
    hits = [name == row["class_by_index"] for name, row in zip(classes, rows, strict=True)]
    return result | {
        "CIDEr": 100 * scores["CIDEr"],
        "Bleu_4": 100 * scores["Bleu_4"],
        "class_accuracy": 100 * sum(hits) / len(hits),
    }


def easy(workspace: Workspace, mode: str, seed: int) -> dict:
    """The four stages on easy-VQA under one mask: accuracy of greedy answers to test questions."""
    folder = workspace.data / "easy"
    captions = {"source": "captions", "path": str(folder / "captions-train.jsonl")}
    talks = {"source": "llava", "path": str(folder / "conversations-train.jsonl")}
    faster = EVERYTHING | {"language_model_lr": 3e-3}
    small = {"batch_size": 8, "device_batch_size": 8, "max_tokens_per_row": 512}
    stages = stages_of(EASY_STEPS, captions, talks, mode, faster, **small)
    model = from_backbones(workspace, "easy-encoder", "easy-decoder")
    last, result = train(workspace.run("easy", mode, seed), seed, model, stages)
    questions = []
    for row in data.lines(folder / "conversations-test.jsonl"):
        questions += [([row["image"]], *pair) for pair in data.asked_and_said(row)]
    step = len(questions) / EASY_QUESTIONS
    return result | _accuracies(last, folder, [questions[int(index * step)] for index in range(EASY_QUESTIONS)])


def pairs(workspace: Workspace, mode: str, seed: int) -> dict:
    """Questions about one of two pictures, from what `easy` left after stage 2 under the same kind of mask."""
    folder = workspace.data / "easy"
    start = stage_folder(workspace.run("easy", "causal" if mode == "causal" else "prefix", seed), 2)
    source = {"source": "vqa", "path": str(folder / "pairs-train.jsonl")}
    rates = EVERYTHING | {"language_model_lr": 3e-3}
    last, result = train(
        workspace.run("pairs", mode, seed),
        seed,
        {"start": str(start)},
        {3: stage(source, PAIR_STEPS, rates, {"attention_mode": mode})},
    )
    rows = [(row["images"], row["question"], row["answer"]) for row in data.lines(folder / "pairs-test.jsonl")]
    return result | _accuracies(last, folder, rows)


def talks(workspace: Workspace, name: str, mode: str, seed: int) -> dict:
    """Conversations about three pictures, each where it was shown: accuracy of the answers of both turns."""
    folder = workspace.data / name
    captions = {"source": "captions", "path": str(folder / "captions-train.jsonl")}
    source = {"source": "messages", "path": str(folder / "talks-train.jsonl")}
    faster = EVERYTHING | {"language_model_lr": 3e-3}
    last, result = train(
        workspace.run("talks", name, mode, seed),
        seed,
        from_backbones(workspace, f"{name}-encoder", f"{name}-decoder"),
        stages_of(TALK_STEPS, captions, source, mode, faster),
    )
    model, processor = load(str(last))
    samples = load_samples("messages", path=str(folder / "talks-test.jsonl"), split="test")
    whole = [samples[index] for index in range(len(samples))]
    for turn, end in {"first": 1, "second": 3}.items():
        asked = [replace(one, turns=one.turns[:end]) for one in whole]
        said = answer(model, processor, asked, batch_size=100, max_new_tokens=6)
        scores = vqa_scores(said, [one.turns[end].text for one in whole]).scores
        result |= {f"{turn}_{kind}": 100 * scores[kind] for kind in ("overall", "yes_no", "open")}
    return result


def _accuracies(last: Path, folder: Path, questions: list[tuple[list[str], str, str]]) -> dict:
    model, processor = load(str(last))
    asked = [
        Conversation.about([str(folder / image) for image in images], [("user", text)]) for images, text, _ in questions
    ]
    said = answer(model, processor, asked, batch_size=100, max_new_tokens=6)
    scores = vqa_scores(said, [reference for *_, reference in questions]).scores
    return {f"{name}_accuracy": 100 * scores[name] for name in ("overall", "yes_no", "open")}


def noise(workspace: Workspace, level: float, trained: str, seed: int) -> dict:
    """Stage 0 with a share of noise; then the loss on held-out captions where the token asked for can be seen, where it is
    noise, and under the prefix mask of the later stages.

    Args:
        trained: `projector`, as in the paper, or `everything`, which could learn to copy.
    """
    folder = workspace.data / "ucm"
    captions = {"source": "captions", "path": str(folder / "captions.jsonl")}
    rates = PROJECTOR_ONLY if trained == "projector" else EVERYTHING
    last, result = train(
        workspace.run("noise", trained, level, seed),
        seed,
        from_backbones(workspace, "ucm-encoder", "ucm-decoder"),
        {0: stage(captions, NOISE_STEPS, rates, {"noise": level})},
    )
    model, processor = load(str(last))
    samples = load_samples(**captions | {"split": "test"})
    chosen = [samples[index] for index in range(0, len(samples), 2)]
    visible, hidden = _caption_losses(model, processor, chosen, noise=0.2)
    model.config.attention_mode = "prefix"
    later, _ = _caption_losses(model, processor, chosen, noise=0.0)
    return result | {"target_visible": visible, "target_noised": hidden, "prefix_mask": later}


@torch.inference_mode()
def _caption_losses(model, processor, samples: list, noise: float) -> tuple[float, float | None]:
    """Mean loss on tokens that stand in the input as they are, and on those that are noise there, in nats."""
    collator = ConversationCollator(processor, "caption", noise=noise, seed=0)
    sums = {False: [0.0, 0], True: [0.0, 0]}
    for start in range(0, len(samples), BATCH):
        batch = collator(samples[start : start + BATCH])
        is_noised = batch.pop("is_noised", torch.zeros_like(batch["labels"], dtype=torch.bool))
        losses = model(**batch, use_cache=False, skip_logits=True).token_losses
        targets_noised = is_noised[:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
        for kind, total in sums.items():
            chosen = losses[targets_noised == kind]
            total[0] += chosen.sum().item()
            total[1] += chosen.numel()
    return tuple(total / count if count else None for total, count in sums.values())


def coco(workspace: Workspace, writer: str, seed: int) -> dict:
    """How fast a captioner learns what `human`s or `machine`s say of the same photos: stages 1 and 2."""
    source = {
        "source": "captions",
        "path": str(workspace.data / "coco" / "captions.jsonl"),
        "split": "val2017",
        "texts": writer,
    }
    _, result = train(
        workspace.run("coco", writer, seed),
        seed,
        from_backbones(workspace, "ucm-encoder", "text-both"),
        {
            1: stage(source, COCO_STEPS[1], PROJECTOR_ONLY),
            2: stage(source, COCO_STEPS[2], EVERYTHING),
        },
    )
    last = [entry["loss"] for entry in result["losses"][2]][-4:]
    first = [entry["loss"] for entry in result["losses"][1]][:1]
    return result | {"first_loss": first[0], "last_loss": sum(last) / len(last)}


def texts(workspace: Workspace, decoder: str) -> dict:
    """`prefixvlm text-loss` on human and machine texts, side by side."""
    reports = {}
    for name in TEXT_SETS if decoder == "neutral" else TEXT_SETS[:1]:
        file = workspace.data / "texts" / f"{name}.jsonl"
        sets = [f"{writer}={file}:{writer}" for writer in ("human", "machine")]
        reports[name] = text_loss.compare(str(workspace.backbone(f"text-{decoder}")), sets, max_tokens=backbones.ROW)
    return {"reports": reports}
