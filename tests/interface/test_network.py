"""Without a network, or with a Hub that refuses, every command says so in a line, and soon."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tiny import tiny_model, tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training.plan import refuse_missing_paths

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "texts.txt").write_text("a text\n")
    (folder / "photo.png").write_bytes(b"no picture is looked at before the model is there")
    (folder / "rows.json").write_text("[]")
    return folder


@pytest.fixture(scope="module")
def refusing():
    """The address of a Hub that wants to know who asks."""

    class Refusing(BaseHTTPRequestHandler):
        def refuse(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = refuse  # noqa: N815
        log_message = lambda *arguments: None  # noqa: E731

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(tmp_path, endpoint: str, *arguments) -> tuple[int, list[str]]:
    """The exit code and what was said on stderr by a command that may ask this Hub."""
    clean = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper() and name != "HF_HUB_OFFLINE"}
    environment = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_x"}
    done = subprocess.run(
        [sys.executable, "-m", "prefixvlm", *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "someone/model", "--image", "{saved}/photo.png"),
        ("evaluate", "{saved}", "--task", "vqa", "--data", "someone/data", "--output", "there"),
        pytest.param(("push", "{saved}", "someone/model"), marks=pytest.mark.slow),
        pytest.param(("text-loss", "--model", "someone/model", "--text", "a={saved}/texts.txt"), marks=pytest.mark.slow),
        pytest.param(("info", "someone/model"), marks=pytest.mark.slow),
        pytest.param(("train", "pathvqa", "--dry-run", "model.start=someone/model"), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_hub_out_of_reach_is_one_line(saved, tmp_path, arguments):
    started = time.perf_counter()
    code, said = run(tmp_path, NOWHERE, *(argument.format(saved=saved) for argument in arguments))
    assert code == 2, said
    assert said[-1].startswith(f"prefixvlm {arguments[0]}: "), said
    assert not any("Traceback" in line for line in said)
    assert time.perf_counter() - started < 60


def test_a_hub_that_wants_to_know_who_asks_is_one_line(saved, tmp_path, refusing):
    code, said = run(tmp_path, refusing, "push", saved, "someone/model")
    assert code == 2
    assert "hf auth login" in said[-1]
    assert not any("Traceback" in line for line in said)


def test_a_dry_run_without_a_network_says_what_it_does(tmp_path):
    """From its first second, before anything heavy is imported; and it does not ask again and again."""
    code, said = run(tmp_path, NOWHERE, "train", "paper", "--dry-run", "model.vision=/nope")
    assert code == 2
    assert said[0] == "Reading paper"
    assert said[1] == "127.0.0.1 cannot be reached; only what is on this machine is used."
    assert said[-1] == "prefixvlm train: model.vision is /nope: there is no such file or folder."


@pytest.mark.parametrize(
    "override",
    [
        "model.vision=/nope",
        "model.text=./nope",
        "model.tokenizer=no/such/folder",
        "stages.3.data={source: llava, path: /nope.json}",
        "stages.3.data={source: llava, path: a/b, images: /nope}",
        "stages.3.data={source: mixture, parts: [{source: llava, path: a/b}, {source: vqa, path: ../nope}]}",
    ],
)
def test_what_can_only_be_a_path_is_looked_for_before_all_else(override):
    with pytest.raises(ValueError, match=r"nope|no/such/folder") as caught:
        refuse_missing_paths(load_recipe("paper", [override]))
    assert str(caught.value).startswith(override.partition("=")[0])


def test_the_recipes_of_ours_name_no_missing_path():
    for name in ("paper", "quickstart"):
        assert refuse_missing_paths(load_recipe(name)) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "m", "--image", "a.png", "--prompt", "a", "--prompt", "b"],
        ["generate", "m", "--image", "a.png", "--max-new-tokens", "1", "--max-new-tokens", "1"],
        ["text-loss", "--model", "a", "--model", "b", "--text", "a=b"],
        ["train", "paper", "--stages", "0", "--stages", "1"],
        ["masks", "--output", "a.png", "--output", "b.png"],
        ["evaluate", "m", "--task", "vqa", "--task", "captions", "--output", "x"],
    ],
)
def test_an_option_that_is_given_twice_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "is given twice" in capsys.readouterr().err
