"""The short way through the decoder for one token a row, held to the decoder's own forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKEN_ID, layout_batch, tiny_config, tiny_model
from transformers import DynamicCache, LlamaConfig, StaticCache

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.modeling_vlm import cpu_prefix_vlm
from prefixvlm.modeling_vlm.cpu_prefix_vlm import _can_step as can_step
from prefixvlm.modeling_vlm.cpu_prefix_vlm import _step as step


def llama_model(**kwargs):
    torch.manual_seed(0)
    config = tiny_config()
    text = LlamaConfig(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        initializer_range=0.3,
        rope_theta=500.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **kwargs,
    )
    joint = PrefixVLMConfig(vision_config=config.vision_config, text_config=text, image_token_id=IMAGE_TOKEN_ID)
    return PrefixVLMForConditionalGeneration(joint).eval()


MODELS = {
    "qwen2": tiny_model().double(),
    "llama": llama_model().double(),
    "llama with biases": llama_model(attention_bias=True, mlp_bias=True).double(),
    "llama scaled": llama_model(
        rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, tie_word_embeddings=True
    ).double(),
}


@torch.no_grad()
def both_ways(model, rows: list[str], seed: int, left: bool, steps: int = 3):
    """Hidden states of single tokens after a prompt, each way with a cache of its own."""
    batch = layout_batch(model, rows, seed=seed)
    if left:
        order = [sorted(range(len(mask)), key=lambda place: int(mask[place])) for mask in batch["attention_mask"].tolist()]
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([row[places] for row, places in zip(batch[name], order, strict=True)])
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    decoder = model.get_decoder()
    words = torch.randint(10, 200, (len(rows), steps), generator=torch.Generator().manual_seed(seed))
    results = []
    for way in ("short", "own"):
        cache = model(**batch, use_cache=True).past_key_values
        mask, states = batch["attention_mask"], []
        for index in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            embeds = model.get_input_embeddings()(words[:, index : index + 1])
            positions = mask.cumsum(dim=-1)[:, -1:] - 1
            if way == "short":
                assert can_step(decoder, embeds, mask, cache, {})
                states.append(step(decoder, embeds, mask, positions, cache))
            else:
                call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
                states.append(decoder(inputs_embeds=embeds, **call).last_hidden_state)
        results.append((torch.cat(states, dim=1), cache))
    return results


@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=6)
@given(
    rows=st.lists(st.from_regex(r"w{0,2}(Iw{1,3}){1,2}", fullmatch=True), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    left=st.booleans(),
)
def test_states_and_cache_are_the_decoders_own(kind, rows, seed, left):
    (short, short_cache), (own, own_cache) = both_ways(MODELS[kind], rows, seed, left)
    torch.testing.assert_close(short, own, rtol=1e-5, atol=1e-5)
    assert short_cache.get_seq_length() == own_cache.get_seq_length()
    for one, other in zip(short_cache.layers, own_cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_near_the_truth():
    truth = both_ways(MODELS["qwen2"], ["wIww", "Iw"], 0, left=True)[1][0]
    (short, _), (own, _) = both_ways(tiny_model().bfloat16(), ["wIww", "Iw"], 0, left=True)
    assert (short - truth).norm() <= 1.3 * (own - truth).norm()


def test_generation_takes_it(monkeypatch):
    model = tiny_model()
    batch = layout_batch(model, ["wIww"], seed=1)
    model.generation_config.eos_token_id = None
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    calls = []
    monkeypatch.setattr(cpu_prefix_vlm, "_step", lambda *args: calls.append(args) or step(*args))
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    assert len(calls) == 5


def arguments(model) -> list:
    """What `can_step` accepts."""
    cache = model(**layout_batch(model, ["wIww"], seed=1), use_cache=True).past_key_values
    return [model.get_decoder(), torch.zeros(1, 1, 48), torch.ones(1, 8), cache, {"use_cache": None, "flag": False}]


@torch.no_grad()
def test_what_it_does_not_know_is_left_to_the_decoder():
    model = tiny_model()
    good = arguments(model)
    assert can_step(*good)
    assert not can_step(*good[:4], {"output_hidden_states": True})
    assert not can_step(*good[:2], torch.ones(1, 1, 1, 8), *good[3:])
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    assert not can_step(*good[:3], static, {})
    assert type(good[3]) is DynamicCache
    with torch.enable_grad():
        assert not can_step(*good)
    model.get_decoder().train()
    assert not can_step(*good)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layers.1", "layers.0.self_attn", "layers.0.mlp", "norm", "layers.1.input_layernorm"])
def test_a_hook_on_what_it_passes_by_is_respected(where):
    model = tiny_model()
    good = arguments(model)
    model.get_decoder().get_submodule(where).register_forward_hook(lambda *args: None)
    assert not can_step(*good)


@torch.no_grad()
def test_another_kind_of_decoder_is_refused():
    model = tiny_model()
    good = arguments(model)
    model.get_decoder().config.model_type = "qwen3"
    assert not can_step(*good)


@torch.no_grad()
def test_layers_with_a_window_are_refused():
    model = tiny_model()
    good = arguments(model)
    model.get_decoder().config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_step(*good)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self_attn", "input_layernorm"])
def test_a_module_in_place_of_its_own_is_respected(name):
    model = tiny_model()
    good = arguments(model)
    layer = model.get_decoder().layers[1]
    setattr(layer, name, torch.nn.Sequential(getattr(layer, name)))
    assert not can_step(*good)
