"""One training sample of any source: images, and what was said about them."""

from dataclasses import dataclass, field, replace

from PIL import Image

BLANK = Image.new("RGB", (16, 16))


@dataclass(frozen=True)
class Conversation:
    """Images and turns.

    Attributes:
        images: anything `load_image` opens; they come before the first turn.
        turns: (role, text) pairs, the roles `system`, `user` and `assistant`.
        name: where the sample comes from, for error messages.
        seed: of what is random about this sample in this epoch, so that it comes out the same in any process and after
            any interruption; `None` leaves it to the collator's own source.
        is_padding_sample: nothing is learnt from it; it evens out the last batch of several processes, or takes the place
            of a sample that cannot be used.
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
        """A sample that takes this one's place: with as many pictures, all blank, and no word of it is learnt."""
        blanks = [BLANK] * len(self.images)
        return replace(self, images=blanks, turns=[("user", ""), ("assistant", "")], is_padding_sample=True)
