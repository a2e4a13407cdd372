"""Decoding: tokens a second through `generate` after an image and 32 text tokens, against the bandwidth of the weights.

The prompt lies in the cache already, so that only new tokens are timed. Every weight of the decoder and its head is read
once a token; the limit is their bytes at the rate of the largest matrix times one row, measured in the same run.
"""

import copy
import statistics

import torch

from benchmarks import common
from benchmarks.common import Setup, alternate, emit, ratio, summary
from prefixvlm.inference.int8 import quantize_int8

NEW_TOKENS = 16
PATCHES, TEXT_TOKENS = 256, 32


def run(setup: Setup) -> list[dict]:
    plain = common.prefix_vlm(setup)
    quantized = quantize_int8(copy.deepcopy(plain))
    peer = common.llava(setup)
    models = {"PrefixVLM": plain, "PrefixVLM int8": quantized, "LLaVA": peer}
    calls = {name: _decoding(model, setup) for name, model in models.items()}
    bandwidth = common.gemv_bandwidth(setup)
    seconds = alternate(calls, setup.device)
    bandwidth = max(bandwidth, common.gemv_bandwidth(setup))
    read = sum(p.numel() * p.element_size() for p in plain.language_model.parameters() if p.ndim > 1)
    rates = {name: NEW_TOKENS / statistics.median(values) for name, values in seconds.items()}
    return [
        emit(
            "decoding",
            setup,
            **{name: {**summary(seconds[name]), "tokens_per_second": round(rates[name], 2)} for name in models},
            megabytes_a_token=round(read / 1e6, 1),
            gemv_gb_per_second=round(bandwidth / 1e9, 2),
            share_of_the_bandwidth_limit=round(rates["PrefixVLM"] * read / bandwidth, 3),
            int8_over_plain=ratio(seconds["PrefixVLM"], seconds["PrefixVLM int8"]),
            faster_than_llava=ratio(seconds["LLaVA"], seconds["PrefixVLM"]),
        )
    ]


@torch.inference_mode()
def _decoding(model, setup: Setup):
    image_token_id = model.config.image_token_id
    inputs = common.prompt(image_token_id, PATCHES, TEXT_TOKENS, setup.device)
    picture = common.pixels(setup, 1, 3, 224, 224)
    cache = model(**inputs, pixel_values=picture, use_cache=True, logits_to_keep=1).past_key_values
    first = torch.full((1, 1), 100, device=setup.device)
    inputs = {
        name: torch.cat([tensor, first if name == "input_ids" else first * 0 + 1], 1) for name, tensor in inputs.items()
    }

    def decode():
        kept = copy.deepcopy(cache)
        model.generate(**inputs, past_key_values=kept, max_new_tokens=NEW_TOKENS, do_sample=False)

    return decode
