"""Every way to generate must give the answer of the plainest one: no cache, one sample at a time."""

import threading

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    FIRST_WORD,
    IMAGE_TOKEN_ID,
    layout_batch,
    random_batch,
    row_alone,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer, pipeline, set_seed

NEW_TOKENS = 6
STATIC = {"cache_implementation": "static", "disable_compile": True}
CACHE_MODES = ("causal", "prefix", "prefix_all_images")
ASCII_LETTERS = [tiny_tokenizer().convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]

# the same examples each time, since two words may be as good as equally likely; shrinking would take minutes
GENERATION = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}

cache_modes = pytest.mark.parametrize("mode", CACHE_MODES)
MODELS = {mode: tiny_model(mode) for mode in (*CACHE_MODES, "bidirectional")}
for _model in MODELS.values():
    _model.generation_config.eos_token_id = None  # answers of full length, unless a test says otherwise


def answers(model, batch: dict, **kwargs) -> list[list[int]]:
    """The new tokens of each row, greedy unless told otherwise."""
    output = model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs})
    return output[:, batch["input_ids"].shape[1] if "input_ids" in batch else 0 :].tolist()


@torch.no_grad()
def with_features(model, batch: dict) -> dict:
    """The same input as embeddings that already hold the image features."""
    is_image = batch["input_ids"] == IMAGE_TOKEN_ID
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter(is_image[..., None], model.projector(model.get_vision_features(batch["pixel_values"])))
    return {"inputs_embeds": embeds, "token_type_ids": is_image.long(), "attention_mask": batch["attention_mask"]}


def red_image() -> Image.Image:
    return Image.new("RGB", (20, 20), (200, 30, 60))


@cache_modes
@given(
    seed=st.integers(0, 10_000),
    rows=st.lists(st.from_regex(r"w{0,2}(I{1,2}w{1,3}){1,3}|w{1,3}", fullmatch=True), min_size=2, max_size=3),
)
@settings(max_examples=6, **GENERATION)
def test_cached_uncached_static_batched_and_alone_agree(mode, seed, rows):
    model = MODELS[mode]
    batch = layout_batch(model, rows, seed=seed, padding_side="left")
    plain = [answers(model, row_alone(batch, row, model), use_cache=False)[0] for row in range(len(rows))]
    assert answers(model, batch, use_cache=False) == plain
    assert answers(model, batch) == plain
    assert answers(model, batch, **STATIC) == plain


@cache_modes
def test_eager_attention_agrees(mode):
    batch = layout_batch(MODELS[mode], ["wIwIw", "Iww"], seed=1, padding_side="left")
    eager = tiny_model(mode, attn_implementation="eager")
    eager.generation_config.eos_token_id = None
    plain = answers(MODELS[mode], batch, use_cache=False)
    assert answers(eager, batch) == plain
    assert answers(eager, batch, **STATIC) == plain


@cache_modes
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, **GENERATION)
def test_beam_search_agrees(mode, seed):
    model = MODELS[mode]
    batch = random_batch(model, [3, 5], seed=seed, padding_side="left")
    plain = answers(model, batch, num_beams=3, use_cache=False)
    assert answers(model, batch, num_beams=3) == plain
    assert answers(model, batch, num_beams=3, **STATIC) == plain
    assert [answers(model, row_alone(batch, row, model), num_beams=3)[0] for row in range(2)] == plain


@pytest.mark.parametrize("repeated", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_keeps_the_images_of_a_row_together(repeated):
    model = MODELS["prefix"]
    # rows with different numbers of images, so that repeating each image in place cannot come out right by chance
    batch = layout_batch(model, ["IwIww", "Iww", "IIw"], seed=2, padding_side="left")
    expected = answers(model, with_features(model, batch), **repeated)  # features inside a row cannot be separated from it
    assert answers(model, batch, **repeated) == expected
    rows = [row_alone(batch, row, model) for row in range(3)]
    assert [answer for row in rows for answer in answers(model, row, **repeated)] == expected
    nested = [{**row, "pixel_values": row["pixel_values"][None]} for row in rows]
    assert [answer for row in nested for answer in answers(model, row, **repeated)] == expected


def test_several_samples_of_a_row_see_that_rows_images():
    model = MODELS["prefix"]
    batch = layout_batch(model, ["IwIww"], seed=3)
    kwargs = {"do_sample": True, "num_return_sequences": 3, "top_k": 1}  # the likeliest word each time
    assert answers(model, batch, **kwargs) == answers(model, batch) * 3


@cache_modes
def test_sampling_repeats_under_a_seed(mode):
    batch = random_batch(MODELS[mode], [3, 5], seed=4, padding_side="left")

    def sample(seed):
        set_seed(seed)
        return answers(MODELS[mode], batch, do_sample=True, temperature=1.5)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_prompt_lookup_agrees():
    model = MODELS["prefix"]
    batch = random_batch(model, [6], seed=5)
    batch["input_ids"][0, -3:] = batch["input_ids"][0, 4:7]  # a repetition to look up
    lookup = answers(model, batch, prompt_lookup_num_tokens=2, eos_token_id=0)  # 4.x needs an end token for this
    assert lookup == answers(model, batch, use_cache=False, eos_token_id=0)


def test_streamed_text_is_the_text():
    model, tokenizer = MODELS["prefix"], tiny_processor().tokenizer
    batch = random_batch(model, [4], seed=6)
    batch["input_ids"][batch["input_ids"] >= len(tokenizer)] = FIRST_WORD
    other_tokens = [token for token in range(model.config.text_config.vocab_size) if token not in ASCII_LETTERS]
    settings = {"max_new_tokens": 12, "suppress_tokens": other_tokens}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    thread = threading.Thread(target=answers, args=(model, batch), kwargs={**settings, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(answers(model, batch, **settings)[0])
    assert len("".join(pieces)) == 12


def test_generation_stops_at_the_end_token():
    model = MODELS["prefix"]
    batch = random_batch(model, [3, 5], seed=7, padding_side="left")
    free = answers(model, batch, max_new_tokens=10)
    end = free[0][2]
    assert end not in free[0][:2]
    assert end not in free[1][:3]  # so the second row goes on for longer
    stopped = answers(model, batch, max_new_tokens=10, eos_token_id=end, pad_token_id=0)
    assert stopped[0] == free[0][:3] + [0] * (len(stopped[0]) - 3)
    wanted = free[1][: free[1].index(end) + 1] if end in free[1] else free[1]
    assert stopped[1] == wanted
    # the model's own end token, as its text configuration names it
    fresh = tiny_model("prefix")
    assert fresh.generation_config.eos_token_id == fresh.config.text_config.eos_token_id == 0
    fresh.language_model.lm_head.register_forward_hook(favour(0))
    assert answers(fresh, batch) == [[0], [0]]


def favour(token: int):
    """A hook that makes one token the likeliest by far."""

    def hook(module, args, logits):
        bonus = torch.zeros_like(logits)
        bonus[..., token] = 1e4
        return logits + bonus

    return hook


@pytest.mark.parametrize(
    "settings",
    [
        {},
        STATIC,
        {"use_cache": False},
        {"num_beams": 2},
        {"do_sample": True},
        {"generation_config": GenerationConfig(max_new_tokens=NEW_TOKENS)},
    ],
    ids=["greedy", "static", "uncached", "beams", "sampling", "own_generation_config"],
)
def test_the_image_token_is_never_generated(settings, tmp_path):
    model = tiny_model("prefix")
    model.save_pretrained(tmp_path)
    for candidate in (model, type(model).from_pretrained(tmp_path).eval()):
        candidate.language_model.lm_head.register_forward_hook(favour(IMAGE_TOKEN_ID))
        batch = random_batch(candidate, [3, 5], seed=8, padding_side="left")
        plain = {} if "generation_config" in settings else {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        output = candidate.generate(**batch, **{**plain, **settings})[:, batch["input_ids"].shape[1] :]
        assert output.shape[1] >= 1
        assert not (output == IMAGE_TOKEN_ID).any()
        # although the model gives it the highest probability
        assert candidate(**batch).logits[:, -1].argmax(-1).tolist() == [IMAGE_TOKEN_ID] * 2


def test_bidirectional_model_refuses_a_cache():
    model = MODELS["bidirectional"]
    batch = random_batch(model, [3, 5], seed=9, padding_side="left")
    for call in (
        lambda: model(**batch, use_cache=True),
        lambda: model(**batch, past_key_values=DynamicCache()),
        lambda: model.generate(**batch, max_new_tokens=2),
        lambda: model.generate(**batch, max_new_tokens=2, **STATIC),
    ):
        with pytest.raises(ValueError, match=r"bidirectional .* use_cache=False"):
            call()
    assert model(**batch).past_key_values is None


@torch.no_grad()
def test_bidirectional_model_generates_without_a_cache():
    model = MODELS["bidirectional"]
    batch = random_batch(model, [3], seed=10)
    ids = batch["input_ids"]
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, -1]
        logits[:, IMAGE_TOKEN_ID] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert answers(model, batch, use_cache=False) == ids[:, -NEW_TOKENS:].tolist()


# (in mode prefix_all_images the first part would have to see the image that comes later, so a split is not the same)
@pytest.mark.parametrize("mode", ["causal", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_second_part_with_an_image_continues_a_cache(mode, attention, cache):
    model = tiny_model(mode, attn_implementation=attention)
    batch = layout_batch(model, ["IwwwIww", "IwwwIww"], seed=11)
    batch["attention_mask"][1, 4] = 0  # padding inside, as where a shorter first part was padded
    full = model(**batch, use_cache=False).logits
    cut = 7
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=20)
    first = {"input_ids": batch["input_ids"][:, :cut], "attention_mask": batch["attention_mask"][:, :cut]}
    head = model(**first, pixel_values=batch["pixel_values"][0::2], past_key_values=past, use_cache=True)
    tail = model(
        input_ids=batch["input_ids"][:, cut:],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"][1::2],
        past_key_values=head.past_key_values,
    )
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(head.logits[valid[:, :cut]], full[:, :cut][valid[:, :cut]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tail.logits, full[:, cut:], rtol=1e-4, atol=1e-4)


def test_generate_continues_a_cache_with_a_new_image():
    # the second turn of a chat that brings an image of its own
    model = MODELS["prefix"]
    batch = layout_batch(model, ["IwwwIww", "IwwwIww"], seed=12)
    cut = 7
    first = {"input_ids": batch["input_ids"][:, :cut], "attention_mask": batch["attention_mask"][:, :cut]}
    past = DynamicCache()
    with torch.no_grad():
        model(**first, pixel_values=batch["pixel_values"][0::2], past_key_values=past, use_cache=True)
    new_images = {**batch, "pixel_values": batch["pixel_values"][1::2]}
    assert answers(model, new_images, past_key_values=past) == answers(model, batch, use_cache=False)


@cache_modes
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, STATIC], ids=["dynamic", "uncached", "static"])
@torch.no_grad()
def test_embeddings_instead_of_ids_give_the_same_answer(mode, settings):
    model = MODELS[mode]
    batch = layout_batch(model, ["wIwIw", "Iww"], seed=13, padding_side="left")
    expected = answers(model, batch, use_cache=False)
    of_placeholders = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "pixel_values": batch["pixel_values"],
        "attention_mask": batch["attention_mask"],
    }
    assert answers(model, of_placeholders, **settings) == expected
    assert answers(model, with_features(model, batch), **settings) == expected


def test_pipeline_answers_chats_and_plain_text():
    model, processor = tiny_model("prefix"), tiny_processor()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    # sampling flags and lengths come from here, as they would from a user
    settings = {"max_new_tokens": 5, "do_sample": False}

    def text(inputs) -> str:
        output = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(output, skip_special_tokens=True)

    chat = [
        {"role": "user", "content": [{"type": "image", "image": red_image()}, {"type": "text", "text": "Which colour?"}]}
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 4
    result = pipe(text=chat, return_full_text=False, generate_kwargs=settings)
    assert result[0]["generated_text"] == text(inputs)

    inputs = processor(images=red_image(), text="Which colour?", return_tensors="pt")
    result = pipe(images=red_image(), text="Which colour?", return_full_text=False, generate_kwargs=settings)
    assert result[0]["generated_text"] == text(inputs)
