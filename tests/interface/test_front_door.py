"""The public names, and that the Auto classes know them."""

import pytest
import transformers
from tiny import tiny_model, tiny_processor

import prefixvlm


def test_public_names():
    from prefixvlm import (
        AutoModelForVision2Seq,
        PrefixVLMConfig,
        PrefixVLMForConditionalGeneration,
        PrefixVLMModel,
        PrefixVLMProcessor,
    )

    assert PrefixVLMConfig.model_type == "prefix_vlm"
    assert issubclass(PrefixVLMForConditionalGeneration, PrefixVLMModel)
    assert PrefixVLMProcessor.__name__ in dir(prefixvlm)
    own = getattr(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)
    assert AutoModelForVision2Seq is own
    with pytest.raises(AttributeError, match="has no attribute 'Prefix'"):
        _ = prefixvlm.Prefix


def test_auto_classes_load_without_remote_code(tmp_path):
    from prefixvlm import (
        AutoModelForVision2Seq,
        PrefixVLMForConditionalGeneration,
        PrefixVLMModel,
        PrefixVLMProcessor,
    )

    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    generating = {AutoModelForVision2Seq, transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText}
    generating.add(getattr(transformers, "AutoModelForMultimodalLM", AutoModelForVision2Seq))
    for auto_class in generating:
        assert type(auto_class.from_pretrained(tmp_path)) is PrefixVLMForConditionalGeneration
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is PrefixVLMModel
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path)) is PrefixVLMProcessor
