"""PrefixVLM: small vision-language models whose attention mask leaves the image unmasked (arXiv 2503.19508)."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "PrefixVLMConfig": "prefixvlm.configuration.configuration_prefix_vlm",
    "PrefixVLMModel": "prefixvlm.modeling_vlm.modeling_prefix_vlm",
    "PrefixVLMForConditionalGeneration": "prefixvlm.modeling_vlm.modeling_prefix_vlm",
    "PrefixVLMProcessor": "prefixvlm.processing.processing_prefix_vlm",
    "AutoModelForVision2Seq": "prefixvlm.inference.auto",
    "EncodedImages": "prefixvlm.inference.encoded_images",
    "quantize_int8": "prefixvlm.inference.int8",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name):
    # torch is imported at the first use of a class, so that the command line can answer --help at once
    if name not in _HOMES:
        raise AttributeError(f"module 'prefixvlm' has no attribute {name!r}")
    importlib.import_module("prefixvlm.inference.auto")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
