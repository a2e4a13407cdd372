"""`prefixvlm chat`: every line is used, or refused with a sentence while the conversation goes on."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from tiny import save_tiny

from prefixvlm.cli import main
from prefixvlm.inference.asking import generate_texts, prompt_inputs, user_messages
from prefixvlm.inference.chat import Chat
from prefixvlm.inference.loading import load

TOKENS = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    for number in range(2):
        Image.effect_noise((20, 20), 50 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def chat(monkeypatch, saved, lines: list[str], *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", str(saved), "--max-new-tokens", str(TOKENS), "--dtype", "float32", *options])


def expected(saved, *questions) -> list[str]:
    """The answers in one conversation, from the package's own `Chat`, whose first one is checked against a plain prompt."""
    model, processor = load(str(saved))
    chat = Chat(model, processor)
    answers = ["".join(chat.ask(text, images, max_new_tokens=TOKENS)) for text, images in questions]
    text, images = questions[0]
    inputs = prompt_inputs(processor, [user_messages(images, text)])
    assert answers[0] == generate_texts(model, processor, inputs, max_new_tokens=TOKENS)[0]
    return answers


def test_lines_are_questions_of_one_conversation(saved, monkeypatch, capsys):
    first, second = (str(saved / f"{number}.png") for number in range(2))
    lines = ["what?", "", "and this?", f"/image {second}", "which?", "/quit", "never asked"]
    assert chat(monkeypatch, saved, lines, "--image", first) == 0
    answers = expected(saved, ("what?", [first]), ("and this?", []), ("which?", [second]))
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_a_new_conversation_knows_nothing_of_the_old_one(saved, monkeypatch, capsys):
    picture = str(saved / "0.png")
    assert chat(monkeypatch, saved, [f"/image {picture}", "what?", f"/image {picture}", "/new", "what?"]) == 0
    one, other = expected(saved, ("what?", [picture]))[0], expected(saved, ("what?", []))[0]
    assert capsys.readouterr().out == f"{one}\n{other}\n"


def test_what_cannot_be_used_is_told_and_the_rest_is_answered(saved, monkeypatch, capsys):
    (saved / "no.png").write_bytes(b"no picture")
    lines = ["/image gone.png", "/imagine x", "/image", f"/image {saved / 'no.png'}", "what?", "what?"]
    assert chat(monkeypatch, saved, lines) == 2
    out, error = capsys.readouterr()
    assert out == expected(saved, ("what?", []))[0] + "\n"
    told = [line.partition("chat: ")[2] for line in error.splitlines() if line.startswith("prefixvlm chat: ")]
    assert told[0] == "gone.png: there is no such image."
    assert told[1] == "there is no command /imagine; /help names them."
    assert told[2] == "/image needs a file."
    assert "no.png" in told[3]
    assert told[4] == "4 lines could not be used."


def test_words_are_drawn_by_a_seed(saved, monkeypatch, capsys):
    said = []
    for seed in ("1", "1", "2"):
        assert chat(monkeypatch, saved, ["what?"], "--temperature", "2", "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--temperature", "0"], "--temperature is 0; it must be greater than 0."),
        (["--seed", "1"], "--seed draws words; say by --temperature that they are drawn."),
        (["--image", "gone.png"], "gone.png: there is no such image."),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1."),
    ],
)
def test_options_that_do_not_fit_are_one_line(saved, options, sentence, capsys):
    assert main(["chat", str(saved), *options]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [f"prefixvlm chat: {sentence}"]


# takes ten seconds for an answer
SLOWLY = """
import functools, sys, time
from prefixvlm import PrefixVLMForConditionalGeneration
forward = PrefixVLMForConditionalGeneration.forward
@functools.wraps(forward)
def slow(*arguments, **options):
    time.sleep(0.02)
    return forward(*arguments, **options)
PrefixVLMForConditionalGeneration.forward = slow
from prefixvlm.cli import main
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_chat(saved):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "chat", str(saved), "--max-new-tokens", "400"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "dumb"},
    )
    os.close(theirs)
    while "/quit" not in process.stderr.readline().decode():
        pass
    os.write(ours, b"what?\n")
    assert process.stdout.read(4)
    time.sleep(1)  # in the middle of the answer
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.write(ours, b"/quit\n")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert b"Traceback" not in error
    os.close(ours)
