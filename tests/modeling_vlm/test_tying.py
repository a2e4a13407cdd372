"""A head shared with the embeddings or not: configuration, memory and checkpoint say the same, and nothing is lost."""

import pytest
import torch
from tiny import random_batch, tiny_config, tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMModel


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untied_model():
    config = tiny_config(tie_word_embeddings=False)
    torch.manual_seed(3)
    return PrefixVLMForConditionalGeneration(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_batch(model, [5, 3])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_holds_one_truth(tied):
    config = tiny_config(tie_word_embeddings=tied)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is tied
    config.tie_word_embeddings = not tied
    assert config.text_config.tie_word_embeddings is (not tied)
    config.text_config.tie_word_embeddings = tied
    assert config.tie_word_embeddings is tied
    again = PrefixVLMConfig.from_dict(config.to_dict())
    assert (
        again.tie_word_embeddings
        is again.text_config.tie_word_embeddings
        is config.to_dict()["tie_word_embeddings"]
        is tied
    )


@pytest.mark.parametrize("tied", [True, False])
def test_set_on_the_outer_configuration_after_it_was_made(tied, tmp_path):
    config = tiny_config(tie_word_embeddings=not tied)
    config.tie_word_embeddings = tied
    model = PrefixVLMForConditionalGeneration(config).eval()
    assert is_tied(model) is tied
    model.save_pretrained(tmp_path)
    loaded = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_tied(loaded) is tied
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("model_class", [PrefixVLMForConditionalGeneration, PrefixVLMModel])
def test_untied_on_loading_the_head_starts_as_it_was(model_class, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "tied")
    loaded, report = model_class.from_pretrained(
        tmp_path / "tied", dtype=torch.float32, tie_word_embeddings=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not is_tied(loaded)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_input_embeddings().weight)
    loaded.save_pretrained(tmp_path / "untied")
    again = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "untied", dtype=torch.float32)
    assert not is_tied(again)
    assert torch.equal(logits(again), logits(model))


def test_an_own_head_is_never_dropped_in_silence(tmp_path):
    model = untied_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a language head of its own"):
        PrefixVLMForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=True)
    loaded = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, tie_word_embeddings=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_is_in_memory(tied, tmp_path):
    """Whatever somebody sets in between."""
    model = tiny_model() if tied else untied_model()
    model.config.tie_word_embeddings = not tied
    model.save_pretrained(tmp_path)
    loaded = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_tied(loaded) is tied
    assert torch.equal(logits(loaded), logits(model))


def backbones(folder, tied: bool) -> tuple[str, str]:
    config = tiny_config()
    SiglipVisionModel(config.vision_config).save_pretrained(folder / "vision")
    values = {**config.text_config.to_dict(), "tie_word_embeddings": tied}
    Qwen2ForCausalLM(Qwen2Config(**values)).save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def test_backbones_can_be_untied(tmp_path):
    paths = backbones(tmp_path, tied=True)
    tied = PrefixVLMForConditionalGeneration.from_backbones(*paths)
    untied = PrefixVLMForConditionalGeneration.from_backbones(*paths, tie_word_embeddings=False)
    assert is_tied(tied)
    assert not is_tied(untied)
    untied.projector.load_state_dict(tied.projector.state_dict())
    # but for the row of the image token, which is new
    assert torch.equal(logits(untied)[..., :-1], logits(tied)[..., :-1])


def test_backbones_keep_an_own_head(tmp_path):
    paths = backbones(tmp_path, tied=False)
    assert not is_tied(PrefixVLMForConditionalGeneration.from_backbones(*paths))
    with pytest.raises(ValueError, match="has a language head of its own"):
        PrefixVLMForConditionalGeneration.from_backbones(*paths, tie_word_embeddings=True)


def test_the_callers_sub_configurations_stay_as_they_were():
    config = tiny_config()
    vision, text = config.vision_config, config.text_config
    vision.vision_use_head = True
    PrefixVLMConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, attn_implementation="eager")
    assert vision.vision_use_head
    assert text.tie_word_embeddings


def test_peft_finds_what_is_tied():
    """With `ensure_weight_tying`, an adapter on the embeddings is one on the head too."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted = peft.get_peft_model(tiny_model(), settings)
    wrapped = [name for name, module in adapted.named_modules() if type(module).__name__ in ("Embedding", "Linear")]
    assert any("lm_head" in name and "lora" in name for name, _ in adapted.named_modules()), wrapped
