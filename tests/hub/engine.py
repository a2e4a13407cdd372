"""Opens saved models as vLLM and SGLang do, and calls them so; run by test_engines.py in a process of its own.

Shapes: T tokens of all requests together, P image tokens, D width, N heads.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMAGES = [Image.effect_noise((40, 20), 60).convert("RGB"), Image.new("RGB", (10, 10), "red")]


class Layer:
    """An engine's attention of one layer, which keeps the open spans of the sequence, not a mask."""

    def __init__(self, spans: list[tuple[int, int]]):
        self.spans = spans

    def __call__(self, query, key, value, scaling):
        length = query.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        for start, end in self.spans:
            allowed[start:end, start:end] = True
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)


def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **further):
    """What an engine registers under its name: it takes no mask, and finds its own layer by the number."""
    assert attention_mask is None
    return attention_instances[module.layer_idx](query, key, value, scaling).transpose(1, 2).contiguous(), None


def config_of(folder: str, engine: str):
    """The configuration with the engine's attention in that of the decoder, as both engines set it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.get_text_config()._attn_implementation = engine
    return config


def features(model, pixel_values) -> torch.Tensor:
    """The projected features of images, (images * P, D), of whatever kind the output is."""
    output = model.get_image_features(pixel_values)
    if isinstance(output, tuple):
        output = output[0]
    elif isinstance(output, dict):
        output = output.pooler_output
    return output.flatten(0, -2)


def vllm(folder: str) -> dict:
    config = config_of(folder, "vllm")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        empty = AutoModel.from_config(config, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True).eval()
    text = f"see {processor.image_token} and {processor.image_token} there"
    prompt = processor(images=IMAGES, text=text, return_mm_token_type_ids=True, truncation=False, return_tensors="pt")
    counted = processor._get_num_multimodal_tokens(image_sizes=[(20, 40), (10, 10)])
    ids, is_image = prompt["input_ids"], prompt["mm_token_type_ids"].bool()
    places = torch.where(is_image[0])[0]
    pieces = torch.split(places, counted["num_image_tokens"])
    open_spans = [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces] if config.is_mm_prefix_lm else []
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        embeds[is_image] = features(model, prompt["pixel_values"])
        output = model(
            input_ids=None,
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=torch.arange(ids.shape[1])[None],
            attention_instances=dict.fromkeys(range(config.get_text_config().num_hidden_layers), Layer(open_spans)),
            return_dict=False,
        )
    return {
        "class": type(empty).__name__,
        "is_backend_compatible": empty.is_backend_compatible(),
        "is_multimodal": config != config.get_text_config(),
        "decoder": type(empty.get_decoder()).__name__,
        "is_mm_prefix_lm": config.is_mm_prefix_lm,
        "parameters": [name for name, _ in empty.named_parameters()],
        "input_ids": ids.tolist(),
        "pixel_values": prompt["pixel_values"].tolist(),
        "hidden_states": output[0][0].tolist(),
        "prompt": {
            "image_token_id": processor.image_token_id,
            "image_token_ids": processor.image_token_ids,
            "num_image_tokens": counted["num_image_tokens"],
            "num_image_patches": counted["num_image_patches"],
            "input_ids": ids.tolist(),
            "mm_token_type_ids": prompt["mm_token_type_ids"].tolist(),
        },
    }


def sglang(folder: str) -> dict:
    config = config_of(folder, "sglang")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True).eval()
    prompt = processor(images=IMAGES[:1], text=f"{processor.image_token}what?", return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=prompt["input_ids"],
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(prompt["input_ids"].shape[1])[None],
            return_dict=False,
            forward_batch=None,
            attention_instances=dict.fromkeys(range(config.get_text_config().num_hidden_layers), Layer([])),
            pixel_values=prompt["pixel_values"],
        )
    return {
        "input_ids": prompt["input_ids"].tolist(),
        "pixel_values": prompt["pixel_values"].tolist(),
        "hidden_states": output[0][0].tolist(),
    }


def main(job: dict) -> None:
    sys.modules["prefixvlm"] = None  # an engine does not know us
    transformers.logging.set_verbosity_error()
    found: dict[str, dict] = {}
    for engine, opened in (("vllm", vllm), ("sglang", sglang)):
        ALL_ATTENTION_FUNCTIONS[engine] = attention
        found[engine] = {}
        for mode, folder in job["folders"].items():
            try:
                found[engine][mode] = opened(folder)
            except ValueError as error:
                found[engine][mode] = {"error": str(error)}
    with open(job["output"], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
