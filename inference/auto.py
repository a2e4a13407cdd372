"""Makes transformers' Auto classes know PrefixVLM, so that checkpoints load without `trust_remote_code`."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from prefixvlm.configuration.configuration_prefix_vlm import PrefixVLMConfig
from prefixvlm.modeling_vlm.modeling_prefix_vlm import PrefixVLMForConditionalGeneration
from prefixvlm.processing.processing_prefix_vlm import PrefixVLMProcessor

# transformers 5 removed AutoModelForVision2Seq in favour of AutoModelForImageTextToText
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", AutoModelForImageTextToText)

AutoConfig.register(PrefixVLMConfig.model_type, PrefixVLMConfig)
AutoProcessor.register(PrefixVLMConfig, PrefixVLMProcessor)
for auto_class in {AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForVision2Seq}:
    auto_class.register(PrefixVLMConfig, PrefixVLMForConditionalGeneration)
