"""Samples with none, one and three images, training on them in every way, and the loss and gradients they have alone."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.feature_cache import FeatureCache
from prefixvlm.train.data.order import OrderedSamples
from prefixvlm.train.recipes.schema import LoraRecipe
from prefixvlm.train.recipes.stages import PAPER_STAGES, Stage
from prefixvlm.train.training import lora
from prefixvlm.train.training.cost import gradient_norms
from prefixvlm.train.training.trainer import StageTrainer, module_of

IMAGES = (0, 1, 3, 0, 0, 1, 0)  # of each sample; an odd number, so that two processes need a padding sample
BATCH = 8  # all of them, and that padding sample
PROCESSOR = tiny_processor()
GIGABYTE = 10**9


def ragged_samples() -> list[Conversation]:
    samples = []
    for number, images in enumerate(IMAGES):
        pictures = [Image.new("RGB", (16, 16), (40 * number, 80 * index, 90)) for index in range(images)]
        turns = [("user", "q" * (1 + number)), ("assistant", "a" * (9 - number))]
        samples.append(Conversation.about(pictures, turns, f"row {number}"))
    return samples


def stage_and_model(number: int, adapters=()) -> tuple[Stage, torch.nn.Module]:
    stage = PAPER_STAGES[number]
    if adapters:  # and the projector in full
        stage = replace(
            stage, **{f"{module}_lr": 1e-3 * (module in adapters) for module in ("vision_tower", "language_model")}
        )
    model = tiny_model(stage.attention_mode)
    stage.prepare(model)
    if adapters:
        torch.manual_seed(0)
        model = lora.add_adapters(model, LoraRecipe(r=4, modules=list(adapters)), stage)
        with torch.no_grad():  # else no gradient would pass them
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return stage, model


def train_ragged(
    folder: Path,
    number: int,
    *,
    trainer_class=StageTrainer,
    device_batch: int = 1,
    checkpointing: bool = False,
    packed: bool = False,
    cached: bool = False,
    adapters=(),
    bf16: bool = False,
) -> list[dict]:
    """Two steps of a stage, each on all samples, in this process or in all; what was logged of them."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    stage, model = stage_and_model(number, adapters)
    cache = FeatureCache(folder, model.vision_tower, torch.float32, GIGABYTE, rank, processes) if cached else None
    collator = ConversationCollator(
        PROCESSOR,
        stage.text_format,
        noise=stage.noise,
        max_tokens_per_row=60 if packed else 0,
        feature_cache=cache,
        pad_failures=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=BATCH // (device_batch * processes),
        gradient_checkpointing=checkpointing,
        bf16=bf16,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_backend="gloo" if processes > 1 else None,
    )
    samples = OrderedSamples(ragged_samples(), list(range(len(IMAGES))), None, seed=0)
    trainer = trainer_class(model, stage, arguments, train_dataset=samples, data_collator=collator, feature_cache=cache)
    trainer.train()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # where transformers keeps bf16 for all later runs of this process
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def each_alone(number: int, adapters=()) -> dict[str, float]:
    """What the first step must log: the mean loss of all supervised tokens and its gradients, the samples one by one."""
    stage, model = stage_and_model(number, adapters)
    collator = ConversationCollator(PROCESSOR, stage.text_format, noise=stage.noise)
    samples = OrderedSamples(ragged_samples(), list(range(len(IMAGES))), None, seed=0)
    batches = [collator([samples[(0, index, False)]]) for index in range(len(IMAGES))]
    items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        batch.pop("is_noised", None)
        part = model(**batch, num_items_in_batch=items, use_cache=False).loss
        if part.requires_grad:  # without an image nothing may train
            part.backward()
        loss += part.item()
    norms = gradient_norms(model.named_parameters(), module_of)
    return {"loss": loss, **{f"grad_norm/{module}": float(norm) for module, norm in norms.items()}}


def accuracy(prediction) -> dict[str, float]:
    """What a user's `compute_metrics` does: it reads `predictions` as the logits."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    asked = labels != -100
    return {"right": float((logits.argmax(-1) == labels)[asked].mean()), "asked": int(asked.sum())}


def evaluate_ragged(folder: Path, **arguments) -> dict[str, float]:
    """What transformers' own `Trainer` finds, in this process or in all."""
    options = {
        "per_device_eval_batch_size": 1,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
    }
    trainer = Trainer(
        tiny_model(),
        TrainingArguments(output_dir=str(folder), **options | arguments),
        eval_dataset=ragged_samples(),
        data_collator=ConversationCollator(PROCESSOR, "conversation"),
        compute_metrics=accuracy,
    )
    return trainer.evaluate()
