"""The command line: right answers, and one clear line with exit code 2 for anything else."""

import base64
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_processor

from prefixvlm import __version__
from prefixvlm.cli import EXTRAS, main, missing_package, one_line, parser
from prefixvlm.inference.int8 import Int8Linear
from prefixvlm.train.evaluation import predictions, tasks
from prefixvlm.train.evaluation.tasks import MAX_NEW_TOKENS
from prefixvlm.train.recipes.evaluation import TASK_NAMES, CaptionRun, EvaluationRun

EVALUATE = ["evaluate", "{saved}", "--output", "{saved}/evaluated", "--task"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    row = {"image": "photo.png", "question": "what?", "answer": "red", "texts": ["a red picture", "red"], "split": "test"}
    sets = {
        "rows": [row, row | {"question": "why?"}, row],
        "gone": [row | {"image": "gone.png"}],
        "wordless": [row, row | {"texts": [], "answer": ""}],
    }
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    karpathy = [{"filename": "photo.png", "sentences": [{"raw": text} for text in row["texts"]], "split": "test"}] * 3
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    for name in ("weights", "tokenizer", "lacking", "another"):
        shutil.copytree(folder, folder / "broken" / name, ignore=shutil.ignore_patterns("broken"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "broken" / "weights" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "broken" / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    weights = load_file(folder / "model.safetensors")
    del weights["projector.linear_1.weight"]
    save_file(weights, folder / "broken" / "lacking" / "model.safetensors", {"format": "pt"})
    (folder / "broken" / "another" / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "evaluated").mkdir()
    (folder / "evaluated" / "predictions.jsonl").write_text("of somebody else\n")
    return folder


def test_help_needs_no_torch():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'pydantic', 'yaml')))\n"
        "from prefixvlm.cli import main, one_line\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("quickstart", "train", "generate", "masks", "info", "push", "demo"):
        assert command in done.stdout


def test_help_tells_the_schemas_defaults(capsys):
    fields = {name: field for name, field in EvaluationRun.model_fields.items() if not field.is_required()}
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name in ("split", "shots", "shots_split", "shots_seed", "num_beams", "batch_size", "dtype"):
        about = told.partition(f"--{name.replace('_', '-')} ")[2].rpartition("--")[0]
        assert f"default: {fields[name].default}" in told.split(f" --{name.replace('_', '-')} ")[-1][:80], about
    kinds = {"captions": "captions", "vqa": "answers"}
    assert "default: " + ", ".join(f"{MAX_NEW_TOKENS[kind]} for {name}" for kind, name in kinds.items()) in told
    listed = told.split("--task TASK ")[-1].partition(" --data")[0].replace(" or ", ", ")
    assert tuple(listed.split(", ")) == TASK_NAMES


def test_every_setting_of_an_evaluation_has_its_option():
    needed = ["evaluate", "model", "--task", "vqa", "--output", "there"]
    given = ["--data", "--images", "--split", "--image", "--texts", "--question", "--choices", "--answer", "--prompt"]
    given += ["--shots-data", "--shots-split", "--dtype", "--device"]
    numbers = ["--shots", "--shots-seed", "--num-beams", "--max-new-tokens", "--batch-size", "--limit"]
    arguments = [word for option in given for word in (option, "x")] + [
        word for option in numbers for word in (option, "1")
    ]
    options = vars(parser().parse_args([*needed, *arguments, "--int8", "--table"]))
    of_commands = {"command", "run", "goes_on", "json"}
    assert options.keys() - of_commands == EvaluationRun.model_fields.keys()
    assert vars(parser().parse_args(needed)).keys() - of_commands == {"model", "task", "output"}


def test_every_setting_of_captioning_has_its_option():
    given = ["images", "image", "split", "prompt", "num-beams", "max-new-tokens", "batch-size", "dtype", "device"]
    arguments = [word for option in given for word in (f"--{option}", "1")]
    options = vars(parser().parse_args(["caption", "model", "data", "--output", "there", *arguments, "--int8", "--json"]))
    assert options.keys() - {"command", "run", "goes_on", "json"} == CaptionRun.model_fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        *((package, ["train", "quickstart", "--dry-run"]) for package in ("accelerate", "psutil", "yaml")),
        ("tqdm", ["evaluate", "no/model", "--task", "easy_vqa", "--output", "there"]),
        (
            "pycocoevalcap",
            ["evaluate", "{saved}", "--task", "captions", "--data", "{saved}/rows.json", "--output", "there"],
        ),
        ("matplotlib", ["masks"]),
        ("matplotlib", ["text-loss", "--model", "x", "--text", "a=b.txt", "--output", "{saved}/losses"]),
        ("accelerate", ["quickstart"]),
    ],
)
def test_a_missing_extra_is_told_by_name(package, arguments, saved, tmp_path):
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from prefixvlm.cli import main\nsys.exit(main({[argument.format(saved=saved) for argument in arguments]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    says = done.stderr.splitlines()[-1]
    assert says.startswith(f"prefixvlm {arguments[0]}: the package {package} is missing")
    # from an index, and from a clone
    assert f"pip install 'prefixvlm[{extra}]'" in says
    assert f"pip install -e '.[{extra}]'" in says


def test_another_missing_package_is_not_called_an_extra():
    assert missing_package(ModuleNotFoundError("No module named 'x'", name="x")) is None
    assert missing_package(ImportError("tqdm", name="tqdm")) is None


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
        ["train", "quickstart", "workers=-1"],
        ["train", "quickstart", "stages.2.projector_lr=.nan"],
        ["train", "quickstart", "--dry-run", "--stages", "9"],
        ["train", "pathvqa", "model.start=no/such/model"],
        ["train", "pathvqa", "--dry-run", "model.start=no/such/model"],
        ["train", "pathvqa", "--dry-run", "--random-init"],
        ["generate", "no/such/model", "--image", "x.png"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--device", "cuda:7"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--device", "gpu"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--device", "meta"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--dtype", "float8"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--max-new-tokens", "0"],
        ["generate", "{saved}", "--image", "{saved}/photo.png", "--image", "no-such.png"],
        ["generate", "{broken}/weights", "--image", "{saved}/photo.png"],
        ["generate", "{broken}/tokenizer", "--image", "{saved}/photo.png"],
        ["generate", "{broken}/lacking", "--image", "{saved}/photo.png"],
        ["generate", "{broken}/another", "--image", "{saved}/photo.png"],
        ["text-loss", "--model", "{broken}/weights", "--text", "a={saved}/photo.png"],
        ["train", "quickstart", "--device", "tpu"],
        ["train", "quickstart", "--device", "cpu", "device=cpu"],
        ["train", "quickstart", "seed=1", "seed=2"],
        ["train", "quickstart", "--max-steps", "2", "stages.2.max_steps=1"],
        ["quickstart", "--output", "here", "output=there"],
        ["info", "{broken}/another"],
        ["info", "{broken}"],
        ["demo", "{saved}", "--device", "gpu"],
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
    arguments = [argument.format(saved=saved, broken=saved / "broken") for argument in arguments]
    if arguments[0] == "demo":
        pytest.importorskip("gradio", reason="the web page is an extra")
    assert main(arguments) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("prefixvlm ")]
    assert len(lines) == 1
    assert len(lines[0]) > 30
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*EVALUATE, "captoins"], "--task is 'captoins'; did you mean 'captions'?"),
        ([*EVALUATE, "captions"], "The task captions needs data: --data"),
        ([*EVALUATE, "captions", "--data", "{saved}/no-such.json"], "no-such.json: there is no such file"),
        ([*EVALUATE, "captions", "--data", "{saved}/photo.png"], "photo.png is of no kind that is read"),
        ([*EVALUATE, "captions", "--data", "{saved}/rows.json", "--split", "val"], "'split': 'val'"),
        (
            [*EVALUATE, "captions", "--data", "{saved}/rows.json", "--images", "{saved}/no-such"],
            "no-such: there is no such folder of images",
        ),
        (
            [*EVALUATE, "captions", "--data", "{saved}/rows.json", "--texts", "no-such-key"],
            "rows.json, row 1: `no-such-key` is missing",
        ),
        ([*EVALUATE, "captions", "--data", "{saved}/rows.json", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (
            [*EVALUATE, "captions", "--data", "{saved}/rows.json", "--num-beams", "0"],
            "--num-beams is 0; it must be at least 1",
        ),
        ([*EVALUATE, "captions", "--batch-size", "-1"], "--batch-size is -1; it must be at least 1"),
        (
            [*EVALUATE, "captions", "--data", "{saved}/rows.json", "--max-new-tokens", "0"],
            "--max-new-tokens is 0; it must be at least 1",
        ),
        (
            [*EVALUATE, "captions", "--data", "{saved}/rows.json", "--dtype", "float8"],
            "--dtype is 'float8'; choose one of float32, bfloat16, float16",
        ),
        ([*EVALUATE, "captions", "--data", "{saved}/wordless.json"], "wordless.json, row 2: `texts` is empty"),
        ([*EVALUATE, "vqa", "--data", "{saved}/wordless.json"], "wordless.json, row 2: `answer` is empty"),
        ([*EVALUATE, "vqa", "--data", "{saved}/rows.json", "--table"], "--table is for captions"),
        ([*EVALUATE, "vqa", "--data", "{saved}/rows.json"], "choose another folder"),
        (
            ["evaluate", "{saved}", "--output", "{saved}/gone", "--task", "vqa", "--data", "{saved}/gone.json"],
            "gone.json, row 1:",
        ),
        (
            ["evaluate", "{saved}", "--output", "{saved}/photo.png", "--task", "vqa", "--data", "{saved}/rows.json"],
            "photo.png is a file; choose a folder",
        ),
        ([*EVALUATE, "flickr8k", "--data", "{saved}/karpathy.json"], "has 3 test images where"),
        ([*EVALUATE, "pathvqa"], "path-vqa cannot be loaded"),
        (
            ["evaluate", "no/such/model", "--task", "vqa", "--data", "{saved}/rows.json", "--output", "{saved}/new"],
            "no/such/model: there is no such file or folder",
        ),
        (
            ["evaluate", "{saved}/evaluated", "--task", "vqa", "--data", "{saved}/rows.json", "--output", "{saved}/new"],
            "evaluated is not a PrefixVLM",
        ),
    ],
)
def test_evaluate_says_what_is_wrong_and_loses_nothing(arguments, says, saved, capfd):
    before = (saved / "evaluated" / "predictions.jsonl").read_bytes()
    assert main([argument.format(saved=saved) for argument in arguments]) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("prefixvlm ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in error
    assert (saved / "evaluated" / "predictions.jsonl").read_bytes() == before


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


@pytest.fixture
def quantized(monkeypatch) -> list:
    """The layers of 8 bits that a command makes."""
    layers = []
    init = Int8Linear.__init__
    monkeypatch.setattr(Int8Linear, "__init__", lambda self, linear: layers.append(linear) or init(self, linear))
    return layers


def test_generate_and_evaluate_read_weights_of_8_bits(saved, tmp_path, capsys, quantized):
    options = ["--image", str(saved / "photo.png"), "--max-new-tokens", "4", "--dtype", "bfloat16"]
    assert main(["generate", str(saved), *options]) == 0
    assert quantized == []
    assert main(["generate", str(saved), *options, "--int8"]) == 0
    layers = len(quantized)
    assert layers > 0
    options = ["--task", "vqa", "--data", str(saved / "rows.json"), "--output", str(tmp_path), "--max-new-tokens", "4"]
    assert main(["evaluate", str(saved), *options, "--int8"]) == 0
    assert len(quantized) == 2 * layers
    assert json.loads((tmp_path / "metrics.json").read_text())["int8"] is True
    # predictions of one kind of weights are not taken up by the other
    assert main(["evaluate", str(saved), *options]) == 2
    assert str(tmp_path) in capsys.readouterr().err


class Scored:
    """Caption scores without Java."""

    scores = dict.fromkeys(("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"), 0.125)
    notes = ["CIDEr: a note."]

    def resampled(self, indices):
        return self.scores


@pytest.fixture
def evaluated(saved, tmp_path, monkeypatch, capsys):
    """Runs the command on a file, without Java; gives what it printed, and metrics.json."""
    monkeypatch.setattr(predictions, "scorer", lambda kind: lambda predictions, references: Scored())
    for task in ("flickr8k", "coco"):
        monkeypatch.setitem(tasks.TASKS, task, replace(tasks.TASKS[task], rows=3))

    def evaluated(task, data, *options):
        arguments = ["evaluate", str(saved), "--task", task, "--data", str(saved / data), "--output", str(tmp_path)]
        assert main([*arguments, "--max-new-tokens", "4", *options]) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "metrics.json").read_text())

    return evaluated


def test_evaluate_scores_captions_beside_the_paper(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.TASKS, "flickr8k", replace(tasks.TASKS["flickr8k"], rows=3))
    options = ["--task", "flickr8k", "--data", str(saved / "karpathy.json"), "--output", str(tmp_path), "--table"]
    assert main(["evaluate", str(saved), *options, "--num-beams", "2", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines()[1:8]] == ["76.0", "59.9", "45.3", "33.7", "27.8", "57.8", "99.4"]
    assert "3 examples by 2 beams, at most 4 tokens each." in out
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["scores"]) == list(report["intervals"]) == list(Scored.scores)
    assert report["decoding"]["num_beams"] == 2
    results = json.loads((tmp_path / "captions_results.json").read_text())
    assert [row["image_id"] for row in results] == [0, 1, 2]
    for name in ("predictions.jsonl", "gallery.html", "gallery.png"):
        assert (tmp_path / name).stat().st_size
        assert f"Saved to {tmp_path / name}" in out


def test_evaluate_answers_questions(saved, tmp_path, capsys):
    options = ["--task", "vqa", "--data", str(saved / "rows.json"), "--output", str(tmp_path), "--max-new-tokens", "4"]
    assert main(["evaluate", str(saved), *options]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["questions", "3"] in lines
    assert ["overall", "0.00", "[0.00,", "0.00]"] in lines
    assert "3 examples by greedy search, at most 4 tokens each." in out
    assert not (tmp_path / "captions_results.json").exists()


def test_evaluate_on_fewer_examples_is_not_beside_the_paper(evaluated):
    out, report = evaluated("flickr8k", "karpathy.json", "--table", "--limit", "2")
    assert (report["limit"], report["examples"]) == (2, 2)
    assert report["notes"] == Scored.notes
    assert Scored.notes[0] in out.splitlines()
    assert "paper" not in out
    assert "Bleu_4" in out


def test_evaluate_with_a_limit_beyond_the_set_is_on_the_whole_set(evaluated):
    out, report = evaluated("flickr8k", "karpathy.json", "--table", "--limit", "9")
    assert (report["limit"], report["examples"]) == (None, 3)
    assert "paper, Table VI" in out


def test_evaluate_on_another_split_is_not_beside_the_paper(evaluated, saved, tmp_path):
    karpathy = json.loads((saved / "karpathy.json").read_text())
    for row in karpathy["images"]:
        row["split"] = "val"
    (tmp_path / "val.json").write_text(json.dumps(karpathy))
    out, _ = evaluated("flickr8k", tmp_path / "val.json", "--images", str(saved), "--table", "--split", "val")
    assert "paper" not in out


def test_evaluate_does_not_mix_images_of_two_folders(evaluated, saved, tmp_path):
    evaluated("captions", "rows.json")
    options = ["--task", "captions", "--data", str(saved / "rows.json"), "--output", str(tmp_path)]
    assert main(["evaluate", str(saved), *options, "--max-new-tokens", "4", "--images", str(saved)]) == 2


def test_evaluate_does_not_mix_the_answers_of_a_model_and_of_what_replaced_it(evaluated, saved, tmp_path):
    for folder in (tmp_path / "model", tmp_path / "out"):
        folder.mkdir()
    options = ["--task", "captions", "--data", str(saved / "rows.json"), "--output", str(tmp_path / "out")]
    codes = []
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / "model")
        tiny_processor().save_pretrained(tmp_path / "model")
        codes.append(main(["evaluate", str(tmp_path / "model"), *options, "--max-new-tokens", "4"]))
    assert codes == [0, 2]


def test_evaluate_without_matplotlib_says_so_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--task", "vqa", "--data", str(saved / "rows.json"), "--output", str(tmp_path / "new")]
    assert main(["evaluate", str(saved), *options]) == 2
    assert "pip install 'prefixvlm[train]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_demo_page_answers(saved):
    pytest.importorskip("gradio", reason="the web page is an extra")
    from prefixvlm.page import page

    *_, last = page(str(saved)).fn(Image.open(saved / "photo.png"), "what is this?")
    assert isinstance(last, str)


def test_demo_without_gradio_says_what_to_install(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(saved)]) == 2
    assert "pip install 'prefixvlm[demo]'" in capsys.readouterr().err


def test_the_version_names_what_is_below(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    said = capsys.readouterr().out
    assert said.startswith(f"prefixvlm {__version__} (torch {torch.__version__.partition('+')[0]}")
    assert f"transformers {transformers.__version__}" in said


def exit_code(arguments) -> int:
    try:
        return main(arguments)
    except SystemExit as error:  # argparse's
        return error.code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian", "paper"], "there is no command trian; did you mean 'train'?"),
        (["frobnicate"], "there is no command frobnicate; choose one of quickstart, train, "),
        (["masks", "--ouptut", "x.png"], "unrecognized arguments: --ouptut x.png; did you mean --output?"),
        (["masks", "--frobnicate"], "unrecognized arguments: --frobnicate\n"),
        (["train", "quickstart", "--max-stepps=3"], "--max-stepps=3; did you mean --max-steps?"),
        (["train", "quickstart", "stages.2.epoch=3"], "unknown key epoch; did you mean 'epochs'?"),
    ],
)
def test_a_name_that_is_nearly_right_is_recognised(arguments, sentence, capsys):
    assert exit_code(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_overrides_of_a_recipe_are_shown_as_optional(capsys):
    for command in ("train", "quickstart"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "[key=value ...]" in " ".join(capsys.readouterr().out.split())


def stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_an_image_or_a_prompt_may_come_from_stdin(saved, monkeypatch, capsys):
    photo = saved / "photo.png"
    generate = ["generate", str(saved), "--max-new-tokens", "4", "--dtype", "float32"]
    assert main([*generate, "--image", str(photo), "--prompt", "what?"]) == 0
    expected = capsys.readouterr().out
    stdin(monkeypatch, photo.read_bytes())
    assert main([*generate, "--image", "-", "--prompt", "what?"]) == 0
    assert capsys.readouterr().out == expected
    stdin(monkeypatch, b"what?\n")
    assert main([*generate, "--image", str(photo), "--prompt", "-"]) == 0
    assert capsys.readouterr().out == expected
    data = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    assert main([*generate, "--image", data, "--prompt", "what?"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "-", "--prompt", "-"], "stdin can be read once"),
        (["--image", "{photo}", "--prompt", "-"], "the prompt on stdin is empty"),
        (["--image", "-"], "image"),
    ],
)
def test_a_stdin_that_cannot_be_used_is_one_line(saved, options, sentence, monkeypatch, capsys):
    stdin(monkeypatch, b"")
    options = [option.format(photo=saved / "photo.png") for option in options]
    assert main(["generate", str(saved), "--max-new-tokens", "4", *options]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["info", "tiny"], {"parameters", "image_tokens", "training_flops"}),
        (["generate", "{saved}", "--image", "{saved}/photo.png", "--max-new-tokens", "3"], {"images", "prompt", "text"}),
        (
            ["evaluate", "{saved}", "--task", "vqa", "--data", "{saved}/rows.json", "--output", "{out}"],
            {"scores", "intervals", "versions"},
        ),
        (["text-loss", "--model", "{saved}", "--text", "a={saved}/rows.json:question"], {"sets", "pairs"}),
        (["caption", "{saved}", "{saved}/photo.png", "--output", "{out}.csv"], {"saved", "pictures", "failed"}),
    ],
)
def test_json_is_all_that_is_printed(saved, arguments, keys, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*(one.format(saved=saved, out=out) for one in arguments), "--json"]) == 0
    assert keys <= json.loads(capsys.readouterr().out).keys()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_options_and_files(shell, capsys):
    pytest.importorskip("shtab", reason="the extra [completion] is not installed")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "quickstart" in script
    assert "max-new-tokens" in script


def test_bash_can_read_its_completion(capsys, tmp_path):
    pytest.importorskip("shtab", reason="the extra [completion] is not installed")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    main(["completion", "bash"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    asks = f'source {script}; COMP_WORDS=(prefixvlm quick); COMP_CWORD=1; _shtab_prefixvlm; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", asks], capture_output=True, text=True)
    assert done.stdout.split() == ["quickstart"], done.stderr
