"""Run by `test_distributed.py` under torchrun: three steps of stage 2, its losses and gradient norms as JSON."""

import json
import sys

import torch
import torch.distributed as dist
from tiny import random_batch, tiny_model
from transformers import TrainingArguments

from prefixvlm.train.stages import PAPER_STAGES
from prefixvlm.train.trainer import StageTrainer

output, device_batch = sys.argv[1], int(sys.argv[2])
model = tiny_model()
batch = random_batch(model, [3, 9, 4, 7, 2, 8, 6, 5, 3, 4, 9, 2])
batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 1), -100)
rows = [{name: values[i] for name, values in batch.items()} for i in range(12)]
arguments = TrainingArguments(
    output_dir=output,
    per_device_train_batch_size=device_batch,
    max_steps=3,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    remove_unused_columns=False,
    disable_tqdm=True,
    ddp_backend="gloo",
)
trainer = StageTrainer(
    model,
    PAPER_STAGES[2],
    arguments,
    train_dataset=rows,
    data_collator=lambda some: {name: torch.stack([row[name] for row in some]) for name in some[0]},
)
trainer.train()
if trainer.is_world_process_zero():
    history = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    with open(f"{output}/history.json", "w") as file:
        json.dump(history, file)
if dist.is_initialized():
    dist.destroy_process_group()
