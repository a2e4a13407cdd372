"""A model of every encoder and one of every decoder, saved for others to load."""

from collections.abc import Iterator
from pathlib import Path

import torch
from decoders import DECODERS, decoder
from encoders import ENCODERS, encoder, save_decoder
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModel

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor

SHAPES = {"image_size": 48, "pixel_shuffle": 2}  # what models of other tests leave out


def save_joined(root, measure, photo: str) -> dict:
    """Saves a model of each encoder and of each decoder, below `root` by its name.

    Args:
        measure: of clean_process.py.
        photo: path of the picture to ask about.

    Returns:
        What each says, by its name.
    """
    said = {}
    for name, *halves, shapes, options in _halves(Path(root, "halves")):
        model = PrefixVLMForConditionalGeneration.from_backbones(*halves, **shapes, **options)
        processor = PrefixVLMProcessor.from_backbones(*halves, **shapes)
        said[name] = measure(model, processor, photo)
        for part in (model, processor):
            part.save_pretrained(Path(root, name))
    return said


def _halves(root: Path) -> Iterator[tuple]:
    """Saves pairs of halves; yields a name, the folders of encoder and decoder, and how to join them."""
    text = root / "text"
    save_decoder(text)
    for name in ENCODERS:
        encoder(name).save_pretrained(root / name)
        yield name, root / name, text, SHAPES, {"vision_feature_layer": -2, "projector_norm": True}
    vision = root / "vision"
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config().vision_config).save_pretrained(vision)
    for kind in DECODERS:
        decoder(kind).save_pretrained(root / kind)
        tiny_tokenizer().save_pretrained(root / kind)
        yield kind, vision, root / kind, {}, {}
