"""transformers' Trainer with one learning rate a module, the paper's cosine, and the losses of stage 0 told apart."""

import math
import re
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from prefixvlm.modeling_vlm.modeling_prefix_vlm import IGNORE_INDEX
from prefixvlm.train.stages import MODULES, Stage


def module_of(parameter_name: str) -> str:
    """Which of `MODULES` a parameter belongs to, also below the prefixes that wrappers (PEFT, DDP) put before it."""
    found = re.search(rf"(?:^|\.)({'|'.join(MODULES)})\.", parameter_name)
    if found is None:
        raise ValueError(f"The parameter {parameter_name} belongs to none of {', '.join(MODULES)}.")
    return found[1]


def cosine_with_floor(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """The factor on a learning rate: a linear rise, then half a cosine from 1 down to `floor` at `total_steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class StageTrainer(Trainer):
    """Trains a PrefixVLM for one `Stage`.

    Freezes what the stage freezes, gives every trainable parameter the rate of its module (with and without weight decay
    apart), lets every rate end at exactly `stage.min_lr`, and computes logits at supervised positions only.

    Args:
        stage: the stage; its rates and schedule win over those of `args`.
        args, kwargs: as for `Trainer`.
    """

    def __init__(self, model, stage: Stage, args, **kwargs):
        stage.prepare(model)
        self.stage = stage
        super().__init__(model=model, args=args, **kwargs)
        self._loss_sums = {}

    def create_optimizer(self, model=None):
        """AdamW over groups (module, decay or not); each trainable parameter is in exactly one, no frozen one in any."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((module_of(name), name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options["betas"] = (self.stage.beta1, self.stage.beta2)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.stage.learning_rates[module],
                        "weight_decay": self.stage.weight_decay if decay else 0.0,
                        "module": module,
                    }
                    for (module, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Cosine decay to `stage.min_lr` in every group, whatever its rate.

        transformers' own `cosine_with_min_lr` has one ratio for all groups, so all floors but one would come out wrong.
        """
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup_steps = math.ceil(self.stage.warmup * num_training_steps)
            factors = [
                partial(
                    cosine_with_floor,
                    warmup_steps=warmup_steps,
                    total_steps=num_training_steps,
                    floor=self.stage.min_lr / group["lr"],
                )
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_noised = inputs.pop("is_noised", None)
        inputs = {**inputs, "use_cache": False, "skip_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if is_noised is not None:
            # in the order of token_losses: row by row, where a token is asked for
            targets_noised = is_noised[:, 1:][inputs["labels"][:, 1:] != IGNORE_INDEX]
            self._add_losses("loss_noised", outputs.token_losses[targets_noised])
            self._add_losses("loss_clean", outputs.token_losses[~targets_noised])
        return (loss, outputs) if return_outputs else loss

    def _add_losses(self, name: str, losses: torch.Tensor) -> None:
        total, count = self._loss_sums.get(name, (0.0, 0))
        self._loss_sums[name] = (total + losses.sum(), count + losses.numel())

    def log(self, logs, *args, **kwargs):
        """Adds each module's learning rate and stage 0's two losses (of this process) since the last log."""
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{group['module']}": group["lr"] for group in self.optimizer.param_groups}
            logs |= {name: float(total) / count for name, (total, count) in self._loss_sums.items() if count}
            self._loss_sums = {}
        super().log(logs, *args, **kwargs)
