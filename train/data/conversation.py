"""One training sample of any source: images, and what was said about them."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Conversation:
    """Images and turns.

    Attributes:
        images: anything `load_image` opens; they come before the first turn.
        turns: (role, text) pairs, the roles `system`, `user` and `assistant`.
        name: where the sample comes from, for error messages.
        seed: for the randomness of this sample in this epoch, so that it is the same in any process and after any
            interruption; `None` leaves it to the collator.
        is_padding_sample: it has no supervised tokens; it fills up the last batch of several processes, or replaces a
            sample that cannot be used.
    """

    images: list = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    name: str = ""
    seed: str | None = None
    is_padding_sample: bool = False

    @property
    def caption(self) -> str:
        """What the assistant says, which is the whole text of a caption sample."""
        return " ".join(text for role, text in self.turns if role == "assistant")

    def messages(self) -> list[dict]:
        """The conversation as transformers' chat templates read it, the images in the first user turn."""
        messages, waiting = [], list(self.images)
        for role, text in self.turns:
            content = [{"type": "text", "text": text}]
            if waiting and role == "user":
                content = [{"type": "image", "image": image} for image in waiting] + content
                waiting = []
            messages.append({"role": role, "content": content})
        if waiting:
            raise ValueError(f"{self.name}: the conversation has images, but no user turn to hold them.")
        return messages

    def as_padding_sample(self) -> "Conversation":
        """A padding sample to replace this one: no image, no text, and no supervised tokens."""
        return replace(self, images=[], turns=[("user", ""), ("assistant", "")], is_padding_sample=True)
