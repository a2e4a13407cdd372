"""Small pretrained backbones for the studies: an encoder trained as SigLIP is, and a decoder trained on text alone.

Both are saved as ordinary checkpoints, which `from_backbones` loads as it loads SigLIP and Qwen.

Shapes: B batch, T tokens; pictures (B, 3, 48, 48).
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel, set_seed

from evidence.data import SIZE
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor
from prefixvlm.train.training.starting_model import train_tokenizer

VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}
TEXT_TOWER = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,  # with 0.02, so narrow a model learns slowly what to attend to
    "tie_word_embeddings": True,
}
LONGEST = 32  # maximum tokens of a caption in contrastive training
BATCH = 64
ROW = 128  # tokens per row in the decoder's training


def tokenizer_of(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts` and the names of the chat roles."""
    return train_tokenizer([*texts, "user", "assistant", "system"], vocab_size)


def train_encoder(pairs, tokenizer, steps: int, seed: int, folder: Path, log=print) -> None:
    """Trains image and text towers on (picture, texts) pairs with SigLIP's sigmoid loss (arXiv 2303.15343, eq. 1).

    Pictures are rotated and mirrored at random, which no text of the studies tells apart.

    Args:
        pairs: (path of a picture, its texts) each.
    """
    set_seed(seed)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path, _ in pairs])
    pixels = pixels.permute(0, 3, 1, 2)
    flat = pixels.float().div(255).transpose(0, 1).flatten(1)
    mean, std = flat.mean(dim=1), flat.std(dim=1)
    config = SiglipConfig(
        text_config={
            **TEXT_TOWER,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LONGEST,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=VISION,
    )
    model = SiglipModel(config)
    with torch.no_grad():  # that paper's initialisation: almost all pairs do not match
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
    draw = random.Random(seed)
    for step in _steps(model, steps, 1e-3):
        chosen = draw.sample(range(len(pairs)), min(BATCH, len(pairs)))
        batch = (pixels[chosen].float() / 255 - mean[:, None, None]) / std[:, None, None]
        batch = torch.rot90(batch, draw.randrange(4), (2, 3))
        if draw.random() < 0.5:
            batch = batch.flip(3)
        texts = [draw.choice(pairs[index][1]) for index in chosen]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=LONGEST, padding_side="right", return_tensors="pt"
        )
        loss = model(input_ids=ids["input_ids"], pixel_values=batch, return_loss=True).loss
        loss.backward()
        if step % 50 == 0:
            log(f"encoder step {step}: sigmoid loss {loss.item():.4f}")
    model.save_pretrained(folder)
    siglip_image_processor(SIZE, image_mean=mean.tolist(), image_std=std.tolist()).save_pretrained(folder)


def train_decoder(texts: list[str], tokenizer, steps: int, seed: int, folder: Path, log=print) -> float:
    """Trains a decoder on `texts` joined by end tokens; returns the mean of its last 20 losses, in nats."""
    set_seed(seed)
    draw = random.Random(seed)
    texts = list(texts)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **DECODER,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    stream: list[int] = []
    losses = []
    for step in _steps(model, steps, 2e-3):
        while len(stream) < 16 * ROW:
            draw.shuffle(texts)
            for ids in tokenizer(texts[:2000])["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        ids = torch.tensor(stream[: 16 * ROW]).view(16, ROW)
        del stream[: 16 * ROW]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        if step % 50 == 0:
            log(f"decoder step {step}: loss {loss.item():.4f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(np.mean(losses[-20:]))


def _steps(model, steps: int, learning_rate: float):
    """Yields step numbers; after each, AdamW applies the gradients, with warm-up and a cosine decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = max(1, steps // 20)
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        yield step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
