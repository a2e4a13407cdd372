"""Decoders of every family that is proven to obey the mask, tiny and random, and an encoder to join them to."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": 264,  # of the tiny tokenizer, and some more
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WINDOW = 100  # longer than the prompts here
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
# a layer of each kind: with a window and without one, with positions and without
GEMMA3_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}

# by their `model_type`
DECODERS = {
    "qwen2": lambda: Qwen2Config(**TEXT, **TIED),
    "qwen3": lambda: Qwen3Config(**TEXT, **TIED, head_dim=8),
    "llama": lambda: LlamaConfig(**TEXT, **UNTIED),
    "smollm3": lambda: SmolLM3Config(**TEXT, **TIED, no_rope_layers=[1, 0]),
    "gemma2": lambda: Gemma2Config(**TEXT, **TIED, **GEMMA, final_logit_softcapping=3.0),
    "gemma3_text": lambda: Gemma3TextConfig(**TEXT, **TIED, **GEMMA, **GEMMA3_LAYERS),
    "granite": lambda: GraniteConfig(**TEXT, **TIED, **GRANITE),
    "phi3": lambda: Phi3Config(**TEXT, **UNTIED, sliding_window=WINDOW),
    "olmo2": lambda: Olmo2Config(**TEXT, **UNTIED),
    "mistral": lambda: MistralConfig(**TEXT, **UNTIED, head_dim=8, sliding_window=WINDOW),
}
NAMES = {
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen3": "Qwen 3",
    "llama": "Llama, SmolLM2",
    "smollm3": "SmolLM3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "granite": "Granite",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "mistral": "Mistral",
}


def decoder(kind: str):
    torch.manual_seed(sum(map(ord, kind)))
    return AutoModelForCausalLM.from_config(DECODERS[kind]()).eval()
