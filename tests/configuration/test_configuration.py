"""What a configuration says must be what is built, whichever version of transformers wrote it."""

import json
import re

import pytest
import torch
from tiny import tiny_config
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES, AUTO_MAP, needs_rope_theta

TEXT = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def paper_model():
    with torch.device("meta"):
        return PrefixVLMForConditionalGeneration(PrefixVLMConfig.from_preset("paper"))


def test_paper_preset_has_the_shapes_of_table_ii():
    config = PrefixVLMConfig.from_preset("paper")
    vision, text = config.vision_config, config.text_config
    shapes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    assert [getattr(vision, name) for name in shapes] == [1152, 4304, 27, 16, 224, 14]
    shapes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [getattr(text, name) for name in shapes] == [896, 4864, 24, 14, 2]
    assert text.vocab_size == 151936
    assert text.tie_word_embeddings
    assert config.tie_word_embeddings
    assert config.num_image_tokens == 256
    assert config.attention_mode == "prefix"
    assert config.image_token_id < text.vocab_size


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_preset_has_the_parameters_of_table_iv(paper_model):
    projector = 1152 * 8960 + 8960 + 8960 * 896 + 896
    assert projector == 18_359_936
    assert count(paper_model.projector) == projector
    # Qwen2.5-0.5B as its model card counts it
    assert count(paper_model.language_model) == 494_032_768
    # without SigLIP's pooling head
    assert 410e6 < count(paper_model.vision_tower) < 415e6
    print(f"vision {count(paper_model.vision_tower):,}, all {count(paper_model):,}")
    assert 0.9e9 < count(paper_model) < 0.95e9
    assert not [name for name, _ in paper_model.named_parameters() if "vision_model.head" in name]


def test_paper_preset_rotates_by_a_million():
    config = PrefixVLMConfig.from_preset("paper")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1  # enough, and quick
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.text_config.vocab_size = 8
    assert rotary_theta(config) == pytest.approx(1e6, rel=1e-4)


def test_projector_width_defaults_to_the_text_width():
    with torch.device("meta"):
        model = PrefixVLMForConditionalGeneration(PrefixVLMConfig.from_preset("tiny"))
    assert model.projector.linear_1.out_features == model.config.text_config.hidden_size == 64


def test_presets_can_be_overridden_and_stay_as_they_are():
    config = PrefixVLMConfig.from_preset("tiny", attention_mode="causal", projector_hidden_size=7)
    assert (config.attention_mode, config.projector_hidden_size) == ("causal", 7)
    config.text_config.vocab_size = 9
    again = PrefixVLMConfig.from_preset("tiny")
    assert (again.attention_mode, again.projector_hidden_size, again.text_config.vocab_size) == ("prefix", None, 512)
    assert again.num_image_tokens == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mode": "sideways"}, f"attention_mode is 'sideways'; choose one of {', '.join(ATTENTION_MODES)}."),
        ({"text_config": {**TEXT, "model_type": "quen2"}}, "transformers knows no model of type 'quen2'"),
        ({"vision_config": {**VISION, "model_type": "siglop"}}, "transformers knows no model of type 'siglop'"),
    ],
)
def test_unknown_values_give_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$") as error:
        PrefixVLMConfig(**arguments)
    assert "\n" not in str(error.value)


def test_unknown_preset_gives_one_clear_error():
    with pytest.raises(ValueError, match=r"^There is no preset 'papers'; choose one of paper, tiny\.$"):
        PrefixVLMConfig.from_preset("papers")


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_a_dict_and_a_folder_hold_everything(mode, tmp_path):
    config = tiny_config(mode, projector_hidden_size=7, projector_hidden_act="relu", tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    from_json = json.loads(json.dumps(config.to_dict()))
    for again in (
        PrefixVLMConfig.from_dict(from_json),
        PrefixVLMConfig(**{key: value for key, value in from_json.items() if key != "model_type"}),
        PrefixVLMConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(again) is PrefixVLMConfig
        assert type(again.vision_config) is SiglipVisionConfig
        assert type(again.text_config) is Qwen2Config
        assert without_origin(again) == without_origin(config)
        assert again.attention_mode == mode
        assert again.projector_hidden_size == 7
        assert again.projector_hidden_act == "relu"
        assert again.image_token_id == 1
        assert again.tie_word_embeddings is again.text_config.tie_word_embeddings is False
        assert again.text_config.eos_token_id == 0
        assert rotary_theta(again) == pytest.approx(1e6, rel=1e-4)


def without_origin(config) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}


def rotary_theta(config) -> float:
    """The base the built model really rotates by, read from its frequencies theta ** (-2i / d)."""
    frequencies = inv_freq(config)
    return float(frequencies[1]) ** -len(frequencies)


def inv_freq(config) -> torch.Tensor:
    model = PrefixVLMForConditionalGeneration(config)
    return model.language_model.get_decoder().rotary_emb.inv_freq


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},  # as transformers 5 saves it
        {"rope_theta": 1e6},  # as 4.x saves it
        {"rope_theta": 1e6, "rope_scaling": None},
    ],
)
def test_either_spelling_of_theta_reaches_the_model(rope):
    # 10,000 would be the silent default
    text = {**TEXT, "hidden_size": 32, **rope}
    assert rotary_theta(PrefixVLMConfig(vision_config=VISION, text_config=text)) == pytest.approx(1e6, rel=1e-4)


def test_either_spelling_of_scaled_rope_reaches_the_model():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    text = {**TEXT, "model_type": "llama", "hidden_size": 32, "max_position_embeddings": 128}
    new = PrefixVLMConfig(VISION, {**text, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    old = PrefixVLMConfig(VISION, {**text, "rope_theta": 5e5, "rope_scaling": scaling})
    plain = PrefixVLMConfig(VISION, {**text, "rope_theta": 5e5})
    assert torch.equal(inv_freq(new), inv_freq(old))
    assert not torch.equal(inv_freq(new), inv_freq(plain))


def test_partly_rotated_heads_stay_partly_rotated():
    text = {**TEXT, "model_type": "stablelm", "hidden_size": 32}
    new = PrefixVLMConfig(
        VISION, {**text, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}
    )
    head = 32 // 2
    assert len(inv_freq(new)) == head * 0.5 / 2


def test_rope_of_each_kind_of_layer_is_read_or_refused_but_never_lost():
    rope = {
        "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
    }
    text = {**TEXT, "model_type": "gemma3_text", "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": rope}
    if needs_rope_theta():
        config = PrefixVLMConfig(VISION, text).text_config
        assert (config.rope_theta, config.rope_local_base_freq) == (5e5, 2e4)
        with pytest.raises(ValueError, match="transformers 5"):
            PrefixVLMConfig(VISION, {**text, "model_type": "qwen2"})
        return
    rotary = PrefixVLMForConditionalGeneration(PrefixVLMConfig(VISION, text)).get_decoder().rotary_emb
    for kind, values in rope.items():
        frequencies = getattr(rotary, f"{kind}_inv_freq")
        assert float(frequencies[1]) ** -len(frequencies) == pytest.approx(values["rope_theta"], rel=1e-4)


def test_auto_map_names_every_auto_class_and_existing_code():
    config = tiny_config()
    assert config.auto_map == AUTO_MAP
    generating = {"CausalLM", "Vision2Seq", "ImageTextToText", "MultimodalLM"}
    classes = {f"AutoModelFor{name}" for name in generating}
    assert set(config.auto_map) == {*classes, "AutoConfig", "AutoModel", "AutoProcessor"}
    older = {name: f"someone/vlm--{AUTO_MAP[name]}" for name in classes}  # as loaded from the Hub
    assert tiny_config(auto_map=older).auto_map == {**AUTO_MAP, **older}
    assert config.to_dict()["auto_map"] == AUTO_MAP
    homes = {
        "configuration_prefix_vlm": "configuration",
        "modeling_prefix_vlm": "modeling_vlm",
        "processing_prefix_vlm": "processing",
    }
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        package = __import__(f"prefixvlm.{homes[module]}.{module}", fromlist=[name])
        assert getattr(package, name).__name__ == name
    for name in classes:
        assert AUTO_MAP[name].endswith(".PrefixVLMForConditionalGeneration")
    assert AUTO_MAP["AutoModel"].endswith(".PrefixVLMModel")  # as in transformers: without the head


def test_sub_configurations_of_other_types():
    vision = {**VISION, "model_type": "clip_vision_model"}
    text = {**TEXT, "model_type": "llama", "tie_word_embeddings": False}
    config = PrefixVLMConfig(vision_config=vision, text_config=text, image_token_id=3)
    assert type(config.vision_config) is CLIPVisionConfig
    assert type(config.text_config) is LlamaConfig
    assert config.tie_word_embeddings is False
    again = PrefixVLMConfig.from_dict(config.to_dict())
    assert type(again.vision_config) is CLIPVisionConfig
    assert type(again.text_config) is LlamaConfig
    assert again.text_config.vocab_size == 32
    with torch.no_grad():
        model = PrefixVLMForConditionalGeneration(again).eval()
        ids = torch.tensor([[3, 3, 3, 3, 5]])
        assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape == (1, 5, 32)


def test_type_defaults_to_siglip_and_qwen2():
    config = PrefixVLMConfig(vision_config={"image_size": 28}, text_config={"vocab_size": 8})
    assert type(config.vision_config) is SiglipVisionConfig
    assert type(config.text_config) is Qwen2Config
    assert config.vision_config.image_size == 28
    assert config.text_config.vocab_size == 8


def test_the_given_dicts_stay_as_they_are():
    vision = dict(VISION)
    text = {**TEXT, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    before = json.dumps([vision, text])
    PrefixVLMConfig(vision_config=vision, text_config=text)
    assert json.dumps([vision, text]) == before


@pytest.mark.parametrize("of_text", [True, False])
def test_tying_follows_the_text_unless_told(of_text):
    text = {**TEXT, "tie_word_embeddings": of_text}
    assert PrefixVLMConfig(VISION, text).tie_word_embeddings is of_text
    told = PrefixVLMConfig(VISION, text, tie_word_embeddings=not of_text)
    assert told.tie_word_embeddings is told.text_config.tie_word_embeddings is (not of_text)
    model = PrefixVLMForConditionalGeneration(told)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (not of_text)


def test_attention_implementation_reaches_the_backbones():
    config = tiny_config()
    config._attn_implementation = "eager"
    model = PrefixVLMForConditionalGeneration(config)
    assert model.language_model.config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.language_model.config._attn_implementation == "sdpa"
