"""`get_image_features` as others call it, and batches without images in training."""

import pytest
import torch
import transformers
from tiny import FIRST_WORD, layout_batch, tiny_model

IS_5 = int(transformers.__version__.split(".")[0]) >= 5


def test_others_read_the_features_as_from_models_of_transformers():
    model = tiny_model()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = model.get_image_features(
            pixel_values, vision_feature_layer=None, image_sizes=None, output_hidden_states=True
        )
        patches = model.get_vision_features(pixel_values)
        expected = model.projector(patches)
        if not IS_5:
            assert torch.equal(found, expected)
            return
        assert torch.equal(found.pooler_output, expected)
        assert torch.equal(found.last_hidden_state, patches)
        assert len(found.hidden_states) == 3
        assert torch.equal(model.get_image_features(pixel_values, return_dict=False)[1], expected)


def test_features_that_cannot_be_chosen_are_refused():
    with pytest.raises(ValueError, match="vision_feature_layer is -1 in this model"):
        tiny_model().get_image_features(torch.randn(1, 3, 16, 16), vision_feature_layer=-2)
    with pytest.raises(ValueError, match="interpolate_pos_encoding cannot be chosen"):
        tiny_model()(**layout_batch(tiny_model(), ["Iw"]), interpolate_pos_encoding=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["prefix", "bidirectional"])
def test_a_batch_without_images_reaches_every_parameter(mode, checkpointing):
    """DDP and FSDP wait for each of them, and with a frozen decoder nothing else would train."""
    model = tiny_model(mode).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = layout_batch(model, ["wwww", "ww"], seed=1)
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = ids["input_ids"].where(ids["input_ids"] >= FIRST_WORD, -100)
    plain = tiny_model(mode)
    plain(**ids, labels=labels, use_cache=False).loss.backward()  # in evaluation mode without a picture
    output = model(**ids, labels=labels, use_cache=False)
    output.loss.backward()
    for (name, parameter), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if name.startswith("language_model"):
            assert torch.equal(parameter.grad, other.grad), name
        else:
            assert other.grad is None
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_with_a_frozen_decoder_a_batch_without_images_trains_nothing():
    model = tiny_model("bidirectional").train()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    batch = layout_batch(model, ["wwww"], seed=1)
    model(batch["input_ids"], labels=batch["input_ids"], skip_logits=True, use_cache=False).loss.backward()
    assert all(not parameter.grad.any() for parameter in model.projector.parameters())
