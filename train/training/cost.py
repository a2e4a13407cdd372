"""What a training step costs and how fast the machine is: FLOPs, peak rates, memory.

Shapes: T tokens of a sample, P image tokens, D width.
"""

import copy
import re
import sys
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prefixvlm.modeling_vlm.cpu_prefix_vlm import product_dtype
from prefixvlm.train.recipes.stages import MODULES

# dense bfloat16 rates from the vendors' data sheets, in FLOP/s
PEAK_RATES = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
GEMM_SIZE = 1024
GEMM_REPEATS = 20


def training_flops(
    model,
    trains: Mapping[str, bool],
    images: float,
    tokens: float,
    squared_lengths: float,
    supervised: float,
    encoded_images: float | None = None,
) -> float:
    """Floating-point operations of training on some samples, counted as is usual for MFU.

    Two per weight and token forward, two more where a gradient flows to the layer's input, two more where the weight
    trains; 4 T² D per layer forward for the two products of attention, with nothing deducted for masks, and twice that
    backward. Activation checkpointing, padding, norms and activations are not counted.

    Args:
        model: a PrefixVLM, possibly wrapped or on the meta device.
        trains: for each of `MODULES` whether its trainable weights train.
        images: how many.
        tokens: image and text tokens of the decoder, without padding.
        squared_lengths: the sum of T² over the samples.
        supervised: tokens that the language head runs on.
        encoded_images: how many of the images go through the encoder rather than come from a cache; all by default.
    """
    config, size = model.config, model.config.vision_config.image_size
    patches = config.patch_grid**2
    encoded = images if encoded_images is None else encoded_images
    seen = {"vision_tower": encoded * patches, "projector": images * config.num_image_tokens, "language_model": tokens}
    squares = {"vision_tower": encoded * patches**2, "projector": 0, "language_model": squared_lengths}
    # width and number of layers of what attends
    attends = {
        "vision_tower": (config.vision_config, config.num_vision_layers),
        "language_model": (config.text_config, config.text_config.num_hidden_layers),
    }
    gradient_runs = False
    flops = 0.0
    for module in MODULES:
        part = getattr(model, module)
        weights, trainable = _weights(part, trains[module])
        if module == "language_model":
            head = model.get_output_embeddings().weight
            if model.get_input_embeddings().weight is not head:  # a tied one is not among the weights
                weights -= head.numel()
                trainable -= head.numel() if trains[module] and head.requires_grad else 0
            flops += 2 * supervised * head.numel() * (2 + (trains[module] and head.requires_grad))
        # gradients flow through a frozen decoder to the projector; a frozen encoder needs none
        gradient_runs = gradient_runs or trains[module]
        if module == "vision_tower" and config.num_vision_layers is None:
            flops += encoded * _counted_flops(part, size) * (1 + 2 * gradient_runs)
            continue
        flops += 2 * seen[module] * (weights * (1 + gradient_runs) + trainable)
        if module in attends:
            half, layers = attends[module]
            attention = 4 * squares[module] * _attention_width(half) * layers
            flops += attention * (1 + 2 * gradient_runs)
    return flops


def _attention_width(config) -> int:
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_width * config.num_attention_heads


@lru_cache(maxsize=1)
def _counted_flops(encoder: nn.Module, size: int) -> int:
    """Of one image, where layers see more positions than there are patches, as in convolutional encoders."""
    copied = copy.deepcopy(encoder).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(pixel_values=torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def _weights(part: nn.Module, trains: bool) -> tuple[int, int]:
    """The weights that take part in matrix products, and how many of them train. Embeddings are looked up."""
    embeddings = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
    # a leading 1 have the tables of positions and of class tokens that some encoders add
    weights = [w for w in part.parameters() if w.ndim > 1 and len(w) > 1 and id(w) not in embeddings]
    trainable = sum(weight.numel() for weight in weights if trains and weight.requires_grad)
    return sum(weight.numel() for weight in weights), trainable


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device can do at most, in FLOP/s: of an NVIDIA GPU by its name, of a CPU by a matrix product timed now.

    Where a CPU computes bfloat16 products in float32 (`modeling_vlm/cpu_prefix_vlm.py`), that is the rate. `None`
    for a device that is not in the list.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return PEAK_RATES.get(_product(name))
    if device.type != "cpu":
        return None
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=torch.Generator().manual_seed(0))
    square = square.to(product_dtype(dtype, device))
    fastest = min(_seconds(square, square) for _ in range(GEMM_REPEATS))
    return 2 * GEMM_SIZE**3 / fastest


def _product(name: str) -> str:
    """A GPU's name without the vendor, the memory and the socket, which change nothing: NVIDIA A100-SXM4-40GB is an A100.

    Anything else is part of the name: an A4000 is no A40, and a laptop's RTX 4090 or a slice of an H100 is slower.
    """
    words = name.replace("-", " ").split()
    kept = [word for word in words if not re.fullmatch(r"NVIDIA|Tesla|GeForce|\d+GB?|SXM\d*|HBM3e?", word, re.IGNORECASE)]
    # of the H100 alone the card is slower than the module
    return " ".join(word for word in kept if kept[0] == "H100" or word.upper() != "PCIE")


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    a @ b
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int:
    """The most bytes used so far: of a GPU by tensors, else of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Linux, where the other figure starts with that of the process that started this one
    said = status.read_text(encoding="utf-8") if status.is_file() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", said, re.MULTILINE):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def gradient_norms(named_parameters: Iterable, module_of) -> dict[str, float]:
    """The norm of the gradient of each module."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            gradients.setdefault(module_of(name), []).append(parameter.grad)
    norms = {module: nn.utils.get_total_norm(tensors) for module, tensors in gradients.items()}
    return {module: float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for module, norm in norms.items()}
