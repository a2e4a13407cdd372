"""How conversations are written for decoders of many families, and what of them a model learns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_tokenizers import FAMILIES, tokenizer_folder
from tiny import tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.conversation_prefix_vlm import prepare, turn_end_id
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor

IM = "<|image_pad|>"
CHATML = (
    f"{IM}<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
)
GOLDEN = {
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "smollm2": CHATML,  # its BOS is <|im_start|>
    "llama3_1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{IM}What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
    ),
    "gemma3": (
        f"<bos><start_of_turn>user\nBe brief.\n\n{IM}What is it?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"
    ),
}
PROMPTS = {"llama3_1": "<|start_header_id|>assistant<|end_header_id|>\n\n", "gemma3": "<start_of_turn>model\n"}
ENDS = {"llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>"}

# templates of published models, shortened
ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token ~ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS = (
    "{% for m in messages %}{% set words = m['content'] %}{% set thought = '' %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1] %}{% set words = words.split('</think>')[-1] %}"
    "{% endif %}<|{{ m['role'] }}|>"
    "{% if loop.last %}{{ '<think>' + thought + '</think>' }}{% endif %}{{ words + eos_token }}{% endfor %}"
)
GLM = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
TAKES_TURNS = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ZEPHYR
)


def picture() -> Image.Image:
    return Image.new("RGB", (16, 16), (200, 30, 30))


def talk(*turns: str, system: str | None = None) -> list[dict]:
    """A conversation about a picture."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    messages[0]["content"] = [{"type": "image", "image": picture()}, {"type": "text", "text": turns[0]}]
    return ([{"role": "system", "content": system}] if system else []) + messages


TALK = talk("What is it?", "A cat.", "Sure?", "Yes", system="Be brief.")


def processor_of(tokenizer, chat_template=None) -> PrefixVLMProcessor:
    tokenizer = prepare(tokenizer, chat_template)
    return PrefixVLMProcessor(siglip_image_processor(16), tokenizer, tokenizer.chat_template, num_image_tokens=2)


LOADED: dict[str, PrefixVLMProcessor] = {}


def of_family(family: str) -> PrefixVLMProcessor:
    if family not in LOADED:
        LOADED[family] = processor_of(AutoTokenizer.from_pretrained(tokenizer_folder(family)))
    return LOADED[family]


def with_template(template: str, blanks: bool = False) -> PrefixVLMProcessor:
    """A tiny decoder's processor with a template of its own; with `blanks` its tokenizer puts one before each text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if blanks:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = template
    return processor_of(tokenizer, "own")


def learnt(processor, messages) -> list[str]:
    """What is supervised, each stretch decoded."""
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_labels=True)
    runs, before = [], -100
    for label in encoded["labels"][0]:
        if label != -100:
            runs += [[]] if before == -100 else []
            runs[-1].append(label)
        before = label
    return [processor.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def single_images(processor, ids: list[int]) -> list[int]:
    """Ids with one image token for each image."""
    image = processor.image_token_id
    return [token for place, token in enumerate(ids) if token != image or not place or ids[place - 1] != image]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_writes_as_it_has_learnt_to(family):
    processor = of_family(family)
    assert processor.apply_chat_template(TALK) == GOLDEN[family]
    prompt = processor.apply_chat_template(TALK[:-1], add_generation_prompt=True)
    assert prompt.endswith(PROMPTS.get(family, "<|im_start|>assistant\n"))
    assert GOLDEN[family].startswith(prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_its_answers_and_their_ends(family):
    processor, end = of_family(family), ENDS.get(family, "<|im_end|>")
    assert learnt(processor, TALK) == [f"A cat.{end}", f"Yes{end}"]
    assert turn_end_id(processor.tokenizer) == processor.tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_are_only_those_that_the_template_needs(family):
    before = AutoTokenizer.from_pretrained(tokenizer_folder(family))
    new = set(of_family(family).tokenizer.get_vocab()) - set(before.get_vocab())
    assert new <= {IM} if family in ENDS else new <= {IM, "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_said_is_learnt_to_the_letter(family, data):
    processor, end = of_family(family), ENDS.get(family, "<|im_end|>")
    words = st.text(st.sampled_from("ab .?é\n<|>_imendstart/"), max_size=12) | st.sampled_from([end, IM, "<|eot_id|>", ""])
    said = data.draw(st.lists(words.map(str.strip), min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
    messages = talk(*said)
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_labels=True)
    assert learnt(processor, messages) == [answer + end for answer in said[1::2]]
    # no token spans the beginning of an answer, else the ids are those of the text as a whole
    ids = encoded["input_ids"][0]
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True)[0]
    assert ids[: len(prompt)] == prompt
    assert processor.tokenizer.decode(single_images(processor, ids)) == processor.tokenizer.decode(
        processor.text_ids(processor.apply_chat_template(messages))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_written_once_by_any_way(family):
    processor = of_family(family)
    bos = processor.tokenizer.bos_token_id
    ids = processor.apply_chat_template(TALK, tokenize=True)[0]
    text = processor.apply_chat_template(TALK)
    assert processor(text=text, images=picture())["input_ids"][0] == ids
    assert processor(text=["a", text], images=[[], [picture()]])["input_ids"][1] == ids
    if bos is not None and processor.tokenizer.bos_token != "<|im_start|>":
        assert ids.count(bos) == 1
    if processor.tokenizer.bos_token == "<|im_start|>":
        assert ids.count(bos) == len(TALK)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_processor_agree(family, tmp_path):
    """Joined halves stop where the decoder's answers end, and know each token that the processor writes."""
    folder = tokenizer_folder(family)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
        )
    ).save_pretrained(tmp_path / "vision")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen2Config(**shape, num_key_value_heads=1, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    for choice in (None, "chatml", "own"):
        halves = tmp_path / "vision", tmp_path / "text"
        processor = PrefixVLMProcessor.from_backbones(*halves, chat_template=choice)
        model = PrefixVLMForConditionalGeneration.from_backbones(*halves, chat_template=choice)
        encoded = processor.apply_chat_template(
            TALK, tokenize=True, return_dict=True, return_labels=True, return_tensors="pt"
        )
        labels = encoded["labels"][0]
        assert labels[labels != -100][-1] in model.generation_config.eos_token_id
        assert model.config.image_token_id == processor.image_token_id
        assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer)
        assert torch.isfinite(model(**{key: encoded[key] for key in encoded if key != "labels"}).logits).all()
    # and again from what they save
    processor.save_pretrained(tmp_path / "saved")
    again = PrefixVLMProcessor.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(TALK) == processor.apply_chat_template(TALK)
    assert turn_end_id(again.tokenizer) == turn_end_id(processor.tokenizer)


# templates of other kinds


@pytest.mark.parametrize("blanks", [False, True])
def test_answers_of_a_template_without_marks(blanks):
    processor, end = with_template(ZEPHYR, blanks), "<|endoftext|>"
    assert learnt(processor, TALK) == [f"A cat.{end}", f"Yes{end}"]
    encoded = processor.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(encoded["assistant_masks"][0]) == len("A cat.Yes") + 2
    ids, text = encoded["input_ids"][0], processor.apply_chat_template(TALK)
    assert single_images(processor, ids) == processor.text_ids(text)


def test_a_blank_that_the_prompt_does_not_have_is_learnt():
    processor = with_template(LLAMA2)
    talk_alone = TALK[1:]
    assert learnt(processor, talk_alone) == [" A cat. <|endoftext|>", " Yes <|endoftext|>"]
    ids = processor.apply_chat_template(talk_alone, tokenize=True)[0]
    prompt = processor.apply_chat_template(talk_alone[:-1], add_generation_prompt=True, tokenize=True)[0]
    assert ids[: len(prompt)] == prompt


def test_thoughts_that_a_template_moves_are_learnt_where_they_stand():
    processor = with_template(THOUGHTS)
    messages = talk("q", "<think>old</think>one", "q", "<think>new</think>two")
    assert processor.apply_chat_template(messages).count("old") == 0
    assert learnt(processor, messages) == ["one<|endoftext|>", "new</think>two<|endoftext|>"]


def test_answers_alike_are_told_apart():
    processor = with_template(ZEPHYR)
    assert learnt(processor, talk("a", "a", "a", "a", "", "")) == ["a<|endoftext|>", "a<|endoftext|>", "<|endoftext|>"]


def test_images_stand_where_they_were_put():
    processor = with_template(ZEPHYR)
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert text == f"<|user|>\na{IM}b{IM}<|endoftext|>\n"


def test_an_answer_that_is_continued_has_no_end():
    processor = with_template(ZEPHYR)
    encoded = processor.apply_chat_template(
        talk("q", "so fa"), tokenize=True, return_dict=True, return_labels=True, continue_final_message=True
    )
    assert processor.tokenizer.decode([label for label in encoded["labels"][0] if label != -100]) == "so fa"


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        (GLM, TALK, "closes an answer with no control token"),
        (TAKES_TURNS, TALK, "Conversation 2 cannot be written: System role not supported"),
        (LLAMA2, TALK, "leaves out what the system says"),
        ("{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}", TALK, "leaves out an answer"),
    ],
)
def test_what_a_template_cannot_say_is_refused(template, messages, match):
    processor = with_template(template)
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template([talk("q", "a"), messages], tokenize=True, return_dict=True, return_labels=True)


def test_choices():
    tokenizer = tiny_tokenizer()
    for choice, match in (("own", "has no chat template of its own"), ("chatlm", "choose chatml or own")):
        with pytest.raises(ValueError, match=match):
            prepare(tokenizer, choice)
    tokenizer.chat_template = ZEPHYR
    assert processor_of(tokenizer, "chatml").apply_chat_template(TALK) == CHATML
    tokenizer.chat_template = ZEPHYR
    assert "<|im_start|>" not in processor_of(tokenizer).apply_chat_template(TALK)
    jinja = "{{ messages[-1]['content'] }}"
    assert processor_of(tokenizer, jinja).apply_chat_template([{"role": "user", "content": "a"}]) == "a"
    # what is prepared stays as it is
    assert prepare(processor_of(tokenizer, "chatml").tokenizer).chat_template == prepare(tiny_tokenizer()).chat_template


def test_the_model_stops_where_the_template_ends_an_answer():
    tokenizer = prepare(with_template(ZEPHYR).tokenizer)
    model = tiny_model()
    model.set_stop_tokens(tokenizer)
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id in model.generation_config.eos_token_id
