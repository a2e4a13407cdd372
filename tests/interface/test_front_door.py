"""The public names, and that the Auto classes know them."""

import subprocess
import sys

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


def test_a_transformers_that_renames_the_cache_is_refused_with_a_sentence():
    # as 5.24 does
    script = (
        "from transformers.modeling_outputs import BaseModelOutputWithPast\n"
        "BaseModelOutputWithPast.cache = None\nimport prefixvlm.modeling_vlm.modeling_prefix_vlm"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "install a version before 5.24: pip install 'transformers<5.24'" in done.stderr.splitlines()[-1]


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
