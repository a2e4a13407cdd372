"""What all benchmarks share: timing in alternation, the limits of the machine, and the models that are compared.

A model's size is the `paper` preset's. Where that would not fit the time at hand, every side keeps the same share of its
layers (`depth`), which each result says.
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor
from prefixvlm.inference.environment import versions
from prefixvlm.modeling_vlm.cpu_prefix_vlm import OneRowProducts, product_dtype
from prefixvlm.train.training.starting_model import train_tokenizer

REPEATS = 5
# products of the paper's model: encoder, projector and decoder, over one image and over a batch of four
GEMM_SHAPES = ((256, 1152, 4304), (288, 896, 4864), (1152, 896, 4864), (1024, 1152, 4304), (2048, 2048, 2048))
VOCABULARY, WIDTH = 151_936, 896
REACHED = 0.65  # the share of that rate that whole models reach, to estimate how long they take


@dataclass
class Setup:
    """What to measure on, in which precision, and for how long.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of weights and activations.
        seconds: roughly how long one benchmark may take; `None` for full size, however long it takes.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float | None

    def depth(self, flops: float, fixed: float, rate: float) -> float:
        """The share of the layers with which `flops` operations, of which `fixed` are not the layers', fit the time."""
        if self.seconds is None:
            return 1.0
        return min(1.0, max(0.0, (self.seconds * REACHED * rate - fixed) / (flops - fixed)))

    def __str__(self) -> str:
        return f"{device_name(self.device)}, {str(self.dtype).removeprefix('torch.')}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} cores, {platform.machine()} with {capability}"


def emit(name: str, setup: Setup | None = None, **values) -> dict:
    """Prints a result as one line of JSON, and returns it."""
    where = {"where": str(setup)} if setup else {"where": f"{os.cpu_count()} cores, {platform.machine()}"}
    result = {"measurement": name, **values, **where, "versions": versions()}
    print(json.dumps(result), flush=True)
    return result


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, including the work it queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternate(calls: dict[str, Callable], device: torch.device, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each call over `repeats` rounds in which the calls alternate, after one warm-up round.

    Every second round runs in reverse order; otherwise one call would always run right after the largest model.
    """
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(seconds_of(calls[name], device))
        order.reverse()
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """The ratio of the medians."""
    return round(statistics.median(slow) / statistics.median(fast), 3)


def summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "rounds": len(seconds),
    }


def grown(name: str, seconds: dict[int, list[float]], gflop, setup: Setup, depth: float, **values) -> dict:
    """Prints how time grows with an amount, such as of images, and returns it; `gflop` are the operations of each."""
    amounts = list(seconds)
    medians = [statistics.median(seconds[amount]) for amount in amounts]
    return emit(
        name,
        setup,
        depth=round(depth, 3),
        layers=layers(paper_config().text_config, depth),
        amounts=amounts,
        seconds=[summary(seconds[amount]) for amount in amounts],
        gflop=None if gflop is None else [round(one, 1) for one in gflop],
        exponent=round(exponent(amounts, medians), 2),
        marginal=round(math.log(medians[-1] / medians[-2]) / math.log(amounts[-1] / amounts[-2]), 2),
        exponent_of_flops=None if gflop is None else round(exponent(amounts, gflop), 2),
        **values,
    )


def exponent(amounts, seconds) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(amounts), np.log(seconds), 1)[0])


def in_process(module: str, *arguments) -> dict:
    """What a benchmark prints last, as JSON, when it is run in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def gemm_rate(setup: Setup) -> float:
    """The highest FLOP/s that matrix products of the model's shapes reach."""
    rates = []
    for rows, inner, columns in GEMM_SHAPES:
        a = torch.randn(rows, inner, device=setup.device).to(setup.dtype)
        b = torch.randn(columns, inner, device=setup.device).to(setup.dtype)
        seconds = [seconds_of(lambda a=a, b=b: functional.linear(a, b), setup.device) for _ in range(REPEATS + 1)][1:]
        rates.append(2 * rows * inner * columns / min(seconds))
    return max(rates)


def limit_rate(setup: Setup) -> float:
    """`gemm_rate`, in the dtype that our model's products are computed in."""
    return gemm_rate(Setup(setup.device, product_dtype(setup.dtype, setup.device), None))


def gemv_bandwidth(setup: Setup) -> float:
    """The highest bytes per second of a product of one row with the vocabulary matrix, with oneDNN or without."""
    row = torch.randn(1, WIDTH, device=setup.device).to(setup.dtype)
    matrix = torch.randn(VOCABULARY, WIDTH, device=setup.device).to(setup.dtype)
    seconds = []
    for context in (nullcontext(), OneRowProducts()):
        with context:
            seconds += [seconds_of(lambda: functional.linear(row, matrix), setup.device) for _ in range(2 * REPEATS)]
    return matrix.numel() * matrix.element_size() / min(seconds)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has arithmetic for it, as GPUs and CPUs with AVX-512 BF16 or AMX do; else float32."""
    return product_dtype(torch.bfloat16, device)


def forward_flops(
    config, images: int, patches: int, tokens: int, head_tokens: int = 1, projected: int | None = None
) -> float:
    """FLOPs of one pass through encoder, projector and decoder: 2 per weight and token, and 4 T^2 D per layer of attention.

    Args:
        config: with `vision_config` (SigLIP) and `text_config` (Qwen 2).
        images: pictures or crops that the encoder reads.
        patches: of each.
        tokens: that the decoder reads.
        head_tokens: that the language head runs on.
        projected: what the projector reads; by default all patches.
    """
    vision, text = config.vision_config, config.text_config
    head_width = text.hidden_size // text.num_attention_heads
    decoder_layer = text.hidden_size * (
        2 * text.hidden_size + 2 * text.num_key_value_heads * head_width + 3 * text.intermediate_size
    )
    encoder_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    hidden = getattr(config, "projector_hidden_size", None) or text.hidden_size
    weights = {
        "encoder": (
            images * patches,
            vision.num_hidden_layers * encoder_layer + 3 * vision.patch_size**2 * vision.hidden_size,
        ),
        "projector": (
            images * patches if projected is None else projected,
            hidden * (vision.hidden_size + text.hidden_size),
        ),
        "decoder": (tokens, text.num_hidden_layers * decoder_layer),
        "head": (head_tokens, text.hidden_size * text.vocab_size),
    }
    attention = 4 * images * patches**2 * vision.hidden_size * vision.num_hidden_layers
    attention += 4 * tokens**2 * text.hidden_size * text.num_hidden_layers
    return attention + sum(2 * rows * count for rows, count in weights.values())


def layers(config, depth: float) -> int:
    return max(1, round(depth * config.num_hidden_layers))


def paper_config(depth: float = 1.0) -> PrefixVLMConfig:
    config = PrefixVLMConfig.from_preset("paper")
    for half in (config.vision_config, config.text_config):
        shorten(half, depth)
    return config


def shorten(config, depth: float) -> None:
    config.num_hidden_layers = layers(config, depth)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]


def prefix_vlm(setup: Setup, depth: float = 1.0) -> PrefixVLMForConditionalGeneration:
    return _built(PrefixVLMForConditionalGeneration, paper_config(depth), setup)


def llava_config(depth: float = 1.0) -> LlavaConfig:
    """LLaVA of the same encoder and decoder, which also reads the encoder's last layer; its projector is narrower."""
    paper = paper_config(depth)
    return LlavaConfig(
        vision_config=paper.vision_config,
        text_config=paper.text_config,
        image_token_index=paper.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=paper.num_image_tokens,
        tie_word_embeddings=True,
    )


def llava(setup: Setup, depth: float = 1.0) -> LlavaForConditionalGeneration:
    return _built(LlavaForConditionalGeneration, llava_config(depth), setup)


def onevision_config(depth: float = 1.0) -> LlavaOnevisionConfig:
    """LLaVA-OneVision-0.5B: SigLIP-so400m at 384 pixels but for its last layer, crops of an image, the same decoder."""
    config = LlavaOnevisionConfig(text_config=paper_config().text_config.to_dict(), tie_word_embeddings=True)
    for half in (config.vision_config, config.text_config):
        shorten(half, depth)
    return config


def onevision(setup: Setup, depth: float = 1.0) -> LlavaOnevisionForConditionalGeneration:
    return _built(LlavaOnevisionForConditionalGeneration, onevision_config(depth), setup)


def _built(model_class, config, setup: Setup):
    default = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)  # from the start, so that no wider copy counts among the memory
    try:
        with torch.device(setup.device), _QuickWeights():
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # texts of the length that is asked for
    model.generation_config.pad_token_id = 0
    return model


class _QuickWeights(TorchFunctionMode):
    """Random weights by repeating a thousand numbers: drawing a billion takes longer than some of the measurements."""

    DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in self.DRAWS or args[0].is_meta:
            return function(*args, **(kwargs or {}))
        tensor = args[0]
        numbers = 0.02 * torch.randn(1013, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        numbers = numbers.to(tensor.device, tensor.dtype)
        flat = tensor.detach().view(-1)
        whole = len(flat) // len(numbers) * len(numbers)
        flat[:whole].view(-1, len(numbers)).copy_(numbers)
        flat[whole:].copy_(numbers[: len(flat) - whole])
        return tensor


def prompt(image_token_id: int, image_tokens: int, text_tokens: int, device, rows: int = 1) -> dict[str, torch.Tensor]:
    """Image tokens, then random words, in each row."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 100_000, (rows, text_tokens), generator=generator)
    images = torch.full((rows, image_tokens), image_token_id)
    input_ids = torch.cat([images, words], dim=1).to(device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def processor_for(texts: Sequence[str], vocab_size: int, model=None) -> PrefixVLMProcessor:
    """A processor of the paper's sizes whose tokenizer knows the words of `texts`; tells the model its image token."""
    tokenizer = train_tokenizer(texts, vocab_size)
    processor = PrefixVLMProcessor(siglip_image_processor(224), tokenizer, num_image_tokens=256)
    if model is not None:
        model.config.image_token_id = processor.image_token_id
    return processor


def pixels(setup: Setup, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setup.device, setup.dtype)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
