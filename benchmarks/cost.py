"""How cost grows with the length of the text, the batch, the images and the questions, with the exponent fitted.

One pass through the model for the first three; for questions, `EncodedImages` from the image to the last answer's first
token. An exponent of 1 means twice the time for twice the amount; `marginal` is that between the two largest amounts.
"""

import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import Setup, alternate, grown
from benchmarks.questions import QUESTIONS
from prefixvlm import EncodedImages

ROUNDS = 3
TEXTS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16)
IMAGES = (1, 2, 4, 8)
QUESTION_COUNTS = (1, 2, 4, 8)
PATCHES, WORDS = 256, 32


def run(setup: Setup) -> list[dict]:
    amounts = {"text tokens": TEXTS, "batch": BATCHES, "images": IMAGES}
    shapes = {name: [_shape(name, amount) for amount in values] for name, values in amounts.items()}
    whole, least = (
        (ROUNDS + 1) * sum(_flops(common.paper_config(depth), *shape) for values in shapes.values() for shape in values)
        for depth in (1.0, 0.0)
    )
    depth = setup.depth(whole, least, common.gemm_rate(setup))
    model = common.prefix_vlm(setup, depth)
    config = model.config
    results = []
    with torch.inference_mode():
        for name, values in amounts.items():
            calls = {amount: _pass(model, setup, *shape) for amount, shape in zip(values, shapes[name], strict=True)}
            gflop = [_flops(config, *shape) / 1e9 for shape in shapes[name]]
            seconds = alternate(calls, setup.device, ROUNDS)
            results.append(grown(f"cost by {name}", seconds, gflop, setup, depth))
        processor = common.processor_for(QUESTIONS, 600, model)
        picture = Image.effect_noise((224, 224), 64).convert("RGB")
        calls = {
            count: lambda count=count: EncodedImages(model, processor, picture).ask(list(QUESTIONS[:count]), 1)
            for count in QUESTION_COUNTS
        }
        seconds = alternate(calls, setup.device, ROUNDS)
        results.append(grown("cost by questions about one image", seconds, None, setup, depth))
    return results


def _shape(name: str, amount: int) -> tuple[int, int, int]:
    """Rows, images a row, and words a row."""
    return {"text tokens": (1, 1, amount), "batch": (amount, 1, WORDS), "images": (1, amount, WORDS)}[name]


def _flops(config, rows: int, images: int, words: int) -> float:
    return rows * common.forward_flops(config, images, PATCHES, images * PATCHES + words)


def _pass(model, setup: Setup, rows: int, images: int, words: int):
    inputs = common.prompt(model.config.image_token_id, images * PATCHES, words, setup.device, rows)
    pictures = common.pixels(setup, rows * images, 3, 224, 224)
    return lambda: model(**inputs, pixel_values=pictures, logits_to_keep=1, use_cache=True)
