"""transformers' Trainer with one learning rate per module, the paper's cosine, our data order, and a more detailed log."""

import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.train.data.order import EpochSampler, OrderedSamples, StreamedSamples
from prefixvlm.train.data.screening import Report
from prefixvlm.train.recipes.stages import MODULES, Stage
from prefixvlm.train.training.checkpoints import SealCheckpoints
from prefixvlm.train.training.cost import gradient_norms, peak_memory, peak_rate, training_flops
from prefixvlm.train.training.validation import Validation

COUNTS = ("samples", "tokens", "squared_lengths", "slots", "supervised", "images", "encoded_images")
LOSSES = ("loss_noised", "loss_clean")  # of stage 0


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

    Freezes what the stage freezes, gives every trainable parameter the rate of its module (in groups with and without
    weight decay), lets every rate end at exactly `stage.min_lr`, and computes logits at supervised positions only. Besides
    what `Trainer` logs, it logs each module's rate and gradient norm (before clipping), throughput, MFU and peak memory.

    Args:
        stage: the stage; its rates and schedule override those of `args`.
        feature_cache: the `FeatureCache` that the collator looks images up in, if any.
        report: the `Report` that records samples that fail in training.
        validation: what `evaluate` measures the held-out loss on, in place of an `eval_dataset`.
        args, kwargs: as for `Trainer`.
    """

    optimizer: Any  # None until it is created
    lr_scheduler: Any

    def __init__(
        self,
        model,
        stage: Stage,
        args,
        feature_cache=None,
        report: Report | None = None,
        validation: Validation | None = None,
        **kwargs,
    ):
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0: transformers would take the token at a position for the one to predict."
            )
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant must be false: where the input of a layer needs no gradient, as in the image encoder, its "
                "adapters would get none."
            )
        stage.prepare(model)
        self.stage = stage
        self.feature_cache = feature_cache
        self.report = report
        self.validation = validation
        self._evaluated = (0.0, 0)  # the sum of the losses of supervised tokens, and how many there were
        if validation is not None:
            kwargs["eval_dataset"] = validation.samples
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(SealCheckpoints())
        self.add_callback(_BeforeEveryStep(self))
        self._meter = _Meter()
        self._peak_rate: float | None = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.bf16:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's own policy would also sum the gradients, and return the loss, in bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if self.is_sharded:
            for module in self.model.modules():
                if hasattr(module, "calls_all_modules"):
                    module.calls_all_modules = True
        if self.is_sharded and self.feature_cache is not None:
            # which images have to be encoded differs between processes, and with sharded weights all must encode together
            raise ValueError("Sharded weights cannot be combined with a feature cache; leave out feature_cache_gb.")

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are or may be spread over the processes, so that none of them has a whole model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_optimizer(self, model=None):
        """AdamW over groups (module, decay or not); each trainable parameter is in exactly one, no frozen one in any."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
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
            factors: list[Callable[[int], float]] = [
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

    def _get_train_sampler(self, train_dataset=None):
        samples = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(samples, OrderedSamples):
            return super()._get_train_sampler(train_dataset)
        processes, device_batch = self.args.world_size, self.args.train_batch_size
        self.sampler = EpochSampler(samples, self.stage.batch_size, device_batch * processes if processes > 1 else 1)
        return self.sampler

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, StreamedSamples):
            return super().get_train_dataloader()
        # each process reads its share of a stream; accelerate would split it once more
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if self.validation is None or eval_dataset not in (None, self.validation.samples):
            return super().get_eval_dataloader(eval_dataset)
        samples = self.validation.samples
        batch = self.args.eval_batch_size
        loader = torch.utils.data.DataLoader(
            samples,
            batch_size=batch,
            sampler=EpochSampler(samples, batch, batch * self.args.world_size if self.args.world_size > 1 else 1),
            collate_fn=self.validation.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args, **kwargs):
        """As `Trainer`'s, of which training does not notice anything: random numbers and throughput stay as they are."""
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # the CPU's: a loader draws a seed
            metrics = super().evaluate(*args, **kwargs)
        self.leave_out_of_throughput(time.perf_counter() - started)
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As `Trainer`'s, but the loss is the mean over all supervised tokens, not over the means of batches."""
        self._evaluated = (0.0, 0)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, counts = zip(*gather_object([self._evaluated]), strict=True)
        if any(counts):
            output.metrics[f"{metric_key_prefix}_loss"] = sum(sums) / sum(counts)
        return output

    @property
    def better_checkpoint(self) -> Path | None:
        """The checkpoint of the best model, where that is kept and is not the one in memory."""
        is_another = self.state.best_global_step != self.state.global_step
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end and is_another else None
        return None if best is None else Path(best)

    def _load_best_model(self):
        # accelerate 1 cannot load a whole model into the shards of FSDP2; its files are as good
        if self.better_checkpoint is not None and not self.is_sharded:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        # a weight that shares its storage with one that was loaded, as a tied head does, is not missing
        missing, weights = load_result.missing_keys, self.model.state_dict()
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        missing[:] = [name for name in missing if name not in weights or weights[name].data_ptr() not in loaded]
        super()._issue_warnings_after_load(load_result)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_noised = inputs.pop("is_noised", None)
        for seed, name, reason in inputs.pop("failed", ()):
            if self.validation is not None and not model.training:
                self.validation.add_failure(seed, name, reason)
            elif self.report is not None:
                self.report.add(name, reason, occurrence=seed)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # a batch may hold nothing but padding samples
        if model.training:
            self._meter.add_batch(inputs)
        if "image_keys" in inputs:
            encode = self.accelerator.unwrap_model(model).get_vision_features
            inputs["vision_features"] = self.feature_cache.complete(inputs, encode)
        inputs = {**inputs, "use_cache": False, "skip_logits": model.training or self.compute_metrics is None}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if is_noised is not None and model.training:
            # in the order of token_losses: row by row, where there is a target
            targets_noised = is_noised[:, 1:][inputs["labels"][:, 1:] != IGNORE_INDEX]
            self._meter.add("loss_noised", outputs.token_losses[targets_noised])
            self._meter.add("loss_clean", outputs.token_losses[~targets_noised])
        if not model.training:
            losses, (total, count) = outputs.token_losses, self._evaluated
            self._evaluated = (total + losses.double().sum().item(), count + losses.numel())
        return (loss, outputs) if return_outputs else loss

    def before_epoch(self) -> None:
        """Tells the sampler which epoch it is, also in a resumed run."""
        if hasattr(self, "sampler"):
            self.sampler.epoch = math.floor(self.state.epoch + 1e-6)

    def before_step(self) -> None:
        """Keeps the gradients' norms for the log, while there are gradients."""
        if (self.state.global_step + 1) % self.args.logging_steps == 0 or self.args.logging_first_step:
            self._gradient_norms = gradient_norms(self.model.named_parameters(), module_of)

    def leave_out_of_throughput(self, seconds: float) -> None:
        """Leaves these seconds out of the time since the last log."""
        self._meter.started += seconds

    def log(self, logs, *args, **kwargs):
        """Adds to what is logged in training: rates, gradient norms, stage 0's two losses, throughput, MFU and memory."""
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{group['module']}": group["lr"] for group in self.optimizer.param_groups}
            logs |= self._norms_before_clipping(logs.get("grad_norm"))
            logs |= self._throughput()
            if self.report is not None:
                self.report.exchange()
        super().log(logs, *args, **kwargs)

    def _norms_before_clipping(self, total: float | None) -> dict[str, float]:
        # measured after clipping, which has scaled all alike; before, their root sum of squares was `total`
        norms = self.__dict__.pop("_gradient_norms", {})
        clipped = math.sqrt(sum(norm**2 for norm in norms.values()))
        scale = total / clipped if total and clipped else 1.0
        return {f"grad_norm/{module}": norm * scale for module, norm in norms.items()}

    def _throughput(self) -> dict[str, float]:
        own, seconds = self._meter.read()
        sums = {name: float(self.accelerator.reduce(value.to(self.args.device))) for name, value in own.items()}
        logs = {name: sums[name] / sums[f"{name}_count"] for name in LOSSES if sums[f"{name}_count"]}
        logs["samples_per_second"] = sums["samples"] / seconds
        logs["tokens_per_second"] = sums["tokens"] / seconds
        logs["real_token_share"] = sums["tokens"] / max(1.0, sums["slots"])
        if self._peak_rate is None:
            started = time.perf_counter()
            self._peak_rate = peak_rate(self.args.device, torch.bfloat16 if self.args.bf16 else self.model.dtype) or 0.0
            self.leave_out_of_throughput(time.perf_counter() - started)
        if self._peak_rate:
            counts = {name: sums[name] for name in COUNTS if name not in ("samples", "slots")}
            flops = training_flops(self.accelerator.unwrap_model(self.model), self.stage.trains, **counts)
            logs["mfu"] = flops / seconds / (self._peak_rate * self.args.world_size)
        logs["peak_memory_gib"] = peak_memory(self.args.device) / 2**30
        return logs


class _BeforeEveryStep(TrainerCallback):
    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.before_epoch()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()


class _Meter:
    """Sums over the batches since it was last read, kept on the device until then."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.sums = {name: torch.zeros(()) for name in (*COUNTS, *LOSSES, *(f"{n}_count" for n in LOSSES))}
        self.started = time.perf_counter()

    def read(self) -> tuple[dict[str, torch.Tensor], float]:
        """The sums and the seconds they were gathered in; starts over."""
        sums, seconds = self.sums, time.perf_counter() - self.started
        self.clear()
        return sums, seconds

    def add(self, name: str, losses: torch.Tensor) -> None:
        self._add(name, losses.sum())
        self._add(f"{name}_count", losses.numel())

    def add_batch(self, inputs: dict) -> None:
        lengths = _sample_lengths(inputs["attention_mask"], inputs["labels"], inputs.get("document_ids"))
        self._add("samples", (lengths > 0).sum())
        self._add("tokens", lengths.sum())
        self._add("squared_lengths", lengths.float().square().sum())
        self._add("slots", inputs["attention_mask"].numel())
        self._add("supervised", (inputs["labels"] != IGNORE_INDEX).sum())
        encoded = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
        self._add("encoded_images", encoded)
        self._add("images", len(inputs.get("image_keys", range(encoded))))

    def _add(self, name: str, value) -> None:
        self.sums[name] = self.sums[name] + value


def _sample_lengths(attention_mask: torch.Tensor, labels: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, S) tokens of each sample of a row; 0 where there is none, and of padding samples, which have nothing to learn."""
    if document_ids is None:
        document_ids = torch.ones_like(attention_mask)
    counts = attention_mask.new_zeros(2, len(labels), 1 + labels.shape[1])  # padding belongs to document 0
    tokens, supervised = (
        count.scatter_add_(1, document_ids, of.to(count.dtype))
        for count, of in zip(counts, (attention_mask, labels != IGNORE_INDEX), strict=True)
    )
    return tokens * (supervised > 0)
