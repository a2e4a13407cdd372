"""Pretrained backbones of many kinds, joined without losing a bit of their weights or of what they compute."""

from functools import partial
from pathlib import Path

import pytest
import torch
from decoders import DECODERS, GEMMA, GEMMA3_LAYERS, NAMES, SIZES, TEXT, TIED, UNTIED, decoder
from PIL import Image
from tiny import image_numbers, layout_batch, rule_mask, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.configuration_prefix_vlm import ATTENTION_MODES

DOCS = Path(__file__).parents[2] / "docs" / "BACKBONES.md"
VOCABULARY = TEXT["vocab_size"]
WINDOW = 8
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
CAPTION_TOWER = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}

VISION_MODELS = {
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=CAPTION_TOWER, vision_config=VISION)),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=CAPTION_TOWER, vision_config=VISION, projection_dim=16)),
}
TEXT_MODELS = {
    **{kind: partial(decoder, kind) for kind in DECODERS},
    "qwen2_untied": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, **UNTIED)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **TIED)),
}
NARROW_TEXT_MODELS = {  # windows shorter than the prompts here
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TEXT, **TIED, **{**GEMMA, "sliding_window": WINDOW})),
    "gemma3_text": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**TEXT, **TIED, **{**GEMMA, "sliding_window": WINDOW}, **GEMMA3_LAYERS)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, **UNTIED, head_dim=8, sliding_window=WINDOW)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**TEXT, **UNTIED, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**TEXT, **TIED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
ALL_MODELS = {**VISION_MODELS, **TEXT_MODELS, **{f"narrow_{name}": make for name, make in NARROW_TEXT_MODELS.items()}}
IMAGE_TOKEN_ID = 1
STATIC = {"cache_implementation": "static", "disable_compile": True}

texts = pytest.mark.parametrize("text", TEXT_MODELS)
narrow_texts = pytest.mark.parametrize("text", [f"narrow_{name}" for name in NARROW_TEXT_MODELS])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives (folder, model) of a backbone by name; each is made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(sum(map(ord, name)))
            folder, model = tmp_path_factory.mktemp(name), ALL_MODELS[name]().eval()
            model.save_pretrained(folder)
            if "gemma2" in name:  # sdpa, which transformers 4 takes, leaves out its soft-capping
                model.set_attn_implementation("eager")
            made[name] = folder, model
        return made[name]

    return get


@pytest.fixture(scope="module")
def join(saved):
    def get(vision="siglip_vision", text="qwen2", **kwargs):
        kwargs.setdefault("image_token_id", IMAGE_TOKEN_ID)
        torch.manual_seed(0)
        return PrefixVLMForConditionalGeneration.from_backbones(saved(vision)[0], saved(text)[0], **kwargs)

    return get


def image_tower_weights(model) -> dict:
    """The image tower's weights by the names they have inside `vision_model`, without what no patch feature passes:
    SigLIP's pooling head, CLIP's norm of the class token."""
    tower = getattr(model, "vision_model", model)
    weights = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    others = ("head.", "post_layernorm.") if "pre_layrnorm.weight" in weights else ("head.",)
    return {name: value for name, value in weights.items() if not name.startswith(others)}


def same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("vision", VISION_MODELS)
@torch.no_grad()
def test_image_towers(vision, saved, join):
    source, model = saved(vision)[1], join(vision)
    same(image_tower_weights(model.vision_tower), image_tower_weights(source))
    pixels = torch.randn(2, 3, 16, 16)
    tower = getattr(source, "vision_model", source)
    states = tower(pixel_values=pixels).last_hidden_state
    if "clip" in vision:
        assert states.shape[1] == 5  # a class token before the four patches
        states = states[:, 1:]
    features = model.projector(model.get_vision_features(pixels))
    assert features.shape == (2, 4, 32)
    assert torch.equal(features, model.projector(states))
    assert model.config.num_image_tokens == 4


@texts
@torch.no_grad()
def test_decoders_keep_their_weights_and_their_logits(text, saved, join):
    source = saved(text)[1]
    model = join(text=text, attention_mode="causal")
    same(model.language_model.state_dict(), source.state_dict())
    tied = source.config.tie_word_embeddings
    assert model.config.tie_word_embeddings is tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    # with causal attention and no image it is the language model itself, its head and windows included
    batch = layout_batch(model, ["w" * 12, "w" * 7], seed=1)
    del batch["pixel_values"]
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    ours, theirs = model(**batch, labels=labels), source(**batch, labels=labels)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[valid], theirs.logits[valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch, labels=labels, skip_logits=True).loss, theirs.loss, rtol=1e-5, atol=1e-5)


@texts
def test_decoders_answer_and_survive_saving(text, join, tmp_path):
    model = join("clip_vision" if text == "qwen3" else "siglip_vision", text)
    batch = layout_batch(model, ["wIww", "Iwwwww"], seed=2, padding_side="left")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(model.generate(**batch, **settings), plain)
    assert torch.equal(model.generate(**batch, **settings, **STATIC), plain)

    model.save_pretrained(tmp_path)
    again = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, **settings), plain)


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}], ids=["default", "eager"])
@pytest.mark.parametrize("text", DECODERS)
@torch.no_grad()
def test_decoders_obey_every_mask(text, attention, join):
    """Exactly the positions that the rule allows feel a change of a word or a picture, over both layers."""
    model = join(text=text, **attention)
    layout = "wIwwIw"
    images = image_numbers(layout, model.config.num_image_tokens)
    batch = layout_batch(model, [layout], seed=1)
    for mode in ATTENTION_MODES:
        model.config.attention_mode = mode
        one_layer = rule_mask(mode, images).float()
        reach = one_layer @ one_layer > 0
        before = model(**batch, use_cache=False).logits
        for place in range(len(images)):
            changed = {name: value.clone() for name, value in batch.items()}
            if images[place]:
                changed["pixel_values"][images[place] - 1] += torch.linspace(-1, 1, 16)
                places = [k for k, image in enumerate(images) if image == images[place]]
            else:
                changed["input_ids"][0, place] = 4 + (batch["input_ids"][0, place] + 1) % 100
                places = [place]
            moved = (model(**changed, use_cache=False).logits - before).abs().amax(-1)[0]
            expected = reach[:, places].any(-1)
            assert moved[~expected].eq(0).all(), (mode, place, moved)
            assert moved[expected].gt(1e-6).all(), (mode, place, moved)


def test_the_table_in_the_docs_has_the_decoders_that_are_tried_here():
    rows = []
    for kind, name in NAMES.items():
        model = decoder(kind)
        assert model.config.model_type == kind
        window = "where its configuration has one" if hasattr(model.config, "sliding_window") else "no"
        rows.append(f"| {name} | `{type(model).__name__}` | {window} |")
    table = DOCS.read_text(encoding="utf-8").split("\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert table == rows
    assert NAMES.keys() == DECODERS.keys()


@narrow_texts
@torch.no_grad()
def test_inside_its_window_a_decoder_is_itself(text, saved, join):
    model, source = join(text=text, attention_mode="causal"), saved(text)[1]
    batch = layout_batch(model, ["w" * WINDOW], seed=3)
    del batch["pixel_values"]
    torch.testing.assert_close(model(**batch).logits, source(**batch).logits, rtol=1e-4, atol=1e-4)
    image = layout_batch(join(text=text), ["Iw"], seed=3)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**image, **settings, use_cache=False)
    assert torch.equal(model.generate(**image, **settings), plain)


@narrow_texts
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, STATIC], ids=["dynamic", "uncached", "static"])
def test_more_tokens_than_a_window_are_refused(text, settings, join):
    """A decoder with a sliding window of eight tokens must not silently look back further."""
    model = join(text=text)
    batch = layout_batch(model, ["w" * (WINDOW + 1)], seed=3)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="exceed the sliding window of 8 in some layers"):
        model.generate(**batch, max_new_tokens=3, eos_token_id=None, do_sample=False, **settings)


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_the_vocabulary_grows_for_an_image_token_beyond_it(text, saved, join, tmp_path):
    model = join(text=text, image_token_id=VOCABULARY + 4)
    source = saved(text)[1]
    assert model.config.image_token_id == VOCABULARY + 4
    assert model.config.text_config.vocab_size == VOCABULARY + 5
    for ours, theirs in (
        (model.get_input_embeddings(), source.get_input_embeddings()),
        (model.get_output_embeddings(), source.get_output_embeddings()),
    ):
        assert ours.weight.shape[0] == VOCABULARY + 5
        assert torch.equal(ours.weight[:VOCABULARY], theirs.weight)
        assert torch.isfinite(ours.weight).all()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (text == "qwen2")
    batch = layout_batch(model, ["wIww"], seed=5)
    model.save_pretrained(tmp_path)
    again = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(**batch).logits
        assert logits.shape[-1] == VOCABULARY + 5
        assert torch.equal(again(**batch).logits, logits)


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_folder_without_a_tokenizer_gets_a_new_row_for_the_image_token(text, join):
    # no existing row may become the image's: it would be some word
    model = join(text=text, image_token_id=None)
    assert model.config.image_token_id == VOCABULARY
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 1


@pytest.mark.parametrize(("vocabulary", "rows"), [(258, 260), (300, 300)], ids=["too_small", "padded"])
def test_model_and_processor_agree_on_the_image_token(vocabulary, rows, saved, tmp_path):
    tokenizer = plain_tokenizer()
    assert len(tokenizer) == 257
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "vocab_size": vocabulary})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vision = saved("siglip_vision")[0]
    model = PrefixVLMForConditionalGeneration.from_backbones(vision, tmp_path)
    processor = PrefixVLMProcessor.from_backbones(vision, tmp_path)
    assert model.config.image_token_id == processor.image_token_id == 257
    assert processor.num_image_tokens == model.config.num_image_tokens
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == rows
    image = Image.new("RGB", (20, 20), (200, 30, 60))
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].max() < rows
    assert torch.isfinite(model(**inputs).logits).all()


def test_an_image_token_the_tokenizer_has_is_taken(saved, tmp_path):
    Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "vocab_size": 264})).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path)
    assert model.config.image_token_id == 1
    assert model.config.text_config.vocab_size == 264


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer without image and turn tokens."""
    full = tiny_tokenizer().backend_tokenizer
    words = sorted(set(full.get_vocab()) - {"<|image_pad|>", "<|im_start|>", "<|im_end|>"}, key=full.token_to_id)
    backend = Tokenizer(type(full.model)(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = full.pre_tokenizer, full.decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_dtype_asked_for(dtype, join):
    model = join(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype


def test_configuration_fields_are_passed_on(join):
    model = join(attention_mode="bidirectional", projector_hidden_size=7, attn_implementation="eager")
    assert model.config.attention_mode == "bidirectional"
    assert model.projector.linear_1.out_features == 7
    assert model.language_model.config._attn_implementation == "eager"


def test_a_decoder_without_attention_is_refused(saved, tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4D attention mask"):
        PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path, image_token_id=5)


def test_a_decoder_whose_mask_only_some_layers_obey_is_refused(saved, tmp_path):
    """A convolution mixes each token with those before it: of another packed sample, or of padding."""
    config = Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whatever the mask says"):
        PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path, image_token_id=5)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (
            "gemma3",
            lambda: Gemma3ForConditionalGeneration(
                Gemma3Config(text_config=DECODERS["gemma3_text"](), vision_config=SiglipVisionConfig(**VISION))
            ),
        ),
        ("t5", lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))),
        ("siglip_vision_model", VISION_MODELS["siglip_vision"]),
    ],
    ids=["multimodal", "encoder-decoder", "encoder"],
)
def test_what_is_no_decoder_alone_is_refused(kind, model, saved, tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a {kind} model, not a decoder language model alone"):
        PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path)


def test_gpt2_obeys_or_is_refused(saved, tmp_path):
    """On transformers 5 it obeys; 4.x gives no access to its decoder alone."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    def build():
        return PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path, image_token_id=5)

    if not isinstance(GPT2LMHeadModel(config).get_decoder(), GPT2Model):
        with pytest.raises(ValueError, match="4D attention mask"):
            build()
        return
    model = build()
    batch = layout_batch(model, ["Iwww"], seed=6)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))
    with torch.no_grad():
        open_image = model(**batch).logits
        model.config.attention_mode = "causal"
        assert not torch.allclose(model(**batch).logits, open_image)


def test_a_decoder_that_ignores_the_mask_is_refused(join, monkeypatch):
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, **kwargs: forward(self, **{**kwargs, "attention_mask": None}))
    with pytest.raises(ValueError, match="ignores a 4D attention mask"):
        join(text="llama_tied")


def test_a_decoder_with_an_unknown_head_is_refused(join, monkeypatch):
    forward = LlamaForCausalLM.forward

    def doubled(self, **kwargs):
        outputs = forward(self, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="modifies its logits"):
        join(text="llama_tied")


def test_a_naflex_encoder_is_refused(saved, tmp_path):
    config = {key: value for key, value in VISION.items() if key != "image_size"}
    Siglip2VisionModel(Siglip2VisionConfig(**config, num_patches=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without a fixed square image size"):
        PrefixVLMForConditionalGeneration.from_backbones(tmp_path, saved("qwen2")[0], image_token_id=5)


@pytest.mark.parametrize("lost", ["patch_embedding", "layers.1.self_attn.q_proj", "post_layernorm"])
def test_missing_vision_weights_are_refused(lost, saved, tmp_path):
    source = saved("siglip_vision")[1]
    left = {name: value for name, value in source.state_dict().items() if lost not in name}
    source.save_pretrained(tmp_path, state_dict=left)
    with pytest.raises(ValueError, match=f"lacks weights of the vision encoder.*{lost}"):
        PrefixVLMForConditionalGeneration.from_backbones(tmp_path, saved("qwen2")[0], image_token_id=5)


def test_weights_that_nothing_reads_are_left_out_without_a_word(join, caplog):
    join("siglip_vision", vision_feature_layer=1)  # without its pooling head, second layer and final norm
    assert "head" not in caplog.text


def test_missing_text_weights_are_refused(saved, tmp_path):
    source = saved("qwen2")[1]
    left = {name: value for name, value in source.state_dict().items() if "layers.1." not in name and "lm_head" not in name}
    source.save_pretrained(tmp_path, state_dict=left)
    with pytest.raises(ValueError, match="lacks weights"):
        PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path, image_token_id=5)


@pytest.mark.parametrize("own_ends", [0, [7, 0]])
def test_a_backbone_without_a_tokenizer_keeps_its_own_stop_tokens(own_ends, saved, tmp_path):
    text = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    text.generation_config.eos_token_id = own_ends
    text.save_pretrained(tmp_path)
    model = PrefixVLMForConditionalGeneration.from_backbones(saved("siglip_vision")[0], tmp_path)
    assert model.generation_config.eos_token_id == own_ends


@pytest.mark.parametrize("own_ends", [0, [7, 0]])
def test_answers_stop_at_the_end_of_a_turn_and_where_the_backbone_did(own_ends, saved, tmp_path):
    text = Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "vocab_size": 257}))
    text.generation_config.eos_token_id = own_ends
    text.save_pretrained(tmp_path / "text")
    plain_tokenizer().save_pretrained(tmp_path / "text")
    vision = saved("siglip_vision")[0]
    model = PrefixVLMForConditionalGeneration.from_backbones(vision, tmp_path / "text")
    tokenizer = PrefixVLMProcessor.from_backbones(vision, tmp_path / "text").tokenizer
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(tmp_path / "saved")
    for one in (model, PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")):
        ends = one.generation_config.eos_token_id
        assert ends[:2] == [turn_end, tokenizer.eos_token_id]
        assert len(ends) == len(set(ends))
        assert set(ends) == {turn_end, tokenizer.eos_token_id, 0, *([7] if own_ends else [])}
        assert one.generation_config.pad_token_id == tokenizer.pad_token_id

    # a head that always predicts the end of the turn
    logits = model._head
    model._head = lambda hidden: logits(hidden).index_fill(-1, torch.tensor([turn_end]), 1e4)
    output = model.generate(input_ids=torch.tensor([[65, 66]]), max_new_tokens=5, do_sample=False)
    assert output[0, 2:].tolist() == [turn_end]


def test_no_stop_token_is_saved_twice(tmp_path):
    """transformers 4's `Trainer` puts the tokenizer's end token before those that are there."""
    model = tiny_model()
    model.generation_config.eos_token_id = [0, 3, 0]
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 3]
