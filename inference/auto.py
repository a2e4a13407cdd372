"""Makes transformers' Auto classes know PrefixVLM, so that checkpoints load without `trust_remote_code`."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from prefixvlm.configuration.configuration_prefix_vlm import PrefixVLMConfig
from prefixvlm.modeling_vlm.modeling_prefix_vlm import PrefixVLMForConditionalGeneration, PrefixVLMModel
from prefixvlm.processing.processing_prefix_vlm import PrefixVLMProcessor

# transformers 5 removed AutoModelForVision2Seq in favour of AutoModelForImageTextToText
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", AutoModelForImageTextToText)

AutoConfig.register(PrefixVLMConfig.model_type, PrefixVLMConfig)
AutoProcessor.register(PrefixVLMConfig, PrefixVLMProcessor)
AutoModel.register(PrefixVLMConfig, PrefixVLMModel)
generating = {AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForVision2Seq}
if hasattr(transformers, "AutoModelForMultimodalLM"):  # transformers 5
    generating.add(transformers.AutoModelForMultimodalLM)
for auto_class in generating:
    auto_class.register(PrefixVLMConfig, PrefixVLMForConditionalGeneration)
