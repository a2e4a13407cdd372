"""Pushed through the real huggingface_hub over HTTP, and loaded again by a process that has only transformers."""

import os
import subprocess
import sys

import pytest
from hub_standin import running
from tiny import tiny_model, tiny_processor

REPO = "someone/vlm"
LOADS = """
import sys
sys.modules["prefixvlm"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
repository, revision, image = sys.argv[1:]
how = {"trust_remote_code": True, "revision": revision}
model = AutoModelForImageTextToText.from_pretrained(repository, **how).eval()
processor = AutoProcessor.from_pretrained(repository, **how)
messages = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    print("logits", repr(model(**inputs).logits.double().sum().item()))
"""


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    tiny_processor().save_pretrained(folder)
    (folder / "run.json").write_text('{"command": "/home/me/secret"}')
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


def run(hub, home, *command) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def push(hub, folder, *options) -> subprocess.CompletedProcess:
    return run(hub, folder.parent / "home", sys.executable, "-m", "prefixvlm", "push", folder, REPO, *options)


def test_what_was_pushed_is_loaded_by_a_stranger(hub, folder, tmp_path):
    done = push(hub, folder, "--private", "--commit-message", "the first try")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Uploaded to {hub.url}/{REPO}" in done.stdout
    assert hub.repositories[REPO]["private"]
    assert hub.messages == ["the first try"]
    files = hub.files(REPO)
    assert len([name for name in files if name.startswith("model-")]) > 1  # in shards
    assert not {"run.json", "optimizer.pt"} & files.keys()
    assert all(content == (folder / name).read_bytes() for name, content in files.items())
    assert not any(b"hf_secret" in content or b"/home/me" in content for content in files.values())

    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    loaded = run(hub, tmp_path / "stranger", sys.executable, "-c", LOADS, REPO, "main", tmp_path / "a.png")
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    here = run(hub, tmp_path / "here", sys.executable, "-c", LOADS, folder, "main", tmp_path / "a.png")
    assert loaded.stdout.splitlines()[-1] == here.stdout.splitlines()[-1]
    assert loaded.stdout.splitlines()[-1].startswith("logits")


@pytest.mark.slow
def test_a_repeated_push_sends_no_weights_twice(hub, folder):
    assert push(hub, folder).returncode == 0
    sent = list(hub.sent)
    assert len(sent) == len(set(sent)) > 1
    assert push(hub, folder).returncode == 0
    assert hub.sent == sent


def test_a_push_that_failed_goes_on_with_what_is_missing(hub, folder):
    hub.lose = 1
    failed = push(hub, folder)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "hf_secret" not in failed.stderr
    assert not hub.files(REPO)
    arrived = list(hub.sent)
    assert push(hub, folder).returncode == 0
    assert hub.sent[: len(arrived)] == arrived
    assert len(hub.sent) == len(set(hub.sent))
    assert {"config.json", "model.safetensors.index.json"} <= hub.files(REPO).keys()


@pytest.mark.slow
def test_a_branch_is_made_and_main_left_alone(hub, folder):
    done = push(hub, folder, "--revision", "v2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{hub.url}/{REPO}/tree/v2" in done.stdout
    assert hub.files(REPO) == {}
    assert "config.json" in hub.files(REPO, "v2")


@pytest.mark.slow
def test_a_change_is_proposed(hub, folder):
    done = push(hub, folder, "--create-pr")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{hub.url}/{REPO}/discussions/1" in done.stdout
    assert hub.files(REPO) == {}
    assert "config.json" in hub.files(REPO, "refs/pr/1")
