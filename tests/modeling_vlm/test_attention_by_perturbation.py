"""Who sees whom, found by changing one input and checking which outputs change.

Exact zeros are possible and required: a masked key has weight exp(-inf) = 0 (or exp of the most negative number, which
is 0 too), and a row of a matrix product does not depend on the other rows as long as the shapes stay the same.
"""

import pytest
import torch
from tiny import FIRST_WORD, image_numbers, layout_batch, random_batch, row_alone, rule_mask, tiny_config, tiny_model

from prefixvlm import PrefixVLMForConditionalGeneration
from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES

# three images between texts, text first and image first; two side by side
LAYOUTS = ["wIwwIwIww", "IwIwwIw", "wIIwI"]
all_modes = pytest.mark.parametrize("mode", ATTENTION_MODES)
all_implementations = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@torch.no_grad()
def states(model, batch) -> list[torch.Tensor]:
    """Hidden states after the first and after the last of the two layers."""
    outputs = model(**batch, output_hidden_states=True, use_cache=False)
    return [outputs.hidden_states[1], outputs.hidden_states[2]]


@torch.no_grad()
def logits(model, batch, **kwargs) -> torch.Tensor:
    return model(**batch, use_cache=False, **kwargs).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", tolerance: float = 1e-5):
    """To a share of the largest number; 1e-5 is what fp32 keeps when sums are taken in another order."""
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(1, expected.abs().max().item()), f"{name} differs by {difference:.1e}"


def with_word_changed(batch: dict, row: int, place: int) -> dict:
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][row, place] = FIRST_WORD + (batch["input_ids"][row, place] + 1) % 100
    return changed


def with_image_changed(batch: dict, image: int) -> dict:
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][image] += torch.linspace(-1, 1, 16)
    return changed


@all_modes
@all_implementations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_allowed_positions_feel_a_change(mode, attention, layout, side):
    model = tiny_model(mode, attn_implementation=attention)
    assert model.language_model.config._attn_implementation == attention
    batch = layout_batch(model, [layout, "wIwIwIwIww"], seed=1, padding_side=side)
    own = batch["attention_mask"][0].nonzero().flatten().tolist()  # where the first row's tokens stand
    images = image_numbers(layout, model.config.num_image_tokens)
    one_layer = rule_mask(mode, images)
    # over two layers a change travels through a third position: a later image may pass on the words it sees
    reach = [one_layer, (one_layer.float() @ one_layer.float()) > 0]
    before = states(model, batch)

    changes = [([place], with_word_changed(batch, 0, own[place])) for place, image in enumerate(images) if image == 0]
    for image in range(1, layout.count("I") + 1):
        changes.append(([k for k, of in enumerate(images) if of == image], with_image_changed(batch, image - 1)))
    for places, changed in changes:
        for seen, old, new in zip(reach, before, states(model, changed), strict=True):
            moved = (new - old).abs().amax(-1)
            in_row, expected = moved[0, own], seen[:, places].any(-1)
            assert in_row[~expected].eq(0).all(), f"{places} leaked to {(in_row.ne(0) & ~expected).nonzero().tolist()}"
            assert in_row[expected].gt(1e-6).all(), f"{places} did not reach {(in_row.eq(0) & expected).nonzero()}"
            assert moved[1].eq(0).all()  # the other row


def test_prefix_and_prefix_all_images_differ_only_with_a_second_image():
    prefix, all_images = tiny_model("prefix"), tiny_model("prefix_all_images")
    one, two = (layout_batch(prefix, [row], seed=2) for row in ("Iwww", "IwIww"))
    assert torch.equal(logits(prefix, one), logits(all_images, one))
    later_image = with_image_changed(two, 1)
    earlier = slice(0, prefix.config.num_image_tokens + 1)  # the first image and the word after it
    assert torch.equal(logits(prefix, two)[:, earlier], logits(prefix, later_image)[:, earlier])
    moved = (logits(all_images, two) - logits(all_images, later_image)).abs().amax(-1)[0, earlier]
    assert moved.gt(1e-6).all()


@all_modes
@all_implementations
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mode, attention, side):
    model = tiny_model(mode, attn_implementation=attention)
    rows = ["wIwIwww", "Iww", "ww", "wIwIIwI"]
    batch = layout_batch(model, rows, seed=3, padding_side=side)
    padded = logits(model, batch)
    assert torch.isfinite(padded).all()
    for row in range(len(rows)):
        alone = logits(model, row_alone(batch, row, model))[0]
        assert_close(padded[row, batch["attention_mask"][row].bool()], alone)
    # nothing at a padded position reaches a real one
    padding = (batch["attention_mask"][1] == 0).nonzero().flatten()
    for place in padding.tolist():
        other = logits(model, with_word_changed(batch, 1, place))
        assert torch.equal(other[batch["attention_mask"].bool()], padded[batch["attention_mask"].bool()])


@all_modes
@all_implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_alone_gives_no_nan(mode, attention, dtype):
    model = tiny_model(mode, attn_implementation=attention).to(dtype)
    batch = random_batch(model, [4, 4], seed=4)
    batch["input_ids"][1] = 0
    batch["attention_mask"][1] = 0
    batch["pixel_values"] = batch["pixel_values"][:1]
    outputs = model(**batch, labels=batch["input_ids"].where(batch["input_ids"] >= FIRST_WORD, -100))
    assert torch.isfinite(outputs.logits).all()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@all_modes
def test_eager_equals_sdpa_in_outputs_and_gradients(mode):
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(mode, attn_implementation=attention)
        batch = layout_batch(model, ["wIwIwww", "Iww"], seed=5, padding_side="left")
        outputs = model(**batch, labels=batch["input_ids"].where(batch["input_ids"] >= FIRST_WORD, -100))
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((outputs.logits[batch["attention_mask"].bool()], gradients))
    (sdpa_logits, sdpa_gradients), (eager_logits, eager_gradients) = results
    assert_close(eager_logits, sdpa_logits)
    assert set(sdpa_gradients) == set(eager_gradients)
    for name, gradient in sdpa_gradients.items():
        # the fused attention's exponential has fewer digits where the CPU has AVX-512
        assert_close(eager_gradients[name], gradient, name, tolerance=5e-5)


@all_modes
@all_implementations
def test_packed_documents_are_as_if_alone(mode, attention):
    model = tiny_model(mode, attn_implementation=attention)
    batch = layout_batch(model, ["Iwww", "wIwIwwI", "www", "Iw"], seed=6)
    documents = [row_alone(batch, row, model) for row in range(4)]
    lengths = [document["input_ids"].shape[1] for document in documents]
    padding = 3
    packed = {
        "input_ids": torch.cat([*(document["input_ids"] for document in documents), torch.zeros(1, padding).long()], dim=1),
        "pixel_values": batch["pixel_values"],
        "attention_mask": torch.tensor([[1] * sum(lengths) + [0] * padding]),
        "document_ids": torch.repeat_interleave(torch.tensor([[7, 3, 5, 4, 0]]), torch.tensor([*lengths, padding]), dim=1),
    }
    positions = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    together = logits(model, packed)[0].split([*lengths, padding])
    hook.remove()
    for document, part in zip(documents, together, strict=False):
        assert_close(part, logits(model, document)[0])
    # counted from 0 in each document: rotary attention alone could not tell
    assert positions[0][0].tolist() == [place for length in [*lengths, padding] for place in range(length)]
    # and without document_ids they would see each other
    mixed = logits(model, {**packed, "document_ids": None})[0].split([*lengths, padding])
    assert (mixed[1] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_kernels_that_drop_a_dense_mask_are_refused(attention):
    model = tiny_model()
    with pytest.raises(ValueError, match="does not support"):
        model.set_attn_implementation(attention)


def test_kernels_that_drop_a_dense_mask_are_refused_also_for_the_decoder_alone():
    def build_and_mask():
        model = PrefixVLMForConditionalGeneration._from_config(
            tiny_config(), attn_implementation={"text_config": "flex_attention"}
        )
        # (a full forward pass of flex_attention with a dense mask crashes Python on a CPU)
        model._update_causal_mask(None, torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3, 48))

    with pytest.raises(ValueError, match=r"flex_attention|sdpa"):
        build_and_mask()
