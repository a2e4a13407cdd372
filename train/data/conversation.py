"""One training sample of any source: turns of texts and images, in their own order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Picture:
    """An image among the parts of a turn; `source` is anything `load_image` opens."""

    source: Any


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: `system`, `user` or `assistant`.
        parts: texts and pictures, in order.
        is_supervised: whether training learns it, if it is the assistant's.
    """

    role: str
    parts: tuple[str | Picture, ...] = ()
    is_supervised: bool = True

    @property
    def text(self) -> str:
        """Its words, without its pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def is_learnt(self) -> bool:
        """Whether it has words that training learns."""
        return self.role == "assistant" and self.is_supervised and bool(self.text.strip())


@dataclass(frozen=True)
class Conversation:
    """Turns.

    Attributes:
        turns: in order; see `about` for the usual ones.
        name: where the sample comes from, for error messages.
        seed: for the randomness of this sample in this epoch, so that it is the same in any process and after any
            interruption; `None` leaves it to the collator.
        is_padding_sample: it has no supervised tokens; it fills up the last batch of several processes, or replaces a
            sample that cannot be used.
    """

    turns: list[Turn] = field(default_factory=list)
    name: str = ""
    seed: str | None = None
    is_padding_sample: bool = False

    @classmethod
    def about(
        cls, images: Iterable, said: Iterable[tuple[str, str]], name: str = "", seed: str | None = None
    ) -> "Conversation":
        """Images and then what is said about them, as (role, text) pairs; the images open the first user turn.

        Raises:
            ValueError: if there is no user turn to hold the images.
        """
        try:
            turns = with_images_in_front([Turn(role, (text,)) for role, text in said], images)
        except ValueError as error:
            raise ValueError(f"{name or 'A sample'}: {error}.") from error
        return cls(turns, name, seed)

    @property
    def images(self) -> list:
        """The sources of its images, in order."""
        return [part.source for turn in self.turns for part in turn.parts if isinstance(part, Picture)]

    @property
    def said(self) -> list[tuple[str, str]]:
        """(role, text) of each turn."""
        return [(turn.role, turn.text) for turn in self.turns]

    @property
    def caption(self) -> str:
        """What the assistant says, which is the whole text of a caption sample."""
        return " ".join(turn.text for turn in self.turns if turn.is_learnt)

    def caption_parts(self) -> Iterator[str | Picture]:
        """The parts of a caption sample: its images and what the assistant says of them, in order.

        Texts with no image in between are joined by a blank. What is not learnt is no part.
        """
        was_text = False
        for turn in self.turns:
            if turn.role == "assistant" and not turn.is_learnt:
                continue
            for place, part in enumerate(turn.parts):
                if isinstance(part, Picture):
                    yield part
                elif turn.role == "assistant":
                    yield f" {part}" if was_text and not place else part
                else:
                    continue
                was_text = isinstance(part, str)

    def messages(self) -> list[dict]:
        """The conversation as chat templates read it; `weight: 0` marks an answer that is not learnt."""
        messages = []
        for turn in self.turns:
            content = [
                {"type": "image", "image": part.source} if isinstance(part, Picture) else {"type": "text", "text": part}
                for part in turn.parts or ("",)
            ]
            unlearnt = {"weight": 0} if turn.role == "assistant" and not turn.is_learnt else {}
            messages.append({"role": turn.role, "content": content} | unlearnt)
        return messages

    def with_images(self, sources: Sequence) -> "Conversation":
        """The same with other images in their places."""
        left = iter(sources)
        turns = [
            replace(turn, parts=tuple(Picture(next(left)) if isinstance(part, Picture) else part for part in turn.parts))
            for turn in self.turns
        ]
        return replace(self, turns=turns)

    def as_padding_sample(self) -> "Conversation":
        """A padding sample to replace this one: no image, no text, and no supervised tokens."""
        return replace(self, turns=[Turn("user"), Turn("assistant")], is_padding_sample=True)


def with_images_in_front(turns: list[Turn], images: Iterable) -> list[Turn]:
    """The turns, with images before what the user says first.

    Raises:
        ValueError: if there is no user turn to hold the images.
    """
    pictures = tuple(map(Picture, images))
    if not pictures:
        return turns
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ValueError("the conversation has images, but no user turn to hold them")
    holder = replace(turns[first], parts=(*pictures, *turns[first].parts))
    return [*turns[:first], holder, *turns[first + 1 :]]
