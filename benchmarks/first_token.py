"""Time to the first token: one image and 32 text tokens through `generate`, ours against LLaVA and LLaVA-OneVision.

Inputs are prepared, so resizing and tokenizing are left out on every side. LLaVA-OneVision reads 640x480 pixels. The limit
is the operations of our pass at the rate of the fastest matrix product of the run.
"""

import statistics

import torch

from benchmarks import common
from benchmarks.common import Setup, alternate, emit, ratio, summary

TEXT_TOKENS = 32
PATCHES = 256
# what LLaVA-OneVision's own processor makes of 640x480: the whole picture and four crops of 384 pixels, 729 patches each;
# of the crops 40 rows of 54 hold picture, each with a token for its end. The model refuses any other number of tokens.
PICTURE = (480, 640)
ONEVISION_CROPS, ONEVISION_PATCHES = 5, 729
ONEVISION_TOKENS = 729 + 40 * 54 + 40


def run(setup: Setup) -> list[dict]:
    rate = common.gemm_rate(setup)
    full = _flops(1.0)
    rounds = common.REPEATS + 1
    depth = setup.depth(rounds * sum(full.values()), rounds * sum(_flops(0.0).values()), rate)
    calls = {}
    for name, side in SIDES.items():
        model, inputs = side(setup, depth)
        calls[name] = lambda model=model, inputs=inputs: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    with torch.inference_mode():
        seconds = alternate(calls, setup.device)
    limit_rate = common.limit_rate(setup)
    limit = _flops(depth)["PrefixVLM"] / limit_rate
    return [
        emit(
            "time to first token",
            setup,
            depth=round(depth, 3),
            **{name: {**summary(seconds[name]), "full_size_gflop": round(full[name] / 1e9, 1)} for name in SIDES},
            faster_than_llava=ratio(seconds["LLaVA"], seconds["PrefixVLM"]),
            faster_than_onevision=ratio(seconds["LLaVA-OneVision"], seconds["PrefixVLM"]),
            onevision_gflop_over_ours=round(full["LLaVA-OneVision"] / full["PrefixVLM"], 2),
            gemm_gflops=round(limit_rate / 1e9, 1),
            times_the_gemm_limit=round(statistics.median(seconds["PrefixVLM"]) / limit, 3),
        )
    ]


def prefix_vlm(setup: Setup, depth: float):
    model = common.prefix_vlm(setup, depth)
    return model, _square(setup, model.config.image_token_id)


def llava(setup: Setup, depth: float):
    model = common.llava(setup, depth)
    return model, _square(setup, model.config.image_token_index)


def onevision(setup: Setup, depth: float):
    model = common.onevision(setup, depth)
    words = common.prompt(model.config.image_token_index, ONEVISION_TOKENS, TEXT_TOKENS, setup.device)
    pictures = common.pixels(setup, 1, ONEVISION_CROPS, 3, 384, 384)
    return model, {**words, "pixel_values": pictures, "image_sizes": torch.tensor([PICTURE], device=setup.device)}


def _square(setup: Setup, image_token_id: int) -> dict:
    words = common.prompt(image_token_id, PATCHES, TEXT_TOKENS, setup.device)
    return {**words, "pixel_values": common.pixels(setup, 1, 3, 224, 224)}


def _flops(depth: float) -> dict[str, float]:
    return {
        "PrefixVLM": common.forward_flops(common.paper_config(depth), 1, PATCHES, PATCHES + TEXT_TOKENS),
        "LLaVA": common.forward_flops(common.llava_config(depth), 1, PATCHES, PATCHES + TEXT_TOKENS),
        "LLaVA-OneVision": common.forward_flops(
            common.onevision_config(depth), ONEVISION_CROPS, ONEVISION_PATCHES, ONEVISION_TOKENS + TEXT_TOKENS
        ),
    }


SIDES = {"PrefixVLM": prefix_vlm, "LLaVA": llava, "LLaVA-OneVision": onevision}
