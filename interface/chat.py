"""A conversation with a model in a terminal, or from a file of lines: `prefixvlm chat`."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from prefixvlm.inference.chat import Chat

HELP = """\
Every line is a question. These lines are not:
  /image FILE   a picture that comes with the next question: a file, an address or a data: URI; repeat it for several
  /new          begin a new conversation
  /help         this text
  /quit         end, as Ctrl-D does; Ctrl-C stops an answer
"""


class Terminal:
    """Reads lines, asks, and prints the answers.

    Args:
        chat: with the model.
        images: that come with the first question.
        generation: arguments of `Chat.ask`.
    """

    def __init__(self, chat: Chat, images: list[str], **generation):
        self.chat, self.images, self.generation = chat, images, generation
        self.is_watched = sys.stdin.isatty()

    def run(self) -> int:
        """Goes on until there are no more lines; returns how many of them could not be used."""
        failed = 0
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # one Ctrl-C may be followed by others
        try:
            for line in self._lines():
                try:
                    if line == "/quit":
                        break
                    self._use(line)
                except (ValueError, OSError) as error:
                    failed += 1
                    print(f"prefixvlm chat: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        finally:
            signal.signal(signal.SIGINT, before)
        return failed

    def _lines(self) -> Iterator[str]:
        if not self.is_watched:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        import readline  # noqa: F401 - for the keys of `input`

        print(HELP, file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print(file=sys.stderr)
                return
            if line:
                yield line

    def _use(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            if not rest.strip():
                raise ValueError("/image needs a file.")
            self.images.append(existing(rest.strip()))
        elif command == "/new":
            self.chat.forget()
            self.images = []
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif line.startswith("/"):
            raise ValueError(f"there is no command {command}; /help names them.")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        images, self.images = self.images, []  # a picture that cannot be used would spoil every further question
        with closing(self.chat.ask(question, images, **self.generation)) as pieces:
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not self.is_watched:
                    raise
        print(flush=True)


def existing(image: str) -> str:
    """An image that is given by its address, or whose file exists.

    Raises:
        ValueError: if it does not.
    """
    if not image.startswith(("http://", "https://", "data:")) and not Path(image).is_file():
        raise ValueError(f"{image}: there is no such image.")
    return image
