"""What the rows of each kind of data set mean: from a row to `Conversation`s.

A kind is a class with a line in `FORMS`: `is_of` knows its rows, `samples` reads one (docs/DATA.md, "Another format").
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prefixvlm.train.data.conversation import Conversation, Picture, Turn, with_images_in_front
from prefixvlm.train.data.pictures import PictureFinder

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"chatgpt": "assistant", "bot": "assistant", "system": "system"}
IMAGE_PLACE, VIDEO_PLACE = "<image>", "<video>"
# of a row's picture, where no key is named; the first that is there
IMAGE_KEYS: tuple[str, ...] = (
    "image",
    "images",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "image_path",
    "img_path",
    "image_file",
)
IMAGE_KEYS += ("img_file", "file_name", "filename", "image_name", "img_name", "Figure_path", "filepath", "path")
IMAGE_KEYS += ("image_url",)
NUMBERED = re.compile(r"(?:image|img)_?(\d+)")  # MMMU's and NLVR2's images, each under a key of its own
ID_KEYS = ("image_id", "imageId")
FRAME_KEYS = ("video", "videos")
RANKS = {name: rank for rank, name in enumerate((*IMAGE_KEYS, *FRAME_KEYS, *ID_KEYS))}
SOUND_KEYS = {"audio", "audios"}
TURN_IMAGE_KEYS = ("image", "images")
PLAIN_TURN = {"from", "value", "role", "content"}
ALSO_READ = ("system", "history", "input", "hint", "completion", "text_list", "image_info", "texts", "filepath", "split")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LONGEST_NAME = 1000  # characters of what may be the name of a file
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Said(NamedTuple):
    """What one side says, before its images have their places."""

    role: str
    text: str
    is_supervised: bool = True


class Form:
    """How the rows of one kind of data set become conversations.

    Each form has `said(row)`, the turns of each of the samples that a row holds. Where that may be several, `has_parts` is
    set.

    Attributes:
        keys: the names that rows may have for what is read, by the name of the option that names another one.
        needs_images: whether a row without an image is not used unless `allow_text_only` is set.

    Args:
        pictures: finds the images that rows name.
        keys: the names of this data set's keys, by option.
        allow_text_only: train on rows without an image; `None` where the form has conversations that mention none.
        images_without_place: `front` puts all images before the first turn where their number is not that of their places;
            by default such a row is not used.
    """

    has_parts = False
    needs_images = True
    keys: dict[str, tuple[str, ...]] = {}

    def __init__(
        self,
        pictures: PictureFinder,
        keys: dict[str, str] | None = None,
        allow_text_only: bool | None = None,
        images_without_place: str | None = None,
    ):
        self.pictures = pictures
        self.named = dict(keys or {})
        self.allow_text_only = allow_text_only
        self.images_without_place = images_without_place

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if name != "pictures" and value}
        return f"{type(self).__name__}({settings})"

    @staticmethod
    def is_of(row: dict) -> bool:
        """Whether a row looks like one of this form."""
        raise TypeError("a form must define `is_of`")

    def said(self, row: dict) -> list[list[Said]]:
        raise TypeError("a form must define `said`")

    def samples(self, row: dict) -> list[list[Turn]]:
        """The turns of each sample of a row, with its images in their places.

        Raises:
            ValueError: if the row cannot be used.
        """
        images = self.images(row)
        return [self._placed([*_before(row), *said], images) for said in self.said(row)]

    def count(self, read: Callable[[], dict]) -> int:
        """How many samples a row holds; one that cannot be read counts as one, which is reported when it is read."""
        if not self.has_parts:
            return 1
        try:
            return max(1, len(self.said(read())))
        except ValueError:
            return 1

    def name(self, where: str, part: int) -> str:
        """Where a sample comes from: its file, its row and, of several texts, which one."""
        return f"{where}, text {part + 1}" if self.has_parts else where

    def sample(self, read: Callable[[], dict], part: int, name: str) -> Conversation:
        """One sample of a row.

        Raises:
            ValueError: naming the sample, if it cannot be trained on.
        """
        try:
            turns = self.samples(read())[part]
            if not any(turn.is_learnt for turn in turns):
                raise ValueError("there is no text to learn")
            _refuse_broken(turns)
            return Conversation(turns, name)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removesuffix('.')}.") from error

    def key(self, row: dict, option: str) -> str | None:
        """The row's own name of a key; `None` if it has none of the names."""
        if option in self.named:
            return self.named[option]
        return next((name for name in self.keys[option] if not _is_missing(row.get(name))), None)

    def value(self, row: dict, option: str) -> Any:
        """What a row has under a key.

        Raises:
            ValueError: if it has nothing.
        """
        key = self.key(row, option) or next((name for name in self.keys[option] if name in row), self.keys[option][0])
        if _is_missing(row.get(key)):
            raise ValueError(f"`{key}` is {'missing' if row.get(key) is None else 'empty'}")
        return row[key]

    def read_keys(self, row: dict) -> dict[str, str]:
        """The row's own names of what is read of it, by option."""
        found = {option: self.key(row, option) for option in self.keys} | {"image": self.image_key(row)}
        also = {name: name for name in (*ALSO_READ, *_numbered(row)) if not _is_missing(row.get(name))}
        return {option: key for option, key in found.items() if key is not None} | also

    def image_key(self, row: dict) -> str | None:
        """The key of a row's images: one that holds them before one that names them, an empty one if there is no other."""
        if "image" in self.named:
            return self.named["image"]
        known = RANKS.keys() & row.keys()
        present = [name for name in sorted(known, key=RANKS.__getitem__) if row[name] is not None]
        if len(present) < 2:
            return present[0] if present else None
        filled = [name for name in present if not _is_missing(row[name])]
        held = (
            name
            for name in filled
            if isinstance(row[name], bytes) or (isinstance(row[name], dict) and row[name].get("bytes"))
        )
        return next(held, next(iter(filled or present), None))

    def images(self, row: dict) -> list:
        """The images of a row, as `load_image` opens them.

        Raises:
            ValueError: for one that is named but cannot be had, or a row that has none although it should.
        """
        key = self.image_key(row)
        value = None if key is None else row.get(key)
        for sound in SOUND_KEYS & row.keys():
            if not _is_missing(row[sound]):
                raise ValueError(f"`{sound}` names a sound, which cannot be trained on; leave out such rows")
        others = [row[name] for name in _numbered(row) if name != key and not _is_missing(row[name])]
        if key is None and not others and not self.allow_text_only and (other := _unread_image(row)):
            raise ValueError(f"`{other}` looks like an image; name it as the key of `image`, or set allow_text_only")
        for frames in FRAME_KEYS:
            if not _is_missing(row.get(frames)):
                _refuse_video(frames, row[frames])
                if frames != key:
                    raise ValueError(f"images are given both under `{key}` and under `{frames}`; give them once")
        given = [*(value if isinstance(value, list) else [] if value is None else [value]), *others]
        if self.allow_text_only:
            given = [one for one in given if one != ""]
        elif any(one == "" for one in given):
            raise ValueError(f"`{key}` is empty; give the image, or set allow_text_only")
        if not given and not self.allow_text_only and (self.needs_images or self.allow_text_only is False):
            raise ValueError("there is no image; name its key by `image`, or set allow_text_only")
        find = self.pictures.by_id if key in ID_KEYS else self.pictures
        return [find(one) for one in given]

    def _placed(self, said: list[Said], images: list) -> list[Turn]:
        """Turns with their images: where the user's turns say so, or before them."""
        frames = sum(turn.text.count(VIDEO_PLACE) for turn in said if turn.role == "user")
        if frames == 1 and images and not any(IMAGE_PLACE in turn.text for turn in said if turn.role == "user"):
            every = IMAGE_PLACE * len(images)
            said = [one._replace(text=one.text.replace(VIDEO_PLACE, every)) if one.role == "user" else one for one in said]
        elif frames:
            raise ValueError(f"a question has {VIDEO_PLACE}, but the row has no list of frames")
        places = sum(turn.text.count(IMAGE_PLACE) for turn in said if turn.role == "user")
        if places in (0, len(images)):
            left = iter(images)
            turns = [_turn(one, left, places) for one in said]
            return with_images_in_front(turns, [] if places else images)
        if self.images_without_place != "front" or not images:
            raise ValueError(
                f"the user's turns have {places} {IMAGE_PLACE}, but the row has {len(images) or 'no'} image(s)"
                + (", and images_without_place: front would put them before the first turn" if images else "")
            )
        turns = [_turn(_without_places(one), iter(()), 0) for one in said]
        return with_images_in_front(turns, images)


class ChatForm(Form):
    """Turns `{from, value}` or `{role, content}`, as LLaVA, ShareGPT and xtuner have them.

    Images stand among the parts of a turn, or at `<image>` in what the user says, or before the first turn.
    """

    needs_images = False
    keys = {"turns": ("conversations", "messages", "conversation", "prompt")}

    @staticmethod
    def is_of(row):
        return isinstance(_unpacked(row.get("conversations")), list)

    def samples(self, row):
        turns = self._turns(row)
        if not any(isinstance(content, list) and any(map(_is_image, content)) for _, content, _ in turns):
            said = [Said(role, _words(content), _is_supervised(turn)) for role, content, turn in turns]
            return [self._placed([*_before(row), *said], self.images(row))]
        has_sources = any(
            _source(part) is not None
            for _, content, _ in turns
            if isinstance(content, list)
            for part in content
            if _is_image(part)
        )
        images = [] if has_sources and self.image_key(row) is None else self.images(row)
        if images and has_sources:
            raise ValueError(f"images are given both in the turns and under `{self.image_key(row)}`; give them once")
        left = self._in_their_order(images, turns)
        found = [Turn(one.role, (one.text,)) for one in _before(row)]
        for role, content, turn in turns:
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            made = tuple(self._part(part, left) for part in parts)
            found.append(Turn(role, made, _is_supervised(turn)))
        return [found]

    def _in_their_order(self, images: list, turns) -> Iterator:
        """The row's images as the turns have their places: one after the other, or by the `index` of each place.

        Raises:
            ValueError: if not every image has a place, or a place has no image.
        """
        parts = [part for _, content, _ in turns if isinstance(content, list) for part in content if _is_image(part)]
        places = [part.get("index") for part in parts if _source(part) is None]
        numbers = list(range(len(places))) if all(place is None for place in places) else places
        if set(numbers) != set(range(len(images))):
            numbered = f", numbered {numbers}" if numbers is places else ""
            raise ValueError(
                f"the turns have {len(places)} places for images{numbered}, but the row has {len(images) or 'no'} image(s)"
            )
        return iter([images[number] for number in numbers])

    def _turns(self, row) -> list[tuple[str, Any, dict]]:
        """(role, content, turn) of each turn, content a text or a list of parts."""
        if row.get("tools") or row.get("rejected") or row.get("rejected_response"):
            raise ValueError("tools and preferences cannot be trained on; leave out such rows")
        key = self.key(row, "turns")
        turns = _unpacked(self.value(row, "turns"))
        rest = _unpacked(row.get("completion") or []) if key == "prompt" else []
        if not isinstance(turns, list) or not isinstance(rest, list):
            raise ValueError(f"`{key}` must be a list of turns, {{role, content}} or {{from, value}}")
        turns = [*turns, *rest]
        if not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"`{key}` must be a list of turns, {{role, content}} or {{from, value}}")
        found = []
        for turn in turns:
            role = turn.get("role") or turn.get("from")
            if not isinstance(role, str) or role not in ROLES:
                raise ValueError(f"a turn is by {role!r}; the roles are system, user (human) and assistant (gpt)")
            content = turn.get("content") if turn.get("content") is not None else turn.get("value")
            if turn.get("tool_calls"):
                raise ValueError("a turn calls a tool, which cannot be trained on; leave out such rows")
            found.append((ROLES[role], self._with_own_images(turn, "" if content is None else content), turn))
        return found

    def _with_own_images(self, turn: dict, content):
        """What a turn says, with the images that it has beside its text."""
        if turn.keys() <= PLAIN_TURN:
            return content
        key = next((key for key in TURN_IMAGE_KEYS if not _is_missing(turn.get(key))), None)
        if key is None:
            if other := _unread_image({name: value for name, value in turn.items() if name not in ("content", "value")}):
                raise ValueError(f"a turn's `{other}` looks like an image; call it `image`")
            return content
        images = turn[key] if isinstance(turn[key], list) else [turn[key]]
        if not isinstance(content, str):
            raise ValueError(f"a turn has images both in its parts and under `{key}`; give them once")
        places = content.count(IMAGE_PLACE)
        if places not in (0, len(images)):
            raise ValueError(f"a turn has {places} {IMAGE_PLACE}, but {len(images)} image(s)")
        placed = _turn(Said("user", content if places else IMAGE_PLACE * len(images) + content), iter(images), len(images))
        return [
            {"type": "image", "image": part.source} if isinstance(part, Picture) else {"type": "text", "text": part}
            for part in placed.parts
        ]

    def _part(self, part, left):
        if isinstance(part, str):
            return part
        if not _is_image(part):
            if not isinstance(part, dict) or part.get("type", "text") not in ("text", "input_text") or "text" not in part:
                raise ValueError(f"a part of a turn is {_shown(part)}; only texts and images can be read")
            return "" if part["text"] is None else _words(part["text"])
        source = _source(part)
        if source is None:
            return Picture(next(left))
        return Picture(self.pictures(source))


class MessagesForm(ChatForm):
    """`messages`, or `prompt` and `completion`, as OpenAI, TRL, LLaMA-Factory, ms-swift and `datasets` have them."""

    @staticmethod
    def is_of(row):
        is_trl = isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list)
        return is_trl or any(isinstance(_unpacked(row.get(key)), list) for key in ("messages", "conversation"))


class InterleavedForm(Form):
    """Documents of texts and images in their own order, as MMC4 and OBELICS have them; all text is learnt."""

    needs_images = False

    @staticmethod
    def is_of(row):
        is_mmc4 = isinstance(row.get("text_list"), list) and isinstance(row.get("image_info"), list)
        lists = [row.get("images"), row.get("texts")]
        is_obelics = all(isinstance(one, list) for one in lists) and len(lists[0]) == len(lists[1]) and None in lists[1]
        return is_mmc4 or is_obelics

    def samples(self, row):
        parts: list[str | Picture] = []
        for part in self._mmc4(row) if "text_list" in row else self._obelics(row):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                part = f"{parts.pop()} {part}"
            parts.append(part)
        if not self.allow_text_only and not any(isinstance(part, Picture) for part in parts):
            raise ValueError("there is no image; set allow_text_only to train on the text alone")
        return [[Turn("assistant", tuple(parts))]]

    def _mmc4(self, row):
        before: dict[int, list] = {}
        texts, images = self._lists(row, "text_list", "image_info")
        for image in images:
            place = image.get("matched_text_index", 0) if isinstance(image, dict) else None
            if not isinstance(place, int):
                raise ValueError(f"`image_info` has {_shown(image)}; expected image_name and matched_text_index")
            name = next((image[key] for key in ("image_name", "raw_url") if image.get(key)), None)
            before.setdefault(place, []).append(Picture(self.pictures(name)))
        for number, text in enumerate(texts):
            yield from before.pop(number, [])
            yield _words(text)
        if before:
            raise ValueError(f"an image belongs to text {min(before)}, but there are {len(texts)} texts")

    def _lists(self, row: dict, *keys: str) -> list[list]:
        """What a row has under keys that must hold lists."""
        for key in keys:
            if not isinstance(row.get(key), list):
                raise ValueError(f"`{key}` must be a list, not {_shown(row.get(key))}")
        return [row[key] for key in keys]

    def _obelics(self, row):
        for image, text in zip(*self._lists(row, "images", "texts"), strict=True):
            if image is not None and text is not None:
                raise ValueError("`images` and `texts` both have something at one place")
            if image is not None:
                yield Picture(self.pictures(image))
            elif text is not None:
                yield _words(text)


class PairsForm(Form):
    """`images` and `texts[{user, assistant}]`, as FineVision and the Cauldron have them."""

    needs_images = False
    keys = {"texts": ("texts",)}

    @staticmethod
    def is_of(row):
        texts = row.get("texts")
        return isinstance(texts, list) and bool(texts) and isinstance(texts[0], dict) and "user" in texts[0]

    def said(self, row):
        pairs = self.value(row, "texts")
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) and "user" in pair for pair in pairs):
            raise ValueError("`texts` must be a list of {user, assistant}")
        return [
            [
                Said(role, _words(pair.get(role)) if role == "assistant" else _words(pair.get(role)).strip())
                for pair in pairs
                for role in ("user", "assistant")
            ]
        ]


class ChoicesForm(Form):
    """A question, its choices and which is right, as A-OKVQA, ScienceQA and PMC-VQA have them; the answer is its words."""

    keys = {
        "question": ("question", "Question", "query"),
        "choices": ("choices", "options", "multiple_choices"),
        "answer": ("correct_choice_idx", "answer_idx", "answer", "Answer", "Answer_label", "label", "correct_answer"),
    }

    @staticmethod
    def is_of(row):
        has_choices = any(not _is_missing(row.get(key)) for key in ChoicesForm.keys["choices"]) or _lettered(row)
        return bool(has_choices) and any(key in row for key in ChoicesForm.keys["question"])

    def said(self, row):
        choices = self.choices(row)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        hint = f"{row['hint'].strip()}\n" if isinstance(row.get("hint"), str) and row["hint"].strip() else ""
        question = f"{hint}{_words(self.value(row, 'question')).strip()}\n{listed}"
        return [[Said("user", question), Said("assistant", choices[self.right(row)])]]

    def choices(self, row: dict) -> list[str]:
        """The words of each choice."""
        if self.key(row, "choices") is None and (lettered := _lettered(row)):
            return [_without_letter(_words(choice)) for choice in lettered]
        given = _unpacked(self.value(row, "choices"))
        if isinstance(given, dict):
            given = list(given.values())
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError(f"`{self.key(row, 'choices')}` must be a list of two or more choices")
        return [_words(choice).strip() for choice in given]

    def right(self, row: dict) -> int:
        """The number of the right choice, from 0; rows may give the number, the letter or the words."""
        key = self.key(row, "answer")
        answer, choices = self.value(row, "answer"), self.choices(row)
        words = answer.strip() if isinstance(answer, str) else _words(answer)
        letter = words.strip("().: ").upper()
        is_number = words.isdecimal() and not isinstance(answer, bool)
        is_place = is_number and (
            str(key).endswith("idx") or not isinstance(answer, str)
        )  # else "3" may be a choice's words
        if words in choices and not is_place:
            return choices.index(words)
        if is_number:
            number = int(words)
        else:
            number = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else len(choices)
        if number >= len(choices):
            raise ValueError(f"`{key}` is {row[key]!r}, which is none of the {len(choices)} choices")
        return number


class VqaForm(Form):
    """A question and its answer, or several people's, of which the commonest is learnt: PathVQA, VQAv2, ms-swift."""

    keys = {
        "question": ("question", "query", "instruction", "prompt", "Question"),
        "answer": (
            *("answer", "answers", "multiple_choice_answer", "response", "output", "completion", "Answer", "label"),
            "direct_answers",
        ),
    }

    @staticmethod
    def is_of(row):
        return all(any(row.get(key) is not None for key in VqaForm.keys[option]) for option in ("question", "answer"))

    def said(self, row):
        question = _words(self.value(row, "question")).strip()
        if row.get("input"):
            question = f"{question}\n{_words(row['input']).strip()}"
        return [[Said("user", question), Said("assistant", _commonest(self.answers(row)))]]

    def answers(self, row: dict) -> list[str]:
        """What each person answered."""
        answers = _unpacked(self.value(row, "answer"))
        if isinstance(answers, dict):
            answers = [answers]
        answers = answers if isinstance(answers, list) else [answers]
        said = [_words(one.get("answer") if isinstance(one, dict) else one).strip() for one in answers]
        if not said:
            raise ValueError(f"`{self.key(row, 'answer')}` is an empty list")
        return said


class CaptionsForm(Form):
    """An image and its texts: each text is a sample of its own."""

    has_parts = True
    keys = {
        "texts": (
            *("texts", "text", "captions", "caption", "sentences", "txt", "description", "raw_caption", "recaption"),
            *("comment", "TEXT"),
        )
    }

    @staticmethod
    def is_of(row):
        return any(not _is_missing(row.get(key)) for key in CaptionsForm.keys["texts"])

    def said(self, row):
        return [[Said("user", ""), Said("assistant", text)] for text in self.texts(row)]

    def texts(self, row: dict) -> list[str]:
        """What is said of a row's image."""
        texts = self.value(row, "texts")
        texts = texts if isinstance(texts, list) else [texts]
        return [_words(text).strip() for text in texts]


class KarpathyForm(CaptionsForm):
    """`filename, sentences[{raw}]` and for COCO `filepath`, as in Karpathy's dataset_*.json."""

    keys = {"texts": ("sentences",)}

    @staticmethod
    def is_of(row):
        sentences = row.get("sentences")
        return isinstance(sentences, list) and bool(sentences) and isinstance(sentences[0], dict) and "raw" in sentences[0]

    def texts(self, row):
        sentences = self.value(row, "texts")
        if not isinstance(sentences, list) or not all(isinstance(one, dict) and "raw" in one for one in sentences):
            raise ValueError("`sentences` must be a list of objects with `raw`")
        return [_words(sentence["raw"]).strip() for sentence in sentences]

    def images(self, row):
        self.texts(row)  # else a row of another form would be told what is wrong with its file name
        key = self.named.get("image", "filename")
        name = row.get(key)
        if not isinstance(name, str):
            raise ValueError(f"`{key}` must be a text, not {name!r}")
        return [self.pictures(f"{row['filepath']}/{name}" if row.get("filepath") else name)]


# by the name of the source; a row is of the first that knows it
FORMS: dict[str, type[Form]] = {
    "karpathy": KarpathyForm,
    "llava": ChatForm,
    "messages": MessagesForm,
    "interleaved": InterleavedForm,
    "pairs": PairsForm,
    "choices": ChoicesForm,
    "vqa": VqaForm,
    "captions": CaptionsForm,
}


def form_name(form: Form) -> str:
    """The name of a form as a source."""
    return next(name for name, kind in FORMS.items() if type(form) is kind)


def detect(rows: Iterable[dict]) -> str:
    """The name of the form that most of some rows have.

    Raises:
        ValueError: if none of them is known.
    """
    keys: dict[str, None] = {}
    found: Counter[str] = Counter()
    for row in rows:
        keys |= dict.fromkeys(map(str, row))
        found.update([next((name for name, form in FORMS.items() if form.is_of(row)), "")])
    found.pop("", None)
    if not found:
        raise ValueError(
            f"the rows have the keys {', '.join(keys) or '(none)'}, in which no known format is found; name a source "
            f"({', '.join(FORMS)}) and its keys"
        )
    return found.most_common(1)[0][0]


def _before(row: dict) -> list[Said]:
    """A row's own system turn and history."""
    system, history = row.get("system"), _unpacked(row.get("history"))
    said = [Said("system", _words(system))] if not _is_missing(system) else []
    if history:
        if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
            raise ValueError("`history` must be a list of [question, answer]")
        said += [
            Said(role, _words(text)) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return said


def _is_supervised(turn: dict) -> bool:
    """Whether a turn is learnt: not with `loss: false` or `weight: 0`."""
    if turn.keys() <= PLAIN_TURN:
        return True
    for key in ("loss", "weight"):
        if turn.get(key) not in (None, 0, 1):
            raise ValueError(f"the `{key}` of a turn is {turn[key]!r}; it can be 0 or 1")
    return all(turn.get(key) in (None, 1) for key in ("loss", "weight"))


def _turn(said: Said, left, places: int) -> Turn:
    """A turn with its next images at their places."""
    if said.role != "user" or not places or IMAGE_PLACE not in said.text:
        return Turn(said.role, (said.text,), said.is_supervised)
    first, *others = [text.strip() for text in said.text.split(IMAGE_PLACE)]
    parts: list[str | Picture] = [first]
    for text in others:
        parts += [Picture(next(left)), text]
    return Turn(said.role, tuple(part for part in parts if part != ""), said.is_supervised)


def _without_places(said: Said) -> Said:
    if said.role != "user":
        return said
    return said._replace(text=said.text.replace(IMAGE_PLACE, "").strip())


def _is_image(part) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url", "input_image")


def _source(part: dict):
    """The image of a part; `None` where it only marks the place of one."""
    source = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    if source is None and part.get("base64") is not None:
        return "data:;base64," + part["base64"]
    return source["url"] if isinstance(source, dict) and "url" in source else source


def _numbered(row: dict) -> list[str]:
    """The keys of images that a row has one by one, by their numbers."""
    found = [(int(match[1]), name) for name in row if (match := NUMBERED.fullmatch(str(name)))]
    return [name for _, name in sorted(found)]


def _unread_image(row: dict) -> str | None:
    """The key of what is an image by its looks."""

    def looks_so(value) -> bool:
        if isinstance(value, list):
            return bool(value) and looks_so(value[0])
        if isinstance(value, dict):
            return isinstance(value.get("bytes"), bytes)
        name = value[:LONGEST_NAME].lower() if isinstance(value, str) else ""
        return "\n" not in name and (name.endswith(PICTURES) or name.startswith("data:image/"))

    return next((key for key, value in row.items() if looks_so(value)), None)


def _refuse_video(key: str, value) -> None:
    given = value if isinstance(value, list) else [value]
    if any(isinstance(one, str) and one.lower().endswith(VIDEOS) for one in given) or not isinstance(value, list):
        raise ValueError(f"`{key}` names a video, {_shown(given[0])}; give its frames as a list of image files")


def _refuse_broken(turns: list[Turn]) -> None:
    """Raises a ValueError for text that no tokenizer reads: half of a pair of surrogates."""
    for turn in turns:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text has a broken character, {turn.text[error.start]!a}") from error


def _words(value) -> str:
    """A text of what a row has as one: numbers as they are written, yes and no for truth values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):  # of parts, or of texts
        return "".join(_words(part.get("text") if isinstance(part, dict) else part) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, not {_shown(value)}")
    return value


def _commonest(answers: list[str]) -> str:
    """The answer that most people gave; of several, the one that was given first."""
    return Counter(answers).most_common(1)[0][0]


def _unpacked(value):
    """A value that a table keeps as text: JSON, or a list as Python writes it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError):
                continue
    return value


def _lettered(row: dict) -> list:
    """The choices that a row has one by one, as PMC-VQA's `Choice A` and MMBench's `A`; not one alone."""
    for name in ("Choice {}", "{}"):
        found = [row[key] for key in map(name.format, LETTERS) if not _is_missing(row.get(key))]
        if len(found) > 1:
            return found
    return []


def _without_letter(choice: str) -> str:
    """A choice without the `A:` that PMC-VQA writes in front of it."""
    text = choice.strip()
    return text[2:].strip() if text[1:2] in (":", ".", ")") and text[:1] in LETTERS else text


def _is_missing(value) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
