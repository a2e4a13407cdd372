"""Precision, checkpointing, frozen parts, and the shape of what comes out."""

import pytest
import torch
from tiny import FIRST_WORD, IMAGE_TOKEN_ID, image_numbers, layout_batch, random_batch, rule_mask, tiny_model

from prefixvlm import PrefixVLMModel
from prefixvlm.modeling_vlm import cpu_prefix_vlm

ROWS = ["wIwIwww", "Iwwwww"]


def labelled(model, rows=ROWS, seed: int = 1) -> dict:
    batch = layout_batch(model, rows, seed=seed)
    return {**batch, "labels": batch["input_ids"].where((batch["input_ids"] >= FIRST_WORD), -100)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_near_fp32(attention, how, monkeypatch):
    """bf16 keeps 8 bits, an error of up to 0.4% at each step; four layers of wide weights may make 5% of it (rms)."""
    monkeypatch.setattr(cpu_prefix_vlm, "_has_bfloat16_arithmetic", lambda: True)
    model = tiny_model("prefix", attn_implementation=attention)
    batch = labelled(model)
    exact = model(**batch)
    if how == "weights":
        model = model.to(torch.bfloat16)
        near = model(**batch)  # fp32 pixels are accepted
        assert near.logits.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            near = model(**batch)
    assert near.loss.dtype == torch.float32
    valid = batch["attention_mask"].bool()
    error = ((near.logits.float() - exact.logits)[valid].norm() / exact.logits[valid].norm()).item()
    print(f"logits off by {error:.2%} (rms), loss {near.loss:.4f} and {exact.loss:.4f}")
    assert 0 < error <= 0.05
    assert abs(near.loss - exact.loss) <= 0.02 * exact.loss


@pytest.mark.parametrize("mode", ["prefix", "bidirectional"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(mode):
    runs = {}
    for checkpointing in (False, True):
        model = tiny_model(mode).train()
        calls = {"vision": 0, "text": 0}
        for layer, part in ((model.language_model.model.layers[0], "text"), (vision_layers(model)[0], "vision")):
            layer.self_attn.register_forward_pre_hook(
                lambda *_, calls=calls, part=part: calls.__setitem__(part, calls[part] + 1)
            )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**labelled(model)).loss
        loss.backward()
        # recomputed in the backward pass: otherwise nothing was checkpointed
        assert calls == ({"vision": 2, "text": 2} if checkpointing else {"vision": 1, "text": 1})
        runs[checkpointing] = loss, {name: parameter.grad for name, parameter in model.named_parameters()}
    assert torch.equal(runs[False][0], runs[True][0])
    for name, gradient in runs[False][1].items():
        torch.testing.assert_close(runs[True][1][name], gradient, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def vision_layers(model):
    return next(module.layers for name, module in model.vision_tower.named_modules() if name.endswith("encoder"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parts_get_no_gradient_and_the_projector_does(checkpointing):
    """Stages 0 and 1."""
    model = tiny_model("prefix").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    model(**labelled(model)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("projector."):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("rows", "images"), [(["Iww", "Iww"], 1), (["Iww", "Iww"], 3), (["ww"], 1)], ids=["too_few", "too_many", "no_place"]
)
def test_a_wrong_number_of_images_is_one_clear_error(rows, images):
    model = tiny_model()
    batch = layout_batch(model, rows)
    batch["pixel_values"] = torch.zeros(images, 3, 16, 16)
    wanted = 4 * "".join(rows).count("I")
    message = rf"text has {wanted} image tokens, but {images} image\(s\) of 4 features each make {4 * images}"
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_ids_and_embeddings_exclude_each_other():
    model = tiny_model()
    batch = random_batch(model, [3])
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch, inputs_embeds=torch.zeros(1, 7, 48))
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values=batch["pixel_values"])


@torch.no_grad()
def test_images_may_come_in_groups_of_a_sample():
    model = tiny_model()
    batch = layout_batch(model, ["IwIw", "wIIw"])
    flat = model(**batch)
    nested = model(**{**batch, "pixel_values": batch["pixel_values"].unflatten(0, (2, 2))})
    assert torch.equal(flat.logits, nested.logits)
    assert nested.image_hidden_states.shape == (4, 4, 48)


@torch.no_grad()
def test_images_come_in_reading_order():
    model = tiny_model("causal")
    batch = layout_batch(model, ["IwIw", "Iww"])
    features = model.projector(model.get_vision_features(batch["pixel_values"]))
    inputs = model(**batch, output_hidden_states=True).hidden_states[0]
    assert torch.equal(inputs[batch["input_ids"] == IMAGE_TOKEN_ID], features.flatten(0, 1))
    words = batch["input_ids"] >= FIRST_WORD
    assert torch.equal(inputs[words], model.get_input_embeddings()(batch["input_ids"][words]))


@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images", "bidirectional"])
@torch.no_grad()
def test_hidden_states_and_attentions_when_asked(mode):
    model = tiny_model(mode, attn_implementation="eager")
    batch = layout_batch(model, ["wIwIw"])
    plain = model(**batch)
    assert plain.hidden_states is None
    assert plain.attentions is None
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert torch.equal(outputs.logits, plain.logits)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(1, 11, 48)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 4, 11, 11)] * 2
    # the weights that were used obey the rule
    mask = rule_mask(mode, image_numbers("wIwIw", 4))
    for weights in outputs.attentions:
        assert weights[:, :, ~mask].eq(0).all()
        assert weights[:, :, mask].gt(0).all()
    assert torch.equal(outputs.image_hidden_states, model.projector(model.get_vision_features(batch["pixel_values"])))


@torch.no_grad()
def test_tuple_instead_of_dict():
    model = tiny_model()
    batch = labelled(model)
    outputs = model(**batch, use_cache=False)
    as_tuple = model(**batch, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert list(outputs) == ["loss", "logits", "token_losses", "image_hidden_states"]
    for value, expected in zip(as_tuple, outputs.values(), strict=True):
        assert torch.equal(value, expected)


@torch.no_grad()
def test_the_model_without_a_head_reads_the_same_checkpoint(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    bare, report = PrefixVLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = random_batch(model, [3, 5])
    hidden = bare.eval()(**batch).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(**batch).logits)
    assert torch.equal(bare(**batch, return_dict=False)[0], hidden)


@torch.no_grad()
def test_a_ready_4d_mask_is_used_as_it_is():
    model, prefix = tiny_model("causal"), tiny_model("prefix")
    batch = layout_batch(model, ["wIwIw"])
    mask = rule_mask("prefix", image_numbers("wIwIw", 4))[None, None]
    given = model(**{**batch, "attention_mask": mask}).logits
    assert torch.equal(given, prefix(**batch).logits)
    assert not torch.equal(given, model(**batch).logits)


def test_weights_have_the_same_names_on_every_version_of_transformers():
    names = set(tiny_model().state_dict())
    heads = {name.split(".")[0] for name in names}
    assert heads == {"vision_tower", "projector", "language_model"}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if "vision_model.vision_model" in name or "vision_model.head" in name]
