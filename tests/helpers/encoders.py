"""Vision encoders of every kind that is proven to work, tiny and random, and a decoder to join them to."""

import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
)

SIZE, PATCH, LAYERS = 32, 8, 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": SIZE, "patch_size": PATCH}
CAPTIONS = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}

# SigLIP 2 of fixed resolution is of SigLIP's classes
ENCODERS = {
    "SigLIP, SigLIP 2": lambda: AutoModel.from_config(SiglipVisionConfig(**VISION)),
    "SigLIP, SigLIP 2 (two towers)": lambda: SiglipModel(SiglipConfig(text_config=CAPTIONS, vision_config=VISION)),
    "CLIP": lambda: AutoModel.from_config(CLIPVisionConfig(**VISION)),
    "CLIP (two towers)": lambda: CLIPModel(CLIPConfig(text_config=CAPTIONS, vision_config=VISION, projection_dim=16)),
    "DINOv2": lambda: AutoModel.from_config(Dinov2Config(**VISION)),
    "DINOv2 with registers": lambda: AutoModel.from_config(Dinov2WithRegistersConfig(**VISION)),
    "ViT": lambda: AutoModel.from_config(ViTConfig(**VISION)),
    "DeiT": lambda: AutoModel.from_config(DeiTConfig(**VISION)),
}


def encoder(name: str):
    """An encoder whose positions and layers differ clearly."""
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "position_embedding" in weight_name:
                weight.normal_()
            elif weight.ndim > 1:
                weight.mul_(3)
    return model


def image_tower(model):
    return getattr(model, "vision_model", model)


def save_decoder(folder) -> None:
    """A decoder with its tokenizer."""
    tiny_model().language_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
