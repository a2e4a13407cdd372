"""The fast path for one new token per row, held to the decoder's own forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKEN_ID, layout_batch, tiny_config, tiny_model
from transformers import DynamicCache, LlamaConfig, StaticCache

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.modeling_vlm import modeling_prefix_vlm
from prefixvlm.modeling_vlm.cpu_prefix_vlm import one_token


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
    """Hidden states of single tokens after a prompt, by the fast path and by the decoder, each with its own cache."""
    batch = layout_batch(model, rows, seed=seed)
    if left:
        order = [sorted(range(len(mask)), key=lambda place: int(mask[place])) for mask in batch["attention_mask"].tolist()]
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([row[places] for row, places in zip(batch[name], order, strict=True)])
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    decoder = model.get_decoder()
    words = torch.randint(10, 200, (len(rows), steps), generator=torch.Generator().manual_seed(seed))
    results = []
    for forward in (one_token, lambda decoder, **call: decoder(**call)):
        cache = model(**batch, use_cache=True).past_key_values
        mask, states = batch["attention_mask"], []
        for index in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            embeds = model.get_input_embeddings()(words[:, index : index + 1])
            positions = mask.cumsum(dim=-1)[:, -1:] - 1
            call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            states.append(forward(decoder, inputs_embeds=embeds, **call).last_hidden_state)
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
    (fast, fast_cache), (own, own_cache) = both_ways(MODELS[kind], rows, seed, left)
    torch.testing.assert_close(fast, own, rtol=1e-5, atol=1e-5)
    assert fast_cache.get_seq_length() == own_cache.get_seq_length()
    for one, other in zip(fast_cache.layers, own_cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_near_the_truth():
    truth = both_ways(MODELS["qwen2"], ["wIww", "Iw"], 0, left=True)[1][0]
    (fast, _), (own, _) = both_ways(tiny_model().bfloat16(), ["wIww", "Iw"], 0, left=True)
    assert (fast - truth).norm() <= 1.3 * (own - truth).norm()


def test_generation_takes_it(monkeypatch):
    model = tiny_model()
    batch = layout_batch(model, ["wIww"], seed=1)
    model.generation_config.eos_token_id = None
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    outputs = []

    def recorded(*args, **kwargs):
        outputs.append(one_token(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(modeling_prefix_vlm, "one_token", recorded)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    assert [output is not None for output in outputs] == [False] + 5 * [True]  # the prompt, and each token after the first


def prompt_cache(model) -> DynamicCache:
    """Of a prompt of seven tokens."""
    with torch.no_grad():
        return model(**layout_batch(model, ["wIww"], seed=1), use_cache=True).past_key_values


def takes(model, **changed) -> bool:
    """Whether the fast path takes the token after a prompt, with some arguments changed."""
    cache = prompt_cache(model) if "past_key_values" not in changed else None
    call = {"inputs_embeds": torch.zeros(1, 1, 48), "attention_mask": torch.ones(1, 8), "position_ids": None}
    call |= {"past_key_values": cache, "use_cache": True, "cache_position": torch.tensor([7]), "flag": False, "none": None}
    return one_token(model.get_decoder(), **{**call, **changed}) is not None


@torch.no_grad()
def test_what_it_does_not_know_is_left_to_the_decoder():
    model = tiny_model()
    assert takes(model)
    assert not takes(model, output_hidden_states=True)
    assert not takes(model, attention_mask=torch.ones(1, 1, 1, 8))
    assert not takes(model, inputs_embeds=torch.zeros(1, 2, 48))
    assert not takes(model, past_key_values=StaticCache(config=model.config.get_text_config(), max_cache_len=16))
    assert not takes(model, past_key_values=DynamicCache())
    assert not takes(model, past_key_values=None)
    with torch.enable_grad():
        assert not takes(model)
    model.get_decoder().train()
    assert not takes(model)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layers.1", "layers.0.self_attn", "layers.0.mlp", "norm", "layers.1.input_layernorm"])
def test_a_hook_on_a_module_it_skips_is_respected(where):
    model = tiny_model()
    model.get_decoder().get_submodule(where).register_forward_hook(lambda *args: None)
    assert not takes(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "qwen3"), ("layer_types", ["full_attention", "sliding_attention"])]
)
def test_other_decoders_are_left_alone(field, value):
    model = tiny_model()
    cache = prompt_cache(model)
    setattr(model.get_decoder().config, field, value)
    assert not takes(model, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self_attn", "input_layernorm"])
def test_a_replaced_module_is_respected(name):
    model = tiny_model()
    layer = model.get_decoder().layers[1]
    module = getattr(layer, name)

    class Replaced(type(module)):
        """Computes the same, but is not the decoder's own class."""

    module.__class__ = Replaced
    assert not takes(model)
