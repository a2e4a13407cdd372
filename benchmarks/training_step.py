"""A training step on images with ragged captions, batch 4: `StageTrainer` against LLaVA under transformers' `Trainer`.

Both sides train the same modules from the same samples with AdamW, in stage 1 the projector alone and in stage 2
everything, data loading included. LLaVA reads batches padded to their longest row, as its examples do. Every run is a
process of its own, since two models with their optimisers would not fit side by side, and the sides take turns; the memory
is the largest of the process (of a GPU: of its tensors). `cached` is stage 1 from the second epoch on, when the frozen
encoder's features are read from disk; stage 2 trains the encoder and cannot.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks import common
from benchmarks.common import Setup, emit, summary
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.feature_cache import FeatureCache
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training.cost import peak_memory, training_flops
from prefixvlm.train.training.trainer import StageTrainer

BATCH = 4
ROUNDS, STEPS = 2, 3  # each round is a process, whose first step does not count
SIDES = {1: ("PrefixVLM", "PrefixVLM cached", "LLaVA"), 2: ("PrefixVLM", "LLaVA")}
PICTURES, IMAGE_TOKENS = 8, 256
BUILT_IN = Path(__file__).with_name("captions.txt")


def run(setup: Setup, captions: Path = BUILT_IN) -> list[dict]:
    whole, least = (ROUNDS * (STEPS + 1) * _flops_of_all(depth) for depth in (1.0, 0.0))
    depth = setup.depth(whole, least, common.gemm_rate(setup))
    return [_stage(setup, stage, depth, captions) for stage in SIDES]


def _stage(setup: Setup, stage: int, depth: float, captions: Path) -> dict:
    runs = {side: [] for side in SIDES[stage]}
    for _ in range(ROUNDS):
        for side, results in runs.items():
            results.append(_process(setup, side, stage, depth, captions))
    seconds = {side: [one for result in results for one in result["seconds"]] for side, results in runs.items()}
    memory = {side: max(result["peak_bytes"] for result in results) for side, results in runs.items()}
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ours = runs["PrefixVLM"][0]
    rate = statistics.median(result["gemm_rate"] for result in runs["PrefixVLM"])
    return emit(
        f"stage {stage} training step",
        setup,
        depth=round(depth, 3),
        batch=BATCH,
        **{side: {**summary(seconds[side]), "peak_gib": round(memory[side] / 2**30, 2)} for side in runs},
        faster_than_llava=round(medians["LLaVA"] / medians["PrefixVLM"], 3),
        **({"cached_faster_than_llava": round(medians["LLaVA"] / medians["PrefixVLM cached"], 3)} if stage == 1 else {}),
        memory_of_llava=round(memory["PrefixVLM"] / memory["LLaVA"], 3),
        gflop_a_step=round(ours["flops"] / 1e9, 1),
        gemm_gflops=round(rate / 1e9, 1),
        mfu=round(ours["flops"] / medians["PrefixVLM"] / rate, 3),
        **_logged(runs["PrefixVLM"]),
        samples_per_second=round(BATCH / medians["PrefixVLM"], 3),
    )


def _logged(results: list[dict]) -> dict:
    """Nothing on a device whose rate the trainer does not know."""
    logged = [result["logged_mfu"] for result in results if result["logged_mfu"] is not None]
    return {"mfu_logged_by_the_trainer": round(statistics.median(logged), 3)} if logged else {}


def _process(setup: Setup, side: str, stage: int, depth: float, captions: Path) -> dict:
    dtype = str(setup.dtype).removeprefix("torch.")
    return common.in_process("benchmarks.training_step", side, stage, depth, setup.device, dtype, captions)


def _flops_of_all(depth: float) -> float:
    """Roughly the FLOPs of one step of every side in both stages on the built-in captions."""
    model = common.prefix_vlm(Setup(torch.device("meta"), torch.float32, None), depth)
    tokens, words = 280, 24
    flops = 0.0
    for stage, sides in SIDES.items():
        ours = _flops(model, stage, BATCH, BATCH * tokens, BATCH * tokens**2, BATCH * words)
        # LLaVA runs its head on every token, forward and backward
        head = 2 * (2 + (stage == 2)) * BATCH * tokens * common.VOCABULARY * common.WIDTH
        flops += ours * len(sides) + head
    return flops


def _flops(model, stage: int, images, tokens, squared_lengths, supervised) -> float:
    return training_flops(model, PAPER_STAGES[stage].trains, images, tokens, squared_lengths, supervised)


def texts(path: Path) -> list[str]:
    """Captions of a file: one a line, or of each row of JSONL the first of its `texts`."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines if path.suffix == ".txt" else [json.loads(line)["texts"][0] for line in lines]


def main() -> None:
    """One side's run in this process; prints what it took as JSON."""
    parser = argparse.ArgumentParser()
    for name, kind in (
        ("side", str),
        ("stage", int),
        ("depth", float),
        ("device", str),
        ("dtype", str),
        ("captions", Path),
    ):
        parser.add_argument(name, type=kind)
    options = parser.parse_args()
    set_seed(0)
    setup = Setup(torch.device(options.device), getattr(torch, options.dtype), None)
    captions = texts(options.captions)
    model = common.llava(setup, options.depth) if options.side == "LLaVA" else common.prefix_vlm(setup, options.depth)
    processor = common.processor_for(captions, 2000, model)
    if options.side == "LLaVA":
        model.config.image_token_index = model.config.image_token_id
    pictures = [Image.effect_noise((320, 240), 64).convert("RGB") for _ in range(PICTURES)]
    count = BATCH * (STEPS + 1)
    samples = [
        Conversation.about(
            [pictures[index % PICTURES]],
            [("user", ""), ("assistant", captions[index % len(captions)])],
            f"sample {index}",
        )
        for index in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = _train(options, setup, model, processor, samples, Path(folder))
    print(json.dumps({**result, "gemm_rate": common.limit_rate(setup)}))


def _train(options, setup: Setup, model, processor, samples: list[Conversation], folder: Path) -> dict:
    clock = _Clock(setup.device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS + 1,
        learning_rate=1e-5,
        logging_steps=STEPS + 1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=setup.device.type == "cpu",
        disable_tqdm=True,
    )
    make_collator = partial(ConversationCollator, processor, "caption")
    given = {"model": model, "args": arguments, "train_dataset": samples, "callbacks": [clock]}
    if options.side == "LLaVA":
        if options.stage == 1:
            model.requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(True)
        trainer = Trainer(data_collator=make_collator(), **given)
    else:
        cache = None
        if options.side == "PrefixVLM cached":
            cache = FeatureCache(folder / "features", model.vision_tower, setup.dtype, 2**33)
            for start in range(0, PICTURES, BATCH):  # the first epoch
                batch = make_collator(feature_cache=cache)(samples[start : start + BATCH])
                cache.complete({name: tensor.to(setup.device) for name, tensor in batch.items()}, model.get_vision_features)
        stage = replace(PAPER_STAGES[options.stage], batch_size=BATCH)
        collator = make_collator(feature_cache=cache)
        trainer = StageTrainer(stage=stage, feature_cache=cache, data_collator=collator, **given)
    trainer.train()
    lengths = [len(sample) for sample in make_collator().encoded(samples)]
    squares, words = sum(length**2 for length in lengths), sum(lengths) - len(samples) * IMAGE_TOKENS
    counts = (value / (STEPS + 1) for value in (len(samples), sum(lengths), squares, words))
    flops = None if options.side == "LLaVA" else _flops(model, options.stage, *counts)
    logged = [entry["mfu"] for entry in trainer.state.log_history if "mfu" in entry]
    return {
        "seconds": clock.seconds,
        "peak_bytes": peak_memory(setup.device),
        "flops": flops,
        "logged_mfu": logged[0] if logged else None,
    }


class _Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, so with the loading of data."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, [], None

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


if __name__ == "__main__":
    main()
