"""Time and peak memory by the number of images in a row, each followed by words: prefill, and a training step.

`prefill` is the pass that fills the cache of `generate`. `training` is forward and backward with everything trained and the
words supervised, without the optimiser. Every amount is a process of its own, since the memory is the largest of a process
(of a GPU: of its tensors). In `cost`, all images stand before the words and share one process.

Shapes: B = 1 row of T = images * (P + 32) tokens, P = 256 image tokens.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Setup, alternate, grown
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training.cost import peak_memory, training_flops

ROUNDS = 3
IMAGES = (1, 2, 4, 8)
PATCHES, WORDS = 256, 32
CONVERSATIONS = PAPER_STAGES[3]  # everything trains
CLEAR_REFS = Path("/proc/self/clear_refs")  # on Linux


def run(setup: Setup) -> list[dict]:
    whole, least = ((ROUNDS + 1) * 1e9 * sum(map(sum, _gflop(depth).values())) for depth in (1.0, 0.0))
    depth = setup.depth(whole, least, common.gemm_rate(setup))
    dtype = str(setup.dtype).removeprefix("torch.")
    found = {images: common.in_process("benchmarks.images", images, depth, setup.device, dtype) for images in IMAGES}
    return [
        grown(
            f"cost by images in a row, {kind}",
            {images: one[kind]["seconds"] for images, one in found.items()},
            gflop,
            setup,
            depth,
            peak_gib=[round(one[kind]["peak_bytes"] / 2**30, 2) for one in found.values()],
        )
        for kind, gflop in _gflop(depth).items()
    ]


def _gflop(depth: float) -> dict[str, list[float]]:
    """The operations of each amount."""
    model = common.prefix_vlm(Setup(torch.device("meta"), torch.float32, None), depth)
    counted = {"prefill": [], "training": []}
    for images in IMAGES:
        tokens = images * (PATCHES + WORDS)
        counted["prefill"].append(common.forward_flops(model.config, images, PATCHES, tokens) / 1e9)
        trained = training_flops(model, CONVERSATIONS.trains, images, tokens, tokens**2, images * WORDS)
        counted["training"].append(trained / 1e9)
    return counted


def row(image_token_id: int, images: int, device) -> dict[str, torch.Tensor]:
    """Images, each followed by random words, which are the labels."""
    input_ids = common.prompt(image_token_id, PATCHES, WORDS, device)["input_ids"].repeat(1, images)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == image_token_id, -100)}


def main() -> None:
    """One amount in this process; prints what it took as JSON."""
    parser = argparse.ArgumentParser()
    for name, kind in (("images", int), ("depth", float), ("device", str), ("dtype", str)):
        parser.add_argument(name, type=kind)
    options = parser.parse_args()
    setup = Setup(torch.device(options.device), getattr(torch, options.dtype), None)
    model = common.prefix_vlm(setup, options.depth)
    inputs = row(model.config.image_token_id, options.images, setup.device)
    pictures = common.pixels(setup, options.images, 3, 224, 224)

    @torch.inference_mode()
    def prefill():
        model(inputs["input_ids"], pixel_values=pictures, logits_to_keep=1, use_cache=True)

    def training():
        model(**inputs, pixel_values=pictures, skip_logits=True, use_cache=False).loss.backward()
        model.zero_grad()

    result = {"prefill": _measured(prefill, setup.device)}
    CONVERSATIONS.prepare(model)
    model.train()
    print(json.dumps({**result, "training": _measured(training, setup.device)}))


def _measured(call, device: torch.device) -> dict:
    # building the model, or what was measured before, may have taken more than this will
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # of all that it can clear, only the peak; see proc(5)
    seconds = alternate({"": call}, device, ROUNDS)[""]
    return {"seconds": seconds, "peak_bytes": peak_memory(device)}


if __name__ == "__main__":
    main()
