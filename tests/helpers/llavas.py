"""A tiny LLaVA of transformers, saved as people's own are."""

import torch
from tiny import tiny_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }}: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CLIP, SIGLIP = CLIPVisionConfig(**VISION), SiglipVisionConfig(**VISION)
KINDS = {
    # as LLaVA 1.5 has it: the last layer but one, without the class token
    "CLIP and Llama": {"vision": CLIP, "layer": -2, "strategy": "default", "text": LlamaConfig(**TEXT)},
    "the last layer of CLIP": {"vision": CLIP, "layer": -1, "strategy": "default", "text": Qwen2Config(**TEXT)},
    "a layer of CLIP from the front": {"vision": CLIP, "layer": 1, "strategy": "default", "text": Qwen2Config(**TEXT)},
    "SigLIP and Qwen": {"vision": SIGLIP, "layer": -1, "strategy": "full", "text": Qwen2Config(**TEXT)},
    "an earlier layer of SigLIP": {"vision": SIGLIP, "layer": -2, "strategy": "full", "text": Qwen2Config(**TEXT)},
    "tied": {"vision": SIGLIP, "layer": -1, "strategy": "full", "text": Qwen2Config(**TEXT), "tied": True},
    "no biases": {"vision": CLIP, "layer": -2, "strategy": "default", "text": Qwen2Config(**TEXT), "bias": False},
    "bfloat16": {"vision": CLIP, "layer": -2, "strategy": "default", "text": Qwen2Config(**TEXT), "dtype": torch.bfloat16},
    "a tokenizer that adds its first token": {
        "vision": CLIP,
        "layer": -2,
        "strategy": "default",
        "text": LlamaConfig(**TEXT),
        "adds_bos": True,
    },
}


def tokenizer_of(adds_bos: bool):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "</s>", "<s>"]})
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<s>"
        first = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [first])
    return tokenizer


def save_llava(folder, vision, layer, strategy, text, tied=False, bias=True, dtype=torch.float32, adds_bos=False):
    tokenizer = tokenizer_of(adds_bos)
    torch.manual_seed(0)
    text.tie_word_embeddings = tied
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=4,
        multimodal_projector_bias=bias,
        tie_word_embeddings=tied,
    )
    llava = LlavaForConditionalGeneration(config).to(dtype).eval()
    llava.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids("</s>")]
    is_clip = vision.model_type == "clip_vision_model"
    clip = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        clip if is_clip else siglip_image_processor(16),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        chat_template=TEMPLATE,
        num_additional_image_tokens=int(is_clip),
    )
    llava.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)
    return llava, processor
