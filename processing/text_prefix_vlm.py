"""Keeps the words that people type apart from the control tokens of a tokenizer.

A control token, such as the end of a turn, is text until it is tokenized, and anybody can type it. So in what was typed,
`ESCAPE` marks a character of each: `<|im_end|>` becomes `<`, ESCAPE, `|im_end|>`. Only what is written without it is taken
for a control token, and it is dropped when the text is tokenized.

This file travels to the Hub with every checkpoint, so it imports only the standard library.
"""

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

ESCAPE = "\ufdd0"  # no character: Unicode sets it aside for the inside of programs. If typed, it is escaped itself
# two names that nobody can type: for the control token before a text, and for tokens that a model shall not know
START, LOST = "\ufdd1" + os.urandom(8).hex(), "\ufdd1" + os.urandom(8).hex()
# what text may follow: nothing, a control token, or words; some tokenizers put a blank after the first, or the first two
FIRST, AFTER_TOKEN, AFTER_WORDS = "", START, START + "\n"
ESCAPED = re.compile(f"{ESCAPE}([\\s\\S]?)")
SENTENCEPIECE_BLANK = "\u2581"


class ControlTokens:
    """The control tokens of a tokenizer: `image_token`, and every token added to the vocabulary, special or not.

    Added blanks and line breaks, as Gemma has them, control nothing, and stay text.
    """

    def __init__(self, tokenizer, image_token: str):
        self.tokenizer = tokenizer
        self.image_token = image_token
        self._size = len(tokenizer.added_tokens_decoder)
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content}
        self._ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content}
        self._ids.setdefault(image_token, tokenizer.convert_tokens_to_ids(image_token))
        self._written = re.compile(f"{ESCAPED.pattern}|{_longest_of(self._ids)}")
        tokens = [token for token in self._ids if token.replace(SENTENCEPIECE_BLANK, " ").strip()]
        self._long = frozenset(token for token in tokens if len(token) > 1)
        self._short = frozenset(token for token in tokens if len(token) == 1) | {ESCAPE}
        self._longest = max(map(len, self._long), default=1)
        self._beginnings = frozenset(token[:length] for token in self._long for length in range(1, len(token)))
        self._endings = frozenset(token[length:] for token in self._long for length in range(1, len(token)))
        # a model writes these only for its control tokens; the token for what is unknown it may write for anything
        self._guarded = {self._ids[token] for token in self._long} - {tokenizer.unk_token_id} | {self._ids[image_token]}
        self._model: Any = None
        self._model_after_start: Any = None
        self._around: tuple[list[int], list[int]] | None = None
        self._is_unable = False
        self._adds_blanks: bool | None = None

    def are_those_of(self, tokenizer) -> bool:
        return self.tokenizer is tokenizer and self._size == len(tokenizer.added_tokens_decoder)

    def __reduce__(self):
        return type(None), ()  # in copies of the processor and in its workers, it is made anew

    def escape(self, text: str) -> str:
        """Marks the control tokens in typed text, and what could be a part of one beyond its beginning or end."""
        places, place, seen = set(), 0, text.replace(ESCAPE, "\0")
        while match := self._written.search(seen, place):
            place = match.start() + 1
            if match[0] in self._long:
                places.add(place)
        if not self._short.isdisjoint(text):
            places.update(place for place, character in enumerate(text) if character in self._short)
        for place in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[place:] in self._beginnings:
                places.add(min(place + 1, len(text) - 1))
        if any(text[:length] in self._endings for length in range(1, min(self._longest, len(text) + 1))):
            places.add(0)
        if not places:
            return text
        return "".join(ESCAPE + character if place in places else character for place, character in enumerate(text))

    def find(self, text: str) -> Iterator[re.Match]:
        """The control tokens in a text, but not the escaped ones."""
        for match in self._written.finditer(text):
            token = self._added.get(match[0])
            if match[0][0] == ESCAPE:
                continue
            if token is not None and token.single_word and _inside_word(text, *match.span()):
                continue
            yield match

    def count_images(self, text: str) -> int:
        return sum(match[0] == self.image_token for match in self.find(text))

    def encode(self, texts: list[str], add_special_tokens: bool = False, verbose: bool = True) -> list[list[int]]:
        """The ids of each text, as the tokenizer has them where nothing is escaped.

        Args:
            add_special_tokens: also those around a text, unless a template has written them.
        """
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=verbose)["input_ids"] if texts else []
        rows = [ids if self._agree(text, ids) else self._encode(text) for text, ids in zip(texts, rows, strict=True)]
        if add_special_tokens:
            before, after = self._special_tokens_around()
            rows = [ids if self._is_rendered(ids) else [*before, *ids, *after] for ids in rows]
        return rows

    def encode_pieces(self, texts: list[list[str]], **kwargs) -> list[list[list[int]]]:
        """The ids of each piece of each text. No token spans two pieces; else they are those of the whole text.

        Args:
            kwargs: as for `encode`.
        """
        rows = iter(self.encode([piece for pieces in texts for piece in pieces], **kwargs))
        encoded = [[next(rows) for _ in pieces] for pieces in texts]
        if self._adds_blanks is None:
            one, other, both = self.encode(["\n", "a", "\na"])
            self._adds_blanks = one + other != both or other != self._words("a", AFTER_TOKEN)
        if self._adds_blanks:
            for pieces, ids in zip(texts, encoded, strict=True):
                for place in range(1, len(pieces)):
                    written = [match.end() for match in self.find(pieces[place - 1])]
                    is_after_token = len(pieces[place - 1]) in written
                    ids[place] = self._encode(pieces[place], AFTER_TOKEN if is_after_token else AFTER_WORDS)
        return encoded

    def _is_rendered(self, ids: list[int]) -> bool:
        """Whether a template wrote the text, with its special tokens: but for images in front, it begins with the BOS."""
        first = next((token for token in ids if token != self._ids[self.image_token]), None)
        return first is not None and first == self.tokenizer.bos_token_id

    def turn_end(self, text: str, place: int) -> int:
        """Where the control token ends that follows at `place`, blanks aside; `place` if there is none."""
        match = self._written.match(text, len(text) - len(text[place:].lstrip()))
        return match.end() if match and match[0][0] != ESCAPE else place

    def _agree(self, text: str, ids: list[int]) -> bool:
        """Whether the tokenizer found the control tokens that are written, and no others, as in text that it normalises."""
        if ESCAPE in text:
            return False
        written = sum(self._ids[match[0]] in self._guarded for match in self.find(text))
        return written == sum(token in self._guarded for token in ids)

    def _encode(self, text: str, before: str = FIRST) -> list[int]:
        ids, place = [], 0
        for match in self.find(text):
            token, words = self._added.get(match[0]), text[place : match.start()]
            ids += self._words(words.rstrip() if token is not None and token.lstrip else words, before)
            ids.append(self._ids[match[0]])
            before, place = AFTER_TOKEN, match.end()
            if token is not None and token.rstrip:
                place = len(text) - len(text[place:].lstrip())
        return ids + self._words(text[place:], before)

    def _words(self, text: str, before: str) -> list[int]:
        """The ids of text without control tokens, which follows `before`."""
        text = ESCAPED.sub(r"\1", text)
        if not text:
            return []
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            return self._words_in_python(text, before)
        if self._model is None:
            self._use_model(_without_added_tokens(self.tokenizer.backend_tokenizer))
        ids = self._run(text, before)
        if not self._guarded.isdisjoint(ids) and not self._is_unable:  # the model itself makes them of words
            self._is_unable = True
            self._use_model(_unable_to_write(self.tokenizer.backend_tokenizer, self._guarded))
            ids = self._run(text, before)
        return ids

    def _use_model(self, backend) -> None:
        self._model = backend
        self._model_after_start = _without_added_tokens(backend)
        self._model_after_start.add_special_tokens([START])

    def _run(self, text: str, before: str) -> list[int]:
        if before == FIRST or START in text:
            return self._model.encode(text, add_special_tokens=False).ids
        seen, ids = (self._model_after_start.encode(one, add_special_tokens=False).ids for one in (before, before + text))
        return ids[len(seen) :] if ids[: len(seen)] == seen else self._run(text, AFTER_TOKEN)

    def _words_in_python(self, text: str, before: str) -> list[int]:
        """`_words` for tokenizers that are not in Rust."""
        tokenize = self.tokenizer._tokenize
        if "split_special_tokens" in inspect.signature(tokenize).parameters:
            tokens = tokenize(text, split_special_tokens=True)
        elif before == FIRST:
            tokens = self.tokenizer.tokenize(text, split_special_tokens=True)
        else:
            tokens = tokenize(text)
        pieces = [piece for token in tokens for piece in (token if self._ids.get(token) in self._guarded else [token])]
        return self.tokenizer.convert_tokens_to_ids(pieces)

    def _special_tokens_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, such as its first token."""
        if self._around is None:
            bare, whole = (self.tokenizer(self.image_token, add_special_tokens=on)["input_ids"] for on in (False, True))
            starts = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
            start = next(starts, len(whole))
            self._around = whole[:start], whole[start + len(bare) :]
        return self._around


def _longest_of(words: Iterable[str]) -> str:
    """A pattern for the longest of several words; they share their beginnings, as thousands in a row would be slow."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    may_end = rests.pop("", None) is not None
    branches = [re.escape(first) + _longest_of(rest) for first, rest in rests.items()]
    return f"(?:{'|'.join(branches)}){'?' * may_end}" if branches else ""


def _inside_word(text: str, start: int, end: int) -> bool:
    return re.search(r"\w", text[max(0, start - 1) : start] + text[end : end + 1]) is not None


def _without_added_tokens(backend):
    """A tokenizer of the `tokenizers` library with the same model, but no added tokens."""
    copy = type(backend)(backend.model)
    if backend.normalizer is not None:
        copy.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        copy.pre_tokenizer = backend.pre_tokenizer
    return copy


def _unable_to_write(backend, ids: set[int]):
    """The same with a model that has lost these ids, as Unigram and whole-word models find them in their vocabularies."""
    state = json.loads(_without_added_tokens(backend).to_str())
    model = state["model"]
    vocabulary = model["vocab"]  # token: id, or in Unigram [token, score]
    is_list = isinstance(vocabulary, list)
    entries = list(vocabulary if is_list else vocabulary.items())
    lost = {token for place, (token, value) in enumerate(entries) if (place if is_list else value) in ids}
    lost.discard(model.get("unk_token"))
    renamed = [(LOST + token if token in lost else token, value) for token, value in entries]
    model["vocab"] = renamed if is_list else dict(renamed)
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[left, right] for left, right in pairs if lost.isdisjoint((left, right, left + right))]
    return type(backend).from_str(json.dumps(state))
