"""What commands print arrives whatever the terminal or file can take, and they end quietly when nobody reads or waits."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.cli import accept_any_text

TIMEOUT = 120
# says a letter that only some encodings have, in place of random bytes
SAYS = """
import sys
from prefixvlm.inference import asking
real = asking.stream_text
def stream_text(*arguments, **options):
    for _ in real(*arguments, **options):
        yield "\\u00e9\\u4e00"
asking.stream_text = stream_text
from prefixvlm.cli import main
sys.exit(main())
"""

# takes ten seconds for an answer, and says something with every token, where a streamer waits for a blank
SLOWLY = f"""
import functools, time
from prefixvlm import PrefixVLMForConditionalGeneration
forward = PrefixVLMForConditionalGeneration.forward
@functools.wraps(forward)
def slow(*arguments, **options):
    time.sleep(0.02)
    return forward(*arguments, **options)
PrefixVLMForConditionalGeneration.forward = slow
{SAYS}"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    ends = tiny_processor().tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config.suppress_tokens = ends  # it goes on until it is stopped
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")
    return folder


def heed_ctrl_c() -> None:
    """For a child process: what starts tests in the background may have it ignore the key."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, program=("-m", "prefixvlm"), stdout=subprocess.PIPE, **environment) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c if os.name == "posix" else None,
        env={**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def generate(saved, tokens: int):
    return "generate", saved, "--image", saved / "photo.png", "--max-new-tokens", tokens


def test_a_closed_pipe_ends_generation_quietly(saved):
    process = start(*generate(saved, 480), program=("-c", SLOWLY), PYTHONUNBUFFERED="1")
    assert process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(TIMEOUT) == 141
    assert b"Traceback" not in error
    assert b"Broken pipe" not in error


@pytest.mark.parametrize("arguments", [("--help",), ("info", "tiny")])
def test_a_closed_pipe_is_no_error_of_any_command(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*arguments, stdout=writer)
    os.close(writer)
    error = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 141
    assert error == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("info", "tiny", stdout=full)
        error = process.communicate(timeout=TIMEOUT)[1].decode()
    assert process.returncode == 2
    assert "No space left" in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_generation_with_130(saved):
    process = start(*generate(saved, 480), program=("-c", SLOWLY), PYTHONUNBUFFERED="1")
    assert process.stdout.read(1)  # in the middle of the answer
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # an impatient one
    error = process.communicate(timeout=TIMEOUT)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in error, error
    assert error.splitlines()[-1] == "prefixvlm: stopped."


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"\xe9\u4e00"),
        pytest.param({"PYTHONIOENCODING": "cp1252"}, b"\xe9\\u4e00", marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "cp1252:strict"}, b"\xe9\\u4e00", marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C"}, "é一".encode(), marks=pytest.mark.slow),
        # as on Windows, where a file or a pipe has the code page's encoding
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "é一".encode()),
    ],
    ids=["ascii", "cp1252", "strict", "C", "C without coercion"],
)
def test_an_answer_is_printed_whatever_the_encoding(saved, environment, expected):
    process = start(*generate(saved, 2), program=("-c", SAYS), **environment)
    out, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error.decode()
    assert out.strip().startswith(expected)


def test_a_stream_that_is_no_text_file_is_left_alone():
    assert accept_any_text(None) is None  # as of a program without a console
    notebook = io.StringIO("\u00e9")
    accept_any_text(notebook)
    assert notebook.getvalue() == "\u00e9"
