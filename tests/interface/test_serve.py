"""The real server as a process of its own, asked by OpenAI's own client, and by people who mean it no good."""

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import transformers
from PIL import Image
from tiny import save_tiny

from prefixvlm.cli import main
from prefixvlm.inference.asking import prompt_inputs, stream_text, user_messages
from prefixvlm.inference.loading import load

openai = pytest.importorskip("openai", reason="the client of the extra [serve]")
pytest.importorskip("fastapi", reason="of the extra [serve]")
pytest.importorskip("uvicorn", reason="of the extra [serve]")

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "SERVE.md"
TOKENS = 12
QUEUE = 2
START_SECONDS = 120
QUESTION = "what shape is present?"


def picture(number: int) -> Image.Image:
    return Image.linear_gradient("L").resize((24, 20)).rotate(90 * number).convert("RGB")


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def asking(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, text(QUESTION)]}]


def bomb() -> bytes:
    """A small file that says it is a picture of 50,000 x 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pictures():
    """The port of a site with pictures."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            places = {
                "/on": "/0.png",
                "/inside": "http://127.0.0.2/0.png",
                "/file": "file:///etc/passwd",
                "/round": "/round",
            }
            if self.path in places:
                self.send_response(302)
                self.send_header("Location", places[self.path])
                self.end_headers()
            elif self.path == "/0.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(file_of(picture(0)))
            else:
                self.send_response(404)
                self.end_headers()

        log_message = lambda *arguments: None  # noqa: E731

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def port(folder, pictures, tmp_path_factory):
    """The port of a server, which Ctrl-C ends without a traceback when all is done."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    allowed = [f"--allow-host=127.0.0.1:{pictures}", "--allow-host", "localhost:1"]
    options = ["--port", "0", "--name", "tiny", "--queue", str(QUEUE), "--max-new-tokens", "300", "--dtype", "float32"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process inherits it if it is ignored
    with log.open("w") as file:
        command = [sys.executable, "-m", "prefixvlm", "serve", str(folder), *options, *allowed]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "startup complete" not in log.read_text() and time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        said = log.read_text()
        yield int(said.partition("Serving 'tiny' at http://127.0.0.1:")[2].partition("/v1")[0])
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130
        assert log.read_text().endswith("prefixvlm: stopped.\n")
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(folder):
    """Answers conversations without a server."""
    model, processor = load(str(folder))

    def answer(messages: list[dict], **settings) -> str:
        inputs = prompt_inputs(processor, [messages])
        return "".join(stream_text(model, processor, inputs, **{"max_new_tokens": TOKENS, **settings}))

    return answer


def whole(client, messages: list[dict], **fields) -> str:
    fields = {"max_tokens": TOKENS, **fields}
    return client.chat.completions.create(model="tiny", messages=messages, **fields).choices[0].message.content


def streamed(client, messages: list[dict], **fields) -> str:
    fields = {"max_tokens": TOKENS, **fields}
    chunks = client.chat.completions.create(model="tiny", messages=messages, stream=True, **fields)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def complete(answer: str) -> str:
    """Without what is left of a last character whose bytes are not all there, which transformers 5 does not stream."""
    return answer.rstrip("\ufffd")


def post(port: int, body, path: str = "/v1/chat/completions", kind: str = "application/json") -> tuple[int, dict]:
    """The status and the answer to a body that the client would not send."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": kind}), timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def test_the_model_that_is_served_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_an_answer_is_that_of_generate(client, folder, tmp_path, capsys):
    picture(1).save(tmp_path / "photo.png")
    arguments = ["--image", str(tmp_path / "photo.png"), "--prompt", QUESTION, "--max-new-tokens", str(TOKENS)]
    assert main(["generate", str(folder), *arguments, "--dtype", "float32"]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    messages = asking(part(data_url(file_of(picture(1)))))
    assert whole(client, messages) == expected
    assert complete(streamed(client, messages)) == complete(expected)
    assert expected != whole(client, asking(part(data_url(file_of(picture(2))))))


def test_several_pictures_a_system_turn_and_what_was_said_before(client, alone):
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello!"}]
    system = {"role": "system", "content": "Answer briefly."}
    urls = [data_url(file_of(picture(0))), data_url(file_of(picture(1), "JPEG"), "jpeg")]
    opened = [picture(0), Image.open(io.BytesIO(file_of(picture(1), "JPEG")))]
    expected = alone([system, *before, *user_messages(opened, QUESTION)])
    messages = [system, *before, *asking(*map(part, urls))]
    assert whole(client, messages) == expected
    assert complete(streamed(client, messages)) == complete(expected)
    assert whole(client, [{**system, "role": "developer"}, *messages[1:]]) == expected
    assert whole(client, messages[1:]) != expected
    assert whole(client, [system, *before, *asking(*map(part, urls[::-1]))]) != expected


def test_two_users_at_once_get_their_own_answers(client, alone):
    urls = [data_url(file_of(picture(number))) for number in range(2)]
    expected = [alone(user_messages([picture(number)], QUESTION), max_new_tokens=60) for number in range(2)]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(2) as users:
        for ask in (streamed, whole):
            asked = [users.submit(ask, client, asking(part(url)), max_tokens=60) for url in urls]
            assert [complete(answer.result()) for answer in asked] == [complete(answer) for answer in expected]


def test_responses_streamed_and_not(client, alone):
    content = [
        {"type": "input_image", "image_url": data_url(file_of(picture(1)))},
        {"type": "input_text", "text": QUESTION},
    ]
    asked = {"model": "tiny", "input": [{"role": "user", "content": content}], "max_output_tokens": TOKENS}
    expected = alone(
        [{"role": "system", "content": [text("Be brief.")]}, *user_messages([picture(1)], QUESTION)],
    )
    response = client.responses.create(**asked, instructions="Be brief.")
    assert response.output_text == expected
    assert response.usage.output_tokens == TOKENS
    with client.responses.stream(**asked, instructions="Be brief.") as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert complete("".join(pieces)) == complete(expected)
    assert len(pieces) > 1
    words = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=TOKENS)
    assert words.output_text == alone(user_messages([], QUESTION))


def test_an_answer_says_how_long_it_is_and_why_it_ended(client, port):
    asked = {"model": "tiny", "messages": asking(part(data_url(file_of(picture(1)))))}
    cut = client.chat.completions.create(**asked, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3
    assert cut.usage.total_tokens == cut.usage.prompt_tokens + 3
    *_, last = client.chat.completions.create(**asked, max_tokens=3, stream=True)
    assert last.choices[0].finish_reason == "length"
    assert last.usage == cut.usage


def test_sampling_is_drawn_by_the_seed(client):
    messages = asking(part(data_url(file_of(picture(1)))))
    drawn = [whole(client, messages, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert whole(client, messages, temperature=0, seed=3) == whole(client, messages)


def test_pictures_of_an_allowed_host_are_fetched(client, pictures):
    expected = whole(client, asking(part(data_url(file_of(picture(0))))))
    for path in ("0.png", "on"):
        assert whole(client, asking(part(f"http://127.0.0.1:{pictures}/{path}"))) == expected


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/etc/passwd", "Files of this server are not opened"),
        ("file:///etc/passwd", "Files of this server are not opened"),
        ("photo.png", "Files of this server are not opened"),
        ("ftp://example.org/a.png", "Files of this server are not opened"),
        ("http://127.0.0.1/a.png", "may not ask"),
        ("http://127.0.0.1:{port}/v1/models", "may not ask"),
        ("http://169.254.169.254/latest/meta-data", "may not ask"),
        ("http://[::1]/a.png", "may not ask"),
        ("https://10.0.0.1/a.png", "may not ask"),
        ("http://example.org/a.png", "may not ask"),
        ("http://127.0.0.1:{pictures}@example.org/a.png", "may not ask"),
        ("http://localhost:1/0.png", "of a private network"),
        ("http://127.0.0.1:{pictures}/inside", "may not ask"),
        ("http://127.0.0.1:{pictures}/file", "only addresses of http and https"),
        ("http://127.0.0.1:{pictures}/round", "leads on more than"),
        ("http://127.0.0.1:{pictures}/nothing", "answers 404"),
        ("http://127.0.0.1:99999/a.png", "cannot be read"),
        (data_url(b"no picture at all"), "no picture"),
        (data_url(b""), "no picture"),
        (data_url(b"%PDF-1.4 no picture"), "no picture"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no picture"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture"),
        ("data:image/png;base64,@@@@", "not in base64"),
        ("data:image/png,abc", "Files of this server are not opened"),
        (data_url(bomb()), "too large"),
        (data_url(file_of(Image.effect_noise((90, 90), 50).convert("RGB"), "JPEG")[:900]), "cannot be read"),
    ],
)
def test_a_picture_that_is_not_wanted_is_refused_with_a_sentence(client, port, pictures, url, says):
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, asking(part(url.format(port=port, pictures=pictures) if "{" in url else url)))
    message = caught.value.body["message"]
    assert says in message
    assert "Picture 1" in message
    assert message.endswith(".")
    assert len(message) < 300
    assert whole(client, asking(), max_tokens=2)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        ({}, 400, "no list of messages"),
        ({"messages": []}, 400, "nothing to answer"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "give a text or a list of parts"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "only text and pictures"),
        ({"messages": [*asking(), {"role": "assistant", "content": "a"}]}, 400, "nothing to answer"),
        ({"messages": asking(), "model": "someone/other"}, 404, "serves 'tiny' alone"),
        ({"messages": asking(), "tools": [{"type": "function"}]}, 400, "tools"),
        ({"messages": asking(), "n": 2}, 400, "n is 2"),
        ({"messages": asking(), "stop": "a"}, 400, "stop is 'a'"),
        ({"messages": asking(), "colour": "red"}, 400, "'colour' has no meaning"),
        ({"messages": asking(), "temperature": "hot"}, 400, "temperature is 'hot'"),
        ({"messages": asking(), "max_tokens": 10**9}, 400, "the most is 300"),
        ({"messages": asking(), "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"messages": asking(text("a" * 400)), "max_tokens": 200}, 400, "reads 512 in all"),
        ({"messages": asking(text("a" * 100_000))}, 400, "longer than the model can read"),
        ({"messages": [{"role": "user", "content": "a"}] * 1000}, 400, "longer than the model can read"),
        ({"messages": asking(*[part("data:,")] * 17)}, 400, "more than 16 pictures"),
        ({"messages": asking(), "generation_config": '{"num_beams": 1000}'}, 400, "num_beams"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_a_sentence(port, body, status, says):
    code, answer = post(port, body)
    assert code == status, answer
    message = answer["error"]["message"]
    assert says in message
    assert message.endswith(".")
    assert len(message) < 300
    assert post(port, {"messages": asking(), "max_tokens": 2})[0] == 200


def test_a_body_of_100_mb_is_refused_with_a_sentence(port):
    code, answer = post(port, b"a" * 100_000_000)
    assert code == 413
    assert answer["error"]["message"] == ("The request is too large: it may have 33,554,432 bytes; shrink its pictures.")
    assert post(port, {"messages": asking(), "max_tokens": 2})[0] == 200


def test_a_picture_with_too_many_bytes_is_refused(port):
    code, answer = post(port, {"messages": asking(part(data_url(b"a" * (16 * 2**20 + 1))))})
    assert code == 400
    assert answer["error"]["message"] == "Picture 1 is too large: a picture may have 16,777,216 bytes; shrink it."


@pytest.mark.parametrize("path", ["/reset", "/v1/audio/transcriptions", "/docs", "/v1/completions"])
def test_other_doors_are_closed(port, path):
    code, answer = post(port, {"model": "someone/other"}, path)
    assert code == 404
    assert "There is nothing at" in answer["error"]["message"]


def test_what_the_documentation_asks_is_answered(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(0).save("photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("runs/quickstart/final", "tiny")
    exec(compile(code, "SERVE.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_no_other_model_is_loaded(port):
    code, answer = post(port, {"model": "someone/other"}, "/load_model")
    assert code == 404
    assert answer["error"]["message"] == "This server serves 'tiny' alone; the request names 'someone/other'."


def test_transformers_chat_talks_to_it(port):
    if transformers.__version__.startswith("4."):
        pytest.skip("4.57's looks on the Hub for the name that a model is served by")
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "chat", "tiny", f"http://127.0.0.1:{port}/v1", f"max_new_tokens={TOKENS}"]
    typed = "hello\nn\n!exit\n!exit\n"  # an answer that is cut is followed by a question
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, its client asks not even this machine
    said = subprocess.run(command, input=typed, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "already loaded" in said.stdout
    assert "tokens in" in said.stdout


def test_a_request_that_another_site_could_send_unasked_is_refused(port):
    code, answer = post(port, {"messages": asking()}, kind="text/plain")
    assert code == 415
    assert "Content-Type: application/json" in answer["error"]["message"]


def test_a_request_too_many_hears_that_the_server_is_busy(port):
    body = json.dumps({"messages": asking(), "max_tokens": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(QUEUE + 1)]

    def until(status: int) -> dict:
        """The first answer of this status; a place is taken a little after it is asked for, and given back."""
        deadline = time.monotonic() + 20
        while (answer := post(port, body))[0] != status:
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)
        return answer[1]

    try:
        for connection in waiting:  # all inside, none of them whole
            connection.sendall(f"{head}\r\n\r\n".encode())
        answer = until(503)
        assert answer["error"]["message"].startswith(f"The server is busy: {QUEUE} requests wait")
        waiting[0].sendall(body)
        assert waiting[0].recv(15) == b"HTTP/1.1 200 OK"
        assert until(200)["choices"]
    finally:
        for connection in waiting:
            connection.close()


def test_who_leaves_holds_nobody_up(client):
    """The answer that nobody waits for ends, so that the next one begins."""
    messages = asking(part(data_url(file_of(picture(1)))))
    expected = whole(client, messages)
    for _ in range(5):
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=300, stream=True)
        next(iter(stream))
        stream.close()
    assert whole(client, messages) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-pictures", "0"], "--max-pictures is 0"),
        (["--queue", "-1"], "--queue is -1"),
        (["--max-megapixels", "1000"], "Pillow reads at most 89"),
        (["--allow-host", "http://example.org/"], "--allow-host is 'http://example.org/'"),
        (["--port", "70000"], "cannot be listened on"),
        (["--host", "203.0.113.1"], "cannot be listened on"),
        (["--port", "{port}"], "cannot be listened on"),
        (["--port", "0", "--max-context", "513"], "the model reads 512 tokens"),
        (["--port", "0", "--device", "nothing"], "The device is 'nothing'"),
    ],
)
def test_a_server_that_cannot_be_opened_is_one_line(folder, port, capsys, options, says):
    assert main(["serve", str(folder), *(option.format(port=port) for option in options)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("prefixvlm serve: ")
    assert says in said[-1]
