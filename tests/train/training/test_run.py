"""A recipe from end to end, on a tiny model: stages build on each other, and a failure leaves nothing half-written."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import save_tiny, tiny_tokenizer

from prefixvlm.inference.loading import load
from prefixvlm.train.data import easy_vqa
from prefixvlm.train.recipes.schema import ModelRecipe, load_recipe
from prefixvlm.train.recipes.stages import MODULES
from prefixvlm.train.training import run


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    whole = easy_vqa.questions_by_image
    monkeypatch.setattr(easy_vqa, "questions_by_image", lambda split: dict(list(whole(split).items())[:40]))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "out")}))
    return load_recipe(str(path), ["logging_steps=1"])


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_stages_build_on_each_other(recipe, tmp_path):
    last = run.run_recipe(recipe)
    output = tmp_path / "out"
    assert last == output / "stage-3"
    assert sorted(path.name for path in output.iterdir()) == ["screening", *(f"stage-{number}" for number in range(4))]
    for number in range(4):
        folder = output / f"stage-{number}"
        history = json.loads((folder / "history.json").read_text())
        losses = [entry for entry in history if "loss" in entry]
        assert len(losses) == 2
        assert ("loss_noised" in losses[0]) == (number == 0)
        assert (folder / "loss.png").stat().st_size > 1000
        assert (folder / "skipped.jsonl").read_text() == ""
        record = json.loads((folder / "run.json").read_text())
        assert record["samples"] == {"read": 40, "used": 40, "skipped": 0}
        assert record["versions"]["torch"] == torch.__version__
        assert record["settings"]["stage"]["stage"]["number"] == number
        assert {"command", "seed", "device", "data_fingerprint", "seconds", "steps"} <= record.keys()
        config = json.loads((folder / "config.json").read_text())
        assert config["attention_mode"] == ("prefix" if number else "bidirectional")
        assert config.get("use_cache", True)
        for name in (
            "README.md",
            "chat_template.jinja",
            "modeling_prefix_vlm.py",
            "preprocessor_config.json",
            "tokenizer.json",
        ):
            assert (folder / name).is_file()
    first, second, third = (weights(output / f"stage-{number}") for number in range(3))
    for name, weight in second.items():
        if not name.startswith("projector."):  # frozen in stage 1
            assert weight.equal(first[name]), name
    for module in MODULES:
        assert any(not third[name].equal(second[name]) for name in third if name.startswith(module))


def test_one_stage_alone_continues_and_repeats_bit_for_bit(recipe, tmp_path):
    output = tmp_path / "out"
    run.run_recipe(recipe, [0, 1])
    together = weights(output / "stage-1")
    run.run_recipe(recipe, [1], overwrite=True)
    alone = weights(output / "stage-1")
    assert together.keys() == alone.keys()
    assert not any(name.endswith(".partial") for name in map(str, output.iterdir()))
    run.run_recipe(recipe, [1], overwrite=True)
    assert all(weight.equal(alone[name]) for name, weight in weights(output / "stage-1").items())


def test_missing_predecessor_and_stage(recipe):
    with pytest.raises(ValueError, match=r"Stage 2 starts from .*stage-1, which does not exist; train stage 1 first"):
        run.run_recipe(recipe, [2])
    with pytest.raises(ValueError, match="no stage 7"):
        run.run_recipe(recipe, [7])


def test_a_failed_stage_keeps_the_old_output(recipe, tmp_path, monkeypatch):
    run.run_recipe(recipe, [0])
    before = weights(tmp_path / "out" / "stage-0")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(run.figures, "save_loss_curve", fail)
    with pytest.raises(OSError, match="disk full"):
        run.run_recipe(recipe, [0], overwrite=True)
    assert all(weight.equal(before[name]) for name, weight in weights(tmp_path / "out" / "stage-0").items())


def test_a_finished_stage_is_not_replaced_without_asking(recipe, tmp_path):
    run.run_recipe(recipe, [0])
    folder = tmp_path / "out" / "stage-0"
    before = weights(folder)
    recipe.seed = 1
    for stages in ([0], [0, 1]):
        with pytest.raises(
            ValueError, match=r"stage-0 is there already; choose another output, replace it with --overwrite"
        ):
            run.run_recipe(recipe, stages)
    assert all(weight.equal(before[name]) for name, weight in weights(folder).items())
    with pytest.raises(ValueError, match=r"^--resume keeps what --overwrite replaces; choose one of them\.$"):
        run.run_recipe(recipe, [0], resume=True, overwrite=True)
    run.run_recipe(recipe, [0], overwrite=True)
    assert not all(weight.equal(before[name]) for name, weight in weights(folder).items())


def test_a_replaced_stage_takes_those_that_came_from_it_along(recipe, tmp_path, monkeypatch):
    run.run_recipe(recipe, [0, 1, 2])

    def fail(*args, **kwargs):
        raise OSError("disk full")

    original = run.figures.save_loss_curve
    monkeypatch.setattr(
        run.figures, "save_loss_curve", lambda curves, path: (fail if "stage 1" in curves else original)(curves, path)
    )
    with pytest.raises(OSError, match="disk full"):
        run.run_recipe(recipe, [0, 1, 2], overwrite=True)
    # stage 1 is the old one no more, and --resume would keep stage 2
    assert sorted(path.name for path in (tmp_path / "out").glob("stage-?")) == ["stage-0"]


def test_a_finished_stage_keeps_its_checkpoints_as_models(recipe, tmp_path):
    recipe.save_steps = 1
    run.run_recipe(recipe, [0])
    checkpoint = tmp_path / "out" / "stage-0" / "checkpoint-1"
    left = {path.name for path in checkpoint.iterdir()}
    assert not left & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json"}
    assert {"model.safetensors", "config.json", "modeling_prefix_vlm.py", "tokenizer.json"} <= left
    assert load(str(checkpoint))[0].config.attention_mode == "bidirectional"


def test_random_weights_for_a_whole_model_are_refused(recipe):
    recipe.model = ModelRecipe(start="somewhere")
    with pytest.raises(ValueError, match=r"^--random-init is for recipes that name backbones"):
        run.run_recipe(recipe, random_init=True)


def test_tensorboard_that_is_missing_is_named_before_anything_runs(recipe, monkeypatch):
    recipe.report_to = "tensorboard"
    find_spec = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name.startswith("tensorboard") else find_spec(name))
    with pytest.raises(ValueError, match=r"^report_to: tensorboard needs tensorboard; run: pip install tensorboard$"):
        run.run_recipe(recipe)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("wand", r"^report_to is 'wand'; did you mean 'wandb'\?$"),
        (["tensorboard", "clearml"], "^report_to: clearml needs clearml; run: pip install clearml$"),
        ("flyte", "^report_to: flyte needs flytekit; run: pip install flytekit$"),
    ],
)
def test_a_reporter_that_cannot_be_had_is_named(recipe, given, sentence, monkeypatch):
    find_spec = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name in ("clearml", "flytekit") else find_spec(name))
    recipe.report_to = given
    with pytest.raises(ValueError, match=sentence):
        run.run_recipe(recipe)


def test_reporters_of_transformers_are_handed_on(recipe, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    recipe.report_to = ["tensorboard"]
    last = run.run_recipe(recipe, only=[0])
    assert list(last.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("key", ["tokenizer", "image_mean", "image_std"])
def test_pretrained_backbones_bring_their_own_tokenizer_and_scale(recipe, key):
    value = "some/tokenizer" if key == "tokenizer" else [0.5] * 3
    recipe.model = ModelRecipe(vision="some/encoder", text="some/decoder", **{key: value})
    with pytest.raises(ValueError, match=f"^model.{key} is for random weights"):
        run.run_recipe(recipe)


def test_batch_that_cannot_be_split(recipe):
    recipe.stages[0].device_batch_size = 3
    with pytest.raises(ValueError, match="a batch of 4 cannot be split into device batches of 3"):
        run.run_recipe(recipe, [0])


def test_several_gpus_need_a_process_each(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"This machine has 3 GPUs; start one process for each"):
        run.training_arguments(recipe.stages[0], recipe, "out")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stage_says_what_its_data_were_found_to_be(tmp_path, capsys, streaming):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    talk = [{"role": "user", "content": "<image>and<image>"}, {"role": "assistant", "content": "both"}]
    rows = [{"images": ["a.png", "a.png"], "messages": talk}] * 3 + [{"images": ["a.png"], "messages": talk}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "streaming": streaming}
    values = {**SMALL, "output": str(tmp_path / "out"), "max_skipped": 0.5}
    values["stages"] = {0: SMALL["stages"][0], 3: {**SMALL["stages"][3], "data": data}}
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    values["model"] = {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    run.run_recipe(load_recipe(str(tmp_path / "recipe.yaml")), [0, 3])
    record = json.loads((tmp_path / "out" / "stage-3" / "run.json").read_text())
    said = capsys.readouterr().out
    if streaming:
        assert record["data"] == "messages"
        assert "Stage 3: a stream of messages, prefix attention" in said
    else:
        assert (record["data"], record["images"]) == ("messages (messages, images)", 6)
        assert "Stage 3: 3 samples of messages (messages, images) (1 cannot be used, see skipped.jsonl), 6 images" in said


@pytest.mark.parametrize("mode", ["prefix", "prefix_all_images"])
def test_the_interleaved_recipe_trains_on_documents_and_then_on_talks(tmp_path, mode):
    (tmp_path / "images").mkdir()
    save_tiny(tmp_path / "start")
    for name in "ab":
        Image.new("RGB", (16, 16), "red" if name == "a" else "blue").save(tmp_path / "images" / f"{name}.png")
    images = [{"image_name": "b.png", "matched_text_index": 1}, {"raw_url": "https://x.org/a.png", "matched_text_index": 0}]
    docs = [{"text_list": ["First.", f"Number {number}."], "image_info": images} for number in range(4)]
    turns = [("user", "<image>\nWhat?"), ("assistant", "Red."), ("user", "And <image>?"), ("assistant", "Blue.")]
    talk = [{"role": role, "content": text} for role, text in turns]
    talks = [{"images": ["a.png", "b.png"], "conversations": talk, "id": number} for number in range(4)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in docs))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    changes = {"output": tmp_path / "out", "model.start": tmp_path / "start", "bf16": False, "workers": 0}
    for stage, name in ((2, "docs.jsonl"), (3, "talks.json")):
        where = {"data.path": tmp_path / name, "data.images": tmp_path / "images", "attention_mode": mode}
        changes |= {f"stages.{stage}.{key}": value for key, value in where.items()}
        changes |= {f"stages.{stage}.{size}": 2 for size in ("batch_size", "device_batch_size", "max_steps")}
        changes |= {f"stages.{stage}.{size}": 128 for size in ("max_length", "max_tokens_per_row")}
    run.run_recipe(load_recipe("interleaved", [f"{key}={value}" for key, value in changes.items()]))
    for stage, data in ((2, "interleaved (text_list, image_info)"), (3, "llava (conversations, images)")):
        record = json.loads((tmp_path / "out" / f"stage-{stage}" / "run.json").read_text())
        assert (record["data"], record["images"], record["steps"]) == (data, 8, 2)
        assert json.loads((tmp_path / "out" / f"stage-{stage}" / "config.json").read_text())["attention_mode"] == mode
