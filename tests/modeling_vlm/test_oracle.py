"""In causal mode the model is a LLaVA: with the same weights it must give what transformers' own class gives."""

import copy

import pytest
import torch
from tiny import FIRST_WORD, layout_batch, tiny_config
from transformers import LlavaConfig, LlavaForConditionalGeneration

from prefixvlm.inference.llava import config_of, model_of

ROWS = ["Iwwwwww", "Iww", "wIwww"]
INTERLEAVED = ["wIwwIwIww", "IIwIw", "wwww"]  # three images between texts, text first and image first, and none


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = tiny_config("causal", tie_word_embeddings=False)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            image_seq_length=config.num_image_tokens,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )
    ).eval()
    llava.generation_config.bad_words_ids = [[config.image_token_id]]  # as ours does
    # a second LLaVA, as both then share their weights, and gradients would meet
    return model_of(copy.deepcopy(llava), config_of(llava.config)), llava


def with_level(weights: dict) -> dict:
    """SigLIP's weights under the names we save, which have the level `vision_model` that transformers 5 dropped."""
    return {name if name.startswith("vision_model.") else f"vision_model.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("rows", [ROWS, INTERLEAVED])
def test_logits_and_loss_equal_llavas(pair, rows):
    model, llava = pair
    batch = layout_batch(model, rows, seed=1, padding_side="right")
    labels = batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD) & batch["attention_mask"].bool(), -100)
    with torch.no_grad():
        ours, theirs = model(**batch, labels=labels), llava(**batch, labels=labels)
    valid = batch["attention_mask"].bool()
    difference = (ours.logits - theirs.logits)[valid].abs().max().item()
    print(f"largest logit {theirs.logits[valid].abs().max():.2f}, largest difference {difference:.1e}")
    print(f"loss {ours.loss:.6f} and {theirs.loss:.6f}")
    assert difference <= 1e-5
    assert abs(ours.loss - theirs.loss) <= 1e-5


def test_gradients_equal_llavas(pair):
    model, llava = pair
    batch = layout_batch(model, INTERLEAVED, seed=1, padding_side="right")
    labels = batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD) & batch["attention_mask"].bool(), -100)
    for one in pair:
        one.zero_grad()
        one(**batch, labels=labels, use_cache=False).loss.backward()
    counterparts = {
        model.vision_tower: with_level(gradients(llava.model.vision_tower)),
        model.projector: gradients(llava.model.multi_modal_projector),
        model.language_model.model: gradients(llava.model.language_model),
        model.language_model.lm_head: gradients(llava.lm_head),
    }
    for ours, theirs in counterparts.items():
        found = gradients(ours)
        assert found.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert max(gradient.abs().max() for gradient in found.values()) > 1e-3


def gradients(module) -> dict[str, torch.Tensor]:
    """Of all weights but those behind the layer that is read, such as the encoder's final norm."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rows", [ROWS, INTERLEAVED])
def test_greedy_answers_equal_llavas(pair, rows):
    model, llava = pair
    batch = layout_batch(model, rows, seed=2, padding_side="left")
    settings = {"max_new_tokens": 12, "do_sample": False}
    ours, theirs = model.generate(**batch, **settings), llava.generate(**batch, **settings)
    assert torch.equal(ours, theirs)
    answers = ours[:, batch["input_ids"].shape[1] :]
    assert len({tuple(answer) for answer in answers.tolist()}) == len(rows)  # rows that answered alike would prove little


def test_prefix_mode_is_not_llava(pair):
    model, llava = pair
    batch = layout_batch(model, ["Iww"], seed=3)
    model.config.attention_mode = "prefix"
    try:
        with torch.no_grad():
            difference = (model(**batch).logits - llava(**batch).logits).abs().max()
    finally:
        model.config.attention_mode = "causal"
    assert difference > 1e-2
