"""Inference engines that run this model with attention of their own: the transformers backends of vLLM and SGLang.

They build `AutoModel` with the decoder's attention named after them, keep the cache, hold the language head, fill in the
image features before the forward pass, and pass no mask. What they cannot attend to must be refused, since they would drop
the mask without a word.

This file travels to the Hub with every checkpoint, so it imports nothing but torch.
"""

from typing import Any

from torch import nn

# the attention modes of each: vLLM leaves every image unmasked within itself where `config.is_mm_prefix_lm` says so
MODES = {"vllm": ("causal", "prefix"), "sglang": ("causal",)}


def engine_of(text_config) -> str | None:
    """The engine whose attention a decoder is to use; `None` for that of transformers."""
    name = getattr(text_config, "_attn_implementation", None)
    return name if name in MODES else None


def refuse_mode(engine: str, mode: str) -> None:
    """Raises a ValueError for an attention mode that an engine would not follow."""
    if mode not in MODES[engine]:
        raise ValueError(
            f"attention_mode is {mode!r}, but {engine} would attend otherwise; choose {' or '.join(MODES[engine])}, or use "
            "transformers."
        )


def decoder_for(engine: str, language_model: Any) -> nn.Module:
    """The decoder without its head, in the shape in which an engine finds the weights of a checkpoint.

    The head is the engine's own, and one of the model would be a weight that no file fills. SGLang also renames
    `language_model.model` to `language_model`.
    """
    if engine == "sglang":
        return language_model.get_decoder()
    language_model.set_output_embeddings(None)
    language_model._tied_weights_keys, language_model.all_tied_weights_keys = None, {}  # of transformers 4 and 5
    return language_model
