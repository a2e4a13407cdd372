"""What the transformers backends of vLLM and SGLang ask of a model and its processor, by stubs that call as they do.

The stubs follow the sources that docs/ENGINES.md names, and patch nothing into the product: as the backends do, they
register an attention function, build `AutoModel` from the configuration, fill it with a checkpoint's weights, and call.

Shapes: T tokens of all requests, one after another, P image tokens, D width, I images.
"""

import re

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE_TOKEN_ID, layout_batch, rule_mask, tiny_config, tiny_model, tiny_processor
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prefixvlm  # noqa: F401
from prefixvlm import PrefixVLMForConditionalGeneration

HEADS = 4


class Attention:
    """An engine's attention in one layer: what may attend to what it knows from elsewhere, never from the mask."""

    def __init__(self, allowed: torch.Tensor):
        self.allowed = allowed  # (T, T) bool

    def forward(self, query, key, value):
        """(T, heads * width) each to the same."""
        length = query.shape[0]
        width = query.shape[1] // HEADS
        query, key, value = (one.view(1, length, -1, width).transpose(1, 2) for one in (query, key, value))
        repeats = HEADS // key.shape[1]
        key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.allowed)
        return out.transpose(1, 2).reshape(length, -1)


def attention_forward(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None
    length = query.shape[-2]
    query, key, value = (one.transpose(1, 2).reshape(length, -1) for one in (query, key, value))
    return attention_instances[module.layer_idx].forward(query, key, value), None


class Embedding(nn.Module):
    """An engine's embedding table, which is no `nn.Embedding`."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


def vllm_name(name: str) -> str:
    name = re.sub(r"^(?!model\.)((vision_tower|projector|language_model).*)", r"model.\1", name)
    return re.sub(r"^model\.(.+\.)*(lm_head.+)", r"\2", name)


def sglang_name(name: str) -> str:
    for old, new in (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model.")):
        if name.startswith(old):
            return name.replace(old, new, 1)
    return f"model.{name}"


class Engine(nn.Module):
    """What both backends do alike; `name` chooses the attention and how weights are named."""

    def __init__(self, folder, name: str):
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        self.text_config = self.config.get_text_config()
        self.text_config._attn_implementation = name
        with torch.device("meta"):  # the engine's look at the class of the decoder
            self.decoder = type(AutoModel.from_config(self.config, dtype=torch.float32).get_decoder())
        self.model = AutoModel.from_config(self.config, dtype=torch.float32).eval()
        self.model.set_input_embeddings(Embedding(self.text_config.vocab_size, self.text_config.hidden_size))
        self.lm_head = nn.Linear(self.text_config.hidden_size, self.text_config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.get_input_embeddings().weight
        rename = {"vllm": vllm_name, "sglang": sglang_name}[name]
        weights = {rename(old): value for old, value in load_file(folder / "model.safetensors").items()}
        own = dict(self.named_parameters())
        # vLLM refuses a parameter that no file fills, and both a weight that has no place
        assert weights.keys() == own.keys()
        with torch.no_grad():
            for key, value in weights.items():
                own[key].copy_(value)

    @torch.no_grad()
    def forward(self, allowed, positions, **inputs):
        """Logits (T, V) of a flat batch; `positions` (T,) start again with each request."""
        instances = {layer: Attention(allowed) for layer in range(self.text_config.num_hidden_layers)}
        hidden = self.model(
            **{"input_ids": None, "inputs_embeds": None, **inputs},
            use_cache=False,
            position_ids=positions[None],
            attention_instances=instances,
            return_dict=False,
        )[0][0, ...]
        assert hidden.shape[-1] == self.text_config.hidden_size
        return self.lm_head(hidden)

    @torch.no_grad()
    def embed(self, batch: dict):
        """(1, T, D) with the image features in place, as vLLM fills them in."""
        features = self.model.get_image_features(batch["pixel_values"], **batch.get("further", {}))
        if isinstance(features, tuple):
            features = features[0]
        elif not torch.is_tensor(features):
            features = features.pooler_output
        ids = batch["input_ids"]
        embeds = self.model.get_input_embeddings()(ids)
        embeds[ids == self.config.image_token_id] = features.flatten(0, 1)
        return embeds


@pytest.fixture(autouse=True)
def attention():
    for name in ("vllm", "sglang"):
        ALL_ATTENTION_FUNCTIONS[name] = attention_forward
    yield
    for name in ("vllm", "sglang"):
        del ALL_ATTENTION_FUNCTIONS[name]


@pytest.fixture
def saved(tmp_path):
    def save(mode: str, **kwargs):
        model = tiny_model(mode, **kwargs)
        model.save_pretrained(tmp_path / mode)
        return tmp_path / mode, model

    return save


REQUESTS = ["Iww", "wIIw", "www"]  # adjacent images, and a request without any


def flat_batch(model):
    """The requests in one row, who may attend to whom, the positions, and each one's logits by transformers."""
    alone = [layout_batch(model, [request], seed=number) for number, request in enumerate(REQUESTS)]
    with torch.no_grad():
        expected = torch.cat(
            [
                model(**{**one, "pixel_values": one["pixel_values"] if len(one["pixel_values"]) else None}).logits[0]
                for one in alone
            ]
        )
    ids = torch.cat([one["input_ids"] for one in alone], dim=1)
    lengths = [one["input_ids"].shape[1] for one in alone]
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    is_image, images, count = (ids[0] == IMAGE_TOKEN_ID).tolist(), [], 0
    for one in is_image:
        count += one
        images.append((count - 1) // model.config.num_image_tokens + 1 if one else 0)
    # vLLM opens an image to itself where the configuration says so
    allowed = rule_mask("prefix" if model.config.is_mm_prefix_lm else "causal", images, documents=documents)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return (
        {"input_ids": ids, "pixel_values": torch.cat([one["pixel_values"] for one in alone])},
        allowed,
        positions,
        expected,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["causal", "prefix"])
def test_vllm_gives_the_logits_of_transformers(saved, mode, tied):
    folder, model = saved(mode)
    if not tied:
        model.config.tie_word_embeddings = False
        model.language_model.lm_head.weight = nn.Parameter(torch.randn_like(model.language_model.lm_head.weight))
        model.save_pretrained(folder)
    batch, allowed, positions, expected = flat_batch(model)
    engine = Engine(folder, "vllm")
    logits = engine(allowed, positions, inputs_embeds=engine.embed(batch))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_sglang_gives_the_logits_of_transformers(saved):
    folder, model = saved("causal")
    batch, allowed, positions, expected = flat_batch(model)
    engine = Engine(folder, "sglang")
    # the prompt's ids with its images, and one step of several requests without
    logits = engine(
        allowed, positions, input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], forward_batch=None
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits = engine(allowed, positions, inputs_embeds=engine.embed(batch), forward_batch=None)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_ids_without_images_are_only_embedded(saved, name):
    """An engine's warm-up passes any ids in any number, longer than the context, also those of images."""
    folder, model = saved("causal")
    engine = Engine(folder, name)
    length = model.config.text_config.max_position_embeddings + 1
    ids, positions = torch.full((1, length), IMAGE_TOKEN_ID), torch.arange(length) % 7
    assert engine(torch.ones(length, length).tril().bool(), positions, input_ids=ids).isfinite().all()


class NoSync(torch.overrides.TorchFunctionMode):
    """Fails where a program asks a device for a value, which CUDA graphs do not survive."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("__bool__", "__int__", "__index__", "item", "tolist", "tensor", "nonzero"), name
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing(saved):
    folder, model = saved("prefix")
    batch, allowed, positions, _ = flat_batch(model)
    engine = Engine(folder, "vllm")
    embeds = engine.embed(batch)
    with NoSync():
        engine(allowed, positions, inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("engine", "mode"),
    [("vllm", "prefix_all_images"), ("vllm", "bidirectional"), ("sglang", "prefix"), ("sglang", "prefix_all_images")],
)
def test_modes_that_an_engine_does_not_follow_are_refused(engine, mode):
    config = tiny_config(mode)
    config.get_text_config()._attn_implementation = engine
    with pytest.raises(
        ValueError, match=rf"attention_mode is '{mode}', but {engine} would attend otherwise; choose causal"
    ):
        AutoModel.from_config(config)


def test_a_mode_that_is_set_later_is_refused_too(saved):
    folder, model = saved("prefix")
    batch, allowed, positions, _ = flat_batch(model)
    engine = Engine(folder, "vllm")
    engine.config.attention_mode = "prefix_all_images"
    with pytest.raises(ValueError, match="vllm would attend otherwise"):
        engine(allowed, positions, inputs_embeds=engine.embed(batch))


def test_a_mask_in_an_engine_is_refused(saved):
    folder, _ = saved("prefix")
    engine = Engine(folder, "vllm")
    with pytest.raises(ValueError, match="vllm attention would drop the attention_mask; leave it out"):
        engine(None, torch.arange(3), inputs_embeds=torch.zeros(1, 3, 48), attention_mask=torch.ones(1, 3))


def test_the_class_with_the_head_is_not_for_engines():
    config = tiny_config("causal")
    config.get_text_config()._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="loads the model by AutoModel"):
        PrefixVLMForConditionalGeneration(config)


@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images", "bidirectional"])
def test_only_the_prefix_mode_is_that_of_a_prefix_language_model(mode):
    config = tiny_config(mode)
    assert bool(config.is_mm_prefix_lm) == (mode == "prefix")
    assert config != config.get_text_config()
    assert "is_mm_prefix_lm" not in config.to_dict()


def test_the_repository_has_what_vllm_looks_up(saved):
    folder, _ = saved("prefix")
    tiny_processor().save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert {"AutoConfig", "AutoModel", "AutoModelForMultimodalLM"} <= config.auto_map.keys()
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
    assert model_class.__name__ == "PrefixVLMModel"
    assert model_class.is_backend_compatible()
    config.get_text_config()._attn_implementation = "vllm"
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "PrefixVLMModel"
    assert any("language_model" in pattern for pattern in model.tp_plan if model.tp_plan)
    if hasattr(model, "get_encoder") and transformers.__version__ >= "5":
        assert model.get_encoder(modality="image") is model.vision_tower
        auto_class = transformers.AutoModelForMultimodalLM
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "PrefixVLMForConditionalGeneration"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor._get_num_multimodal_tokens(image_sizes=[(20, 30)])["num_image_tokens"] == [4]


PICTURES = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (9, 5), "blue")]


def test_the_processor_counts_before_it_is_called():
    processor = tiny_processor()
    counts = processor._get_num_multimodal_tokens(image_sizes=[(30, 20), (10_000, 10_000)], do_resize=True)
    assert counts["num_image_tokens"] == [4, 4]
    assert counts["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    assert processor.image_token_ids == [IMAGE_TOKEN_ID]


def test_token_types_place_the_images():
    """vLLM with transformers before 5.15: the real prompt, from its ids."""
    processor = tiny_processor()
    token = processor.image_token
    prompt = processor.decode(processor.text_ids(f"a{token}b{token}{token}c"))
    assert prompt == f"a{token}b{token}{token}c"
    output = processor(
        text=prompt,
        images=[PICTURES[0], *PICTURES],
        return_mm_token_type_ids=True,
        truncation=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    (ids,) = output["input_ids"].tolist()
    places = torch.where(output["mm_token_type_ids"][0] == 1)[0]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(30, 20), (30, 20), (5, 9)])["num_image_tokens"]
    assert [part.tolist() for part in places.split(counts)] == [[1, 2, 3, 4], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert {ids[place] for place in places} == set(processor.image_token_ids)
    assert len(output["pixel_values"]) == 3
    assert output.keys() == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}


def test_replacements_place_the_images():
    """vLLM with transformers from 5.15: a text of placeholders alone, which it puts into the real prompt by itself."""
    processor = tiny_processor()
    token = processor.image_token
    for text in (token * 2, f"a{token}b{token}c"):
        output = processor(text=text, images=PICTURES, return_text_replacement_offsets=True, return_tensors="pt")
        (entries,) = output.pop("text_replacement_offsets")
        assert [entry["type"] for entry in entries] == ["image", "image"]
        expanded = text
        for entry in reversed(entries):
            start, end = entry["span"]
            assert text[start:end] == entry["text"] == token
            expanded = expanded[:start] + entry["replacement"] + expanded[end:]
        for entry in entries:
            assert expanded[slice(*entry["new_span"])] == entry["replacement"]
            ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
            assert ids == [IMAGE_TOKEN_ID] * 4
        ids = processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        assert ids == output["input_ids"][0].tolist()


def test_replacements_of_a_text_without_images_are_none():
    output = tiny_processor()(text="hello", return_text_replacement_offsets=True, return_tensors="pt")
    assert output["text_replacement_offsets"] == [[]]


def test_placeholders_without_images_are_a_value_error():
    """vLLM catches it, and tokenizes such a text by itself."""
    processor = tiny_processor()
    with pytest.raises(ValueError, match="image"):
        processor(text=processor.image_token + "hello", return_tensors="pt")


@pytest.mark.parametrize("further", [{}, {"return_dict": True}])
def test_image_features_by_every_way_of_asking(saved, further):
    folder, model = saved("prefix")
    batch = layout_batch(model, ["Iw"])
    expected = model(**batch).image_hidden_states
    engine = Engine(folder, "vllm")
    embeds = engine.embed({**batch, "further": further})
    places = batch["input_ids"] == IMAGE_TOKEN_ID
    torch.testing.assert_close(embeds[places], expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
