"""Pictures to ask about, and answers without `generate`, a cache or padding."""

import torch
from PIL import Image
from tiny import tiny_processor

PROCESSOR = tiny_processor()


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20, 20), (50 * number, 30, 200))


def by_hand(model, inputs, new_tokens: int = 6) -> str:
    """The text after one prompt, token by token; an image token is never the next."""
    ids, end = inputs["input_ids"], model.config.text_config.eos_token_id
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == end:
            break
    return PROCESSOR.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
