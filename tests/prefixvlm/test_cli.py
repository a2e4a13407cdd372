"""The command line: right answers, and one clear line with exit code 2 for anything else."""

import subprocess
import sys

import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.cli import main, one_line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")
    return folder


def test_help_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from prefixvlm.cli import main, one_line\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("quickstart", "train", "generate", "masks", "info", "push", "demo"):
        assert command in done.stdout


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "prefixvlm", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: prefixvlm")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "no-such-recipe"],
        ["train", "paper", "stages.0.epoch=1"],
        ["train", "quickstart", "--stages", "zero"],
        ["train", "quickstart", "--stages", "0", "stages.0.epoch=1"],
        ["train", "quickstart", "--stages", "9"],
        ["train", "quickstart", "--max-steps", "0"],
        ["train", "quickstart", "--dry-run", "--stages", "9"],
        ["train", "pathvqa", "model.start=no/such/model"],
        ["train", "pathvqa", "--dry-run", "model.start=no/such/model"],
        ["train", "pathvqa", "--dry-run", "--random-init"],
        ["generate", "no/such/model", "--image", "x.png"],
        ["generate", "{saved}", "--image", "no-such.png"],
        ["generate", "{saved}", "--image", "{saved}/config.json", "--prompt", "what?"],
        ["masks", "--output", "{saved}/no/such/folder/masks.png"],
        ["masks", "--output", "{saved}/masks.xyz"],
        ["info", "no-such-preset"],
        ["info", "{saved}/photo.png"],
        ["push", "{saved}/nothing", "somebody/model"],
        ["quickstart", "stages.2.nonsense=1"],
        ["demo", "no/such/model"],
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, saved, capfd):
    assert main([argument.format(saved=saved) for argument in arguments]) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("prefixvlm ")]
    assert len(lines) == 1
    assert len(lines[0]) > 30
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["fly"], ["train", "paper", "--fast"], ["masks", "left.png"], []])
def test_what_no_command_takes_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_an_error_of_a_worker_process_is_one_line_too():
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ValueError()\nValueError: data.json, row 7: there is no\nsuch image.'
    )
    assert one_line(error) == "data.json, row 7: there is no such image."


def test_masks(tmp_path, capsys):
    output = tmp_path / "figure.png"
    assert main(["masks", "--output", str(output)]) == 0
    assert Image.open(output).width > 1000
    assert str(output) in capsys.readouterr().out


def test_info_prints_table_iv(capsys):
    assert main(["info", "paper"]) == 0
    out = capsys.readouterr().out
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in out.splitlines()[1:5]}
    assert counts["projector"] == 1152 * 8960 + 8960 + 8960 * 896 + 896
    assert counts["language_model"] == 494_032_768  # Qwen2.5-0.5B
    assert counts["total"] == sum(counts[name] for name in ("vision_tower", "projector", "language_model"))
    assert "Image tokens: 256" in out
    assert "1.84 M" in out


def test_info_of_a_folder(saved, capsys):
    assert main(["info", str(saved)]) == 0
    assert "Image tokens: 4" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", [[], ["--prompt", "what is <|image_pad|> this?"]])
def test_generate_streams_an_answer(saved, capsys, prompt):
    assert main(["generate", str(saved), "--image", str(saved / "photo.png"), "--max-new-tokens", "8", *prompt]) == 0
    out = capsys.readouterr().out
    assert out.strip()
    assert "<|image_pad|>" not in out


def test_push_uploads_the_folder(saved, monkeypatch, capsys):
    calls = []
    import huggingface_hub

    class Api:
        def create_repo(self, repo, **options):
            calls.append(("create", repo, options["private"]))
            return f"hub/{repo}"

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], str(options["folder_path"])))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", str(saved), "somebody/model", "--private"]) == 0
    assert calls == [("create", "somebody/model", True), ("upload", "somebody/model", str(saved))]
    assert "hub/somebody/model" in capsys.readouterr().out


def test_demo_page_answers(saved):
    pytest.importorskip("gradio", reason="the web page is an extra")
    from prefixvlm.demo import page

    *_, last = page(str(saved)).fn(Image.open(saved / "photo.png"), "what is this?")
    assert isinstance(last, str)


def test_demo_without_gradio_says_what_to_install(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(saved)]) == 2
    assert "pip install 'prefixvlm[demo]'" in capsys.readouterr().err
