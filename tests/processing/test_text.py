"""Whatever control token of whatever tokenizer a person types stays words to the letter, and the template's are tokens.

Tried on tokenizers built here, and on real ones where this machine has them (tests/helpers/real_tokenizers.py).
"""

import copy
import pickle
from functools import cache

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_tokenizers import FAMILIES, tokenizer_folder
from tiny import tiny_processor, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from prefixvlm import PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor
from prefixvlm.processing.text_prefix_vlm import ESCAPE, START, ControlTokens

IMAGE, TURN_START, TURN_END = "<|image_pad|>", "<|im_start|>", "<|im_end|>"
IGNORE = -100

CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<|>_/[]#.:\n"))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ODD = [  # tokens that a template seldom has, with every flag
    AddedToken("<tool>", normalized=True),
    AddedToken("<mask>", lstrip=True, special=True),
    AddedToken("<left>", rstrip=True, special=True),
    AddedToken("word", single_word=True),
    AddedToken("<|im", special=True),
    AddedToken("<|im_end|><|im_end|>", special=True),
    AddedToken("|>x", special=True),
    AddedToken("\n\n", normalized=False),
    AddedToken("#", special=True),
]


def wrapped(backend: Tokenizer, **tokens) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)
    tokenizer.add_tokens([IMAGE, TURN_START, TURN_END, "</s>", "<s>"], special_tokens=True)
    tokenizer.add_tokens(ODD)
    tokenizer.eos_token = "</s>"
    return tokenizer


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return wrapped(backend, pad_token="<|endoftext|>")


def sentencepiece(pre_tokenizer=None, normalizer=None) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: characters that fall back to bytes, and a blank before the first word."""
    words = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", *CHARACTERS]
    merges = [("<", "s"), ("<s", ">"), ("a", "b")]  # the model itself can write <s>
    words += ["<s", "ab"]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(backend, unk_token="<unk>", bos_token="<s>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5: the vocabulary has the control tokens, and prefers them."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (TURN_END, 0.0), ("\u2581", -2.0), ("ab", -2.5)]
    vocabulary += [(piece, -3.0) for piece in CHARACTERS]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return wrapped(backend, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT, in which text cannot be written to the letter; without its splitting at punctuation."""
    words = ["[UNK]", "[CLS]", "[SEP]", "</s>", TURN_END]
    words += [prefix + piece for prefix in ("", "##") for piece in CHARACTERS]
    model = models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = wrapped(backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def whole_words() -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: index for index, word in enumerate(["[UNK]", "</s>", "a", "b"])}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, unk_token="[UNK]")


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python that, as SentencePiece's, puts a blank before a text, and knows `<s>` as a word."""

    def __init__(self, **kwargs):
        self.words = ["<unk>", "<s>", "</s>", "\u2581", *CHARACTERS]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**{word: index for index, word in enumerate(self.words)}, **self.added_tokens_encoder}

    def tokenize(self, text, **kwargs):
        is_token = text.startswith(tuple(self.added_tokens_encoder)) and not kwargs.get("split_special_tokens")
        begins = " " if text and not is_token else ""
        return super().tokenize(begins + text, **kwargs)

    def _tokenize(self, text, **kwargs):
        pieces = text.replace(" ", "\u2581").split("<s>")
        return [*pieces[0], *(letter for piece in pieces[1:] for letter in ("<s>", *piece))]

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("\u2581", " ")


def in_python(tokenizer):
    tokenizer.add_tokens([IMAGE, TURN_START, TURN_END], special_tokens=True)
    tokenizer.add_tokens([token for token in ODD if not token.single_word])  # which Python's understand differently
    return tokenizer


def real(name: str):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(name))
    tokenizer.add_tokens([IMAGE, TURN_START, TURN_END], special_tokens=True)
    return tokenizer


METASPACE = pre_tokenizers.Metaspace
BLANKS_AS_METASPACE = normalizers.Replace(" ", "\u2581")
LOSSLESS = {
    "byte-level": byte_level,
    "metaspace before the first": lambda: sentencepiece(METASPACE(prepend_scheme="first")),
    "no prefix, as Gemma": lambda: sentencepiece(normalizer=BLANKS_AS_METASPACE),
    "Python, bytes": lambda: in_python(ByT5Tokenizer()),
    "Python, letters": lambda: in_python(Letters()),
    **{name: lambda name=name: real(name) for name in FAMILIES},
}
WITH_BLANKS = {  # a blank before the text that follows a control token, as ever
    "byte-level with prefix": lambda: byte_level(add_prefix_space=True),
    "metaspace before all": lambda: sentencepiece(METASPACE(prepend_scheme="always")),
    "prefix, as Llama 2": lambda: sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), BLANKS_AS_METASPACE])
    ),
}
LOSSY = {"unigram": unigram, "wordpiece": wordpiece, "whole words": whole_words}
ALL = {**LOSSLESS, **WITH_BLANKS, **LOSSY}


def names(of) -> list:
    """Those of real tokenizers that are large are tried at night."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in FAMILIES[1:] else name for name in sorted(of)]


@cache
def control_tokens(name: str) -> ControlTokens:
    return ControlTokens(ALL[name](), IMAGE)


def words_of(tokenizer) -> list[str]:
    """The tokenizer's added tokens that are not blank."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in added if token.replace("\u2581", " ").strip()]


@cache
def control_ids(name: str) -> frozenset[int]:
    """All ids that no typed text may have. `#` is a letter of the vocabulary, too, and what is unknown may be anything."""
    tokenizer = control_tokens(name).tokenizer
    ids = frozenset(tokenizer.convert_tokens_to_ids(token) for token in words_of(tokenizer) if len(token) > 1)
    return ids - {tokenizer.unk_token_id}


def typed(name: str):
    """Texts of words, of any control tokens and of parts of them."""
    tokens = st.deferred(lambda: st.sampled_from(words_of(control_tokens(name).tokenizer)))
    parts = tokens.flatmap(lambda token: st.integers(1, len(token)).map(lambda size: token[:size]))
    ends = tokens.flatmap(lambda token: st.integers(0, len(token) - 1).map(lambda size: token[size:]))
    words = st.sampled_from([" ", "\n", "a", "ab", "b c", "x", "<", "|>", ESCAPE, "\ufdd1", "word", "\n\n", "é"])
    return st.lists(tokens | parts | ends | words, max_size=8).map("".join)


def content(name: str, text: str) -> list[int]:
    """The ids of typed text between two control tokens."""
    known = control_tokens(name)
    start, end = (known.tokenizer.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END))
    (ids,) = known.encode([TURN_START + known.escape(text) + TURN_END])
    assert (ids[0], ids[-1]) == (start, end)
    return ids[1:-1]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **spaces(tokenizer))


def spaces(tokenizer) -> dict:
    return {} if tokenizer.is_fast else {"spaces_between_special_tokens": False}


@pytest.mark.parametrize("name", names(LOSSLESS))
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_typed_text_is_words_to_the_letter(name, data):
    text = data.draw(typed(name))
    if name not in ("byte-level", "Python, bytes", *FAMILIES):
        text = "".join(letter for letter in text if letter in CHARACTERS or letter == " ")
    ids = content(name, text)
    assert control_ids(name).isdisjoint(ids)
    assert decoded(control_tokens(name).tokenizer, ids) == text


@pytest.mark.parametrize("name", [*WITH_BLANKS, *LOSSY])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_typed_text_has_no_control_token(name, data):
    text = data.draw(typed(name))
    ids = content(name, text)
    assert control_ids(name).isdisjoint(ids)
    if name in WITH_BLANKS:
        text = "".join(letter for letter in text if letter in CHARACTERS).replace("\n\n", "")
        assert decoded(control_tokens(name).tokenizer, content(name, text)).removeprefix(" ") == text


@pytest.mark.parametrize("name", names(ALL))
def test_each_token_alone_and_beside_the_templates(name):
    tokenizer = control_tokens(name).tokenizer
    tokens = words_of(tokenizer)
    for token in [*tokens[:60], *tokens[60::97]]:
        ids = content(name, token)
        assert control_ids(name).isdisjoint(ids)
        if name in LOSSLESS:
            assert decoded(tokenizer, ids) == token
        # and as the template writes it
        (written,) = control_tokens(name).encode([f"{TURN_START}{token} "])
        assert tokenizer.convert_tokens_to_ids(token) in written


@pytest.mark.parametrize("name", names(ALL.keys() - {"whole words"}))
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_words_have_the_ids_that_they_have_for_the_tokenizer(name, data):
    """Also the words beside a token that was typed, though they are tokenized another way."""
    known = control_tokens(name)
    written = [IMAGE, TURN_START, TURN_END, " ", "\n", "ab", "a b", "\n\n", "x  y", "."]
    text = "".join(data.draw(st.lists(st.sampled_from(written), max_size=8)))
    expected = known.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert known.encode([text]) == [expected]
    assert known._encode(text) == expected


@pytest.mark.parametrize("name", names(["byte-level", "metaspace before the first", *FAMILIES]))
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_typed_token_is_tokenized_together_with_its_words(name, data):
    """As by the same tokenizer without added tokens, and not piece by piece."""
    text = data.draw(typed(name).filter(lambda text: "\n\n" not in text))
    known = control_tokens(name)
    with_tokens = known.tokenizer.backend_tokenizer
    bare = Tokenizer(with_tokens.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(with_tokens, part) is not None:
            setattr(bare, part, getattr(with_tokens, part))
    ids = bare.encode(text, add_special_tokens=False).ids
    assume(control_ids(name).isdisjoint(ids))
    assert known.encode([known.escape(text)]) == [ids]


def test_what_only_normalisation_makes_a_control_token_is_words():
    known = control_tokens("unigram")
    assert known.tokenizer.tokenize("\uff1ctool\uff1e") == ["<tool>"]
    for text in ("\uff1ctool\uff1e", "\uff1cs\uff1e", "\uff1c\uff5cim_end\uff5c\uff1e"):
        assert control_ids("unigram").isdisjoint(content("unigram", text))


# the processor


def processor_of(name: str) -> PrefixVLMProcessor:
    return PrefixVLMProcessor(siglip_image_processor(16), control_tokens(name).tokenizer, "chatml", num_image_tokens=4)


def picture() -> Image.Image:
    return Image.new("RGB", (16, 16), (200, 30, 30))


def turns(ids: list[int], processor) -> list[str]:
    """The text of each turn, with its role."""
    start, end = processor.tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    found, place = [], 0
    while start in ids[place:]:
        place = ids.index(start, place) + 1
        found.append(decoded(processor.tokenizer, ids[place : ids.index(end, place)]))
    return found


def supervised(encoded, processor) -> str:
    return decoded(processor.tokenizer, [label for label in encoded["labels"][0] if label != IGNORE])


CHATS = names(["byte-level", "Python, bytes", *FAMILIES])


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_conversation_says_what_was_typed_by_either_way(name, data):
    processor = processor_of(name)
    system, question, answer, result = (data.draw(typed(name)) for _ in range(4))
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
        {"role": "tool", "content": result},
    ]
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_labels=True)
    ids = encoded["input_ids"][0]
    expected = [f"system\n{system}", f"user\n{question}", f"assistant\n{answer}", f"tool\n{result}"]
    assert turns(ids, processor) == expected
    assert supervised(encoded, processor) == answer + TURN_END
    assert ids.count(processor.image_token_id) == 4
    control = [token for token in ids if token in control_ids(name)]
    begins = [processor.tokenizer.bos_token_id] if processor.tokenizer.bos_token else []
    pair = processor.tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    assert control == begins + [processor.image_token_id] * 4 + pair * 4
    text = processor.apply_chat_template(messages)
    again = processor(text=text, images=picture(), add_special_tokens=False)["input_ids"][0]
    assert turns(again, processor) == expected
    assert [token for token in again if token in control_ids(name)] == control


@pytest.mark.parametrize("name", names(["byte-level", *FAMILIES]))
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_caption_says_what_was_typed_and_ends_once(name, data):
    processor = processor_of(name)
    caption, end = data.draw(typed(name)), processor.tokenizer.eos_token
    text = processor.image_token + processor.as_typed(caption) + end
    encoded = processor(images=picture(), text=text, return_labels=True, add_special_tokens=False)
    assert supervised(encoded, processor) == caption + end
    assert encoded["input_ids"][0].count(processor.tokenizer.eos_token_id) == 1
    assert encoded["input_ids"][0].count(processor.image_token_id) == 4


def test_special_tokens_surround_texts_with_typed_tokens_as_any_other():
    tokenizer = copy.deepcopy(control_tokens("byte-level").tokenizer)
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    processor = PrefixVLMProcessor(siglip_image_processor(16), tokenizer, num_image_tokens=4)
    for text in ("ab", "", "a</s>b"):
        plain = processor(text=processor.as_typed(text), add_special_tokens=False)["input_ids"][0]
        assert processor(text=processor.as_typed(text))["input_ids"][0] == [begin, *plain, end]
        assert {begin, end}.isdisjoint(plain)


@pytest.mark.parametrize("name", ["byte-level", "metaspace before the first", "no prefix, as Gemma"])
@pytest.mark.parametrize(
    "parts",
    [
        ["<|im_", "end|>"],
        ["<", "|im_end|>"],
        ["<|im_end|", ">"],
        ["<|im", "_", "end|>"],
        ["<|", "", "im_end|>"],
        ["a<|im_", None, "end|>b"],
        ["<|im_end|><|im", "_end|>"],
        ["</", "s>"],
        ["<|<|im_end|>im_end|>"],
    ],
    ids=str,
)
def test_a_token_in_pieces_stays_words(name, parts):
    """Over the parts of a message, and over messages that a template puts side by side."""
    processor, text = processor_of(name), "".join(part or "" for part in parts)
    content = [{"type": "image", "image": picture()} if part is None else {"type": "text", "text": part} for part in parts]
    encoded = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    shown = "".join(processor.image_token * processor.num_image_tokens if part is None else part for part in parts)
    assert turns(encoded[0], processor) == [f"user\n{shown}"]
    messages = [{"role": "user", "content": part or ""} for part in parts]
    bare = "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}"
    ids = processor.apply_chat_template(messages, chat_template=TURN_START + bare + TURN_END, tokenize=True)[0]
    assert decoded(processor.tokenizer, ids[1:-1]) == text
    assert control_ids(name).isdisjoint(ids[1:-1])


def test_what_a_template_builds_of_a_role_is_a_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    processor = PrefixVLMProcessor(siglip_image_processor(16), tokenizer, num_image_tokens=4)
    template = "{%- for m in messages -%}{{ '<|' + m['role'] + '|>' + m['content'] }}{%- endfor -%}"
    messages = [{"role": "user", "content": "<|user|>"}]
    ids = processor.apply_chat_template(messages, chat_template=template, tokenize=True)[0]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert ids[0] not in ids[1:]
    assert processor.decode(ids[1:]) == "<|user|>"


def test_nothing_else_of_a_message_is_a_token_either():
    """Names, arguments of tools, documents and variables of the template are typed as well; their keys are not."""
    processor = tiny_processor()
    template = (
        "{%- for m in messages -%}{{ m['name'] ~ m['content'] ~ m['calls'][0]['arguments']['a'] }}{%- endfor -%}"
        "{{- tools[0]['description'] ~ documents[0]['text'] ~ greeting -}}" + TURN_END
    )
    messages = [{"role": "user", "name": TURN_END, "content": IMAGE, "calls": [{"arguments": {"a": "<|endoftext|>"}}]}]
    ids = processor.apply_chat_template(
        messages,
        chat_template=template,
        tools=[{"description": TURN_START}],
        documents=[{"title": "", "text": IMAGE}],
        greeting=TURN_END,
        tokenize=True,
    )[0]
    control = processor.tokenizer.convert_tokens_to_ids([TURN_END, IMAGE, "<|endoftext|>", TURN_START])
    assert [token for token in ids if token in control] == control[:1]
    assert processor.decode(ids[:-1]) == TURN_END + IMAGE + "<|endoftext|>" + TURN_START + IMAGE + TURN_END


def test_a_token_added_later_is_words_too():
    processor = tiny_processor()
    messages = [{"role": "user", "content": "a <late> b"}]
    before = processor.apply_chat_template(messages, tokenize=True)
    processor.tokenizer.add_tokens(["<late>"])
    assert processor.apply_chat_template(messages, tokenize=True) == before
    assert processor(text=processor.as_typed("<late>"))["input_ids"] != processor(text="<late>")["input_ids"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_workers_do_the_same(copied):
    processor = tiny_processor()
    messages = [{"role": "user", "content": f"a {TURN_END} b"}]
    expected = processor.apply_chat_template(messages, tokenize=True)
    assert copied(processor).apply_chat_template(messages, tokenize=True) == expected


def test_the_escape_can_be_typed():
    processor = tiny_processor()
    for text in (ESCAPE, START, ESCAPE + TURN_END, f"<{ESCAPE}|im_end|>", ESCAPE * 3, f"{START}{IMAGE}{START}"):
        ids = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0]
        assert turns(ids, processor) == [f"user\n{text}"]


def test_text_without_tokens_is_left_alone():
    processor = tiny_processor()
    for text in ("", "plain words", "a < b", "x |> y", "\u2060 invisible", "<|im_start", "image_pad|> is odd"):
        marked = processor.as_typed(text)
        assert ESCAPE not in marked or text[0] in "i" or text[-1] == "t"
        assert processor.text_ids(marked) == processor.tokenizer(text)["input_ids"]


def test_a_rendered_text_reads_like_what_was_typed():
    processor = tiny_processor()
    text = processor.apply_chat_template([{"role": "user", "content": f"a {IMAGE} b"}])
    assert text.count(IMAGE) == 0
    assert text.replace(ESCAPE, "") == f"{TURN_START}user\na {IMAGE} b{TURN_END}\n"
    # a program that makes a prompt of its own can have the ids
    assert processor.text_ids(text) == processor(text=text)["input_ids"][0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab<>", max_size=4), min_size=1, max_size=12), st.text(alphabet="ab<>", max_size=12))
@example(["aa", "aaa", "aba", "b"], "aabaaab<a>")
def test_any_tokens_in_any_text(tokens, text):
    """Tokens that overlap, begin or end alike, contain each other, or are one letter."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([token for token in tokens if token], special_tokens=True)
    known = ControlTokens(tokenizer, IMAGE)
    for one, other in ((text, ""), (text, text), ("", text), (text[:3], text[3:])):
        written = TURN_START + known.escape(one) + known.escape(other) + TURN_END
        ids = known.encode([written])[0]
        assert [match[0] for match in known.find(written)] == [TURN_START, TURN_END]
        long = {tokenizer.convert_tokens_to_ids(token) for token in tokens if len(token) > 1}
        assert long.isdisjoint(ids)
        assert tokenizer.decode(ids) == TURN_START + one + other + TURN_END
