"""`transformers serve FOLDER --trust-remote-code` of transformers 5 opens a saved folder, without this package."""

import base64
import os
import socket
import subprocess
import sys
import time

import pytest
import transformers
from tiny import save_tiny

from prefixvlm.inference.asking import prompt_inputs, stream_text, user_messages
from prefixvlm.inference.loading import load

openai = pytest.importorskip("openai", reason="of the extra [serve]")
pytest.importorskip("fastapi", reason="of the extra [serve]")
pytest.importorskip("uvicorn", reason="of the extra [serve]")

PROGRAM = """
import sys
sys.modules["prefixvlm"] = None  # importing it fails as if it were not installed
from transformers.cli.transformers import main
main()
"""
TOKENS = 12


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.57 looks only for classes of its own")
def test_the_servers_answer_is_ours(tmp_path):
    save_tiny(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    log = tmp_path / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    options = ["--trust-remote-code", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--device", "cpu"]
    with log.open("w") as file:
        command = [sys.executable, "-c", PROGRAM, "serve", str(tmp_path), *options]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while "startup complete" not in log.read_text() and time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'photo.png').read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        asked = {"model": str(tmp_path), "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        answer = client.chat.completions.create(**asked).choices[0].message.content
    finally:
        server.kill()
    model, processor = load(str(tmp_path))
    inputs = prompt_inputs(processor, [user_messages([str(tmp_path / "photo.png")], "what?")])
    assert answer == "".join(stream_text(model, processor, inputs, max_new_tokens=TOKENS))
