"""Recipes are strict: what is not understood is refused, naming the file and the key."""

import math
import re
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixvlm.inference.loading import DTYPES, QUANTIZED
from prefixvlm.train.recipes.checking import Dtype, SettingsError
from prefixvlm.train.recipes.schema import (
    MIN_VOCAB_SIZE,
    STAGE_KEYS,
    LoraRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    load_recipe,
    parse_recipe,
)
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training.starting_model import train_tokenizer

MINIMAL = {"model": {"start": "somewhere"}, "stages": {2: {"data": {"source": "easy_vqa_captions"}}}}


def changed(**values):
    return {**MINIMAL, **values}


def test_paper_recipe_is_the_paper():
    recipe = load_recipe("paper")
    assert {number: settings.stage for number, settings in recipe.stages.items()} == PAPER_STAGES
    assert recipe.bf16
    assert recipe.model.config == {"projector_hidden_size": 8960}
    assert [s.data["path"] for s in recipe.stages.values()] == [
        "lmms-lab/LLaVA-ReCap-118K",
        "lmms-lab/LLaVA-ReCap-118K",
        "lmms-lab/LLaVA-ReCap-558K",
        "lmms-lab/LLaVA-NeXT-Data",
    ]
    for settings_ in recipe.stages.values():
        assert 128 % settings_.device_batch_size == 0


def test_quickstart_keeps_what_the_stages_are_made_of():
    for number, settings_ in load_recipe("quickstart").stages.items():
        paper, ours = PAPER_STAGES[number], settings_.stage
        assert (ours.attention_mode, ours.text_format, ours.noise, ours.min_lr) == (
            paper.attention_mode,
            paper.text_format,
            paper.noise,
            paper.min_lr,
        )
        assert [rate > 0 for rate in ours.learning_rates.values()] == [r > 0 for r in paper.learning_rates.values()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(lerning_rate=1), "unknown key lerning_rate"),
        (changed(seed="one"), "seed is 'one'"),
        (changed(seed=True), "seed is True"),
        (changed(bf16=1), "bf16 is 1"),
        (changed(report_to=3), "report_to is 3; it must be a list"),
        (changed(model={"start": "x", "visoin": "y"}), "model: unknown key visoin"),
        (changed(model={"vision": "x"}), "model needs `start`, or `vision` and `text`"),
        (changed(model=[]), "model must be a mapping"),
        (changed(stages={}), "`stages` must map"),
        (changed(stages={4: {"data": {"source": "llava"}}}), "stages has the key 4"),
        (changed(stages={"2": {"data": {"source": "llava"}}}), "stages has the key '2'"),
        (changed(stages={2: []}), "stages.2 must be a mapping"),
        (changed(stages={2: {}}), "stages.2.data is missing"),
        (changed(stages={2: {"data": {}}}), "stages.2.data needs a `source`"),
        (changed(stages={2: {"data": {"source": "llava"}, "epoch": 2}}), "stages.2: unknown key epoch"),
        (changed(stages={2: {"data": {"source": "llava"}, "epochs": "two"}}), "stages.2.epochs is 'two'"),
        (
            changed(stages={2: {"data": {"source": "llava"}, "epochs": -1}}),
            "stages.2.epochs is -1; it must be greater than 0",
        ),
        (
            changed(stages={2: {"data": {"source": "llava"}, "device_batch_size": 0}}),
            "device_batch_size is 0; it must be at least 1",
        ),
        (changed(stages={2: {"data": {"source": "llava"}, "number": 3}}), "stages.2: unknown key number"),
        (changed(stages={2: {"data": {"source": "llava"}, "stage": {}}}), "stages.2: unknown key stage"),
        (changed(stages={True: {"data": {"source": "llava"}}}), "stages has the key True"),
    ],
)
def test_bad_recipes_are_refused_by_key(values, message):
    with pytest.raises(ValueError, match=r"my\.yaml") as caught:
        parse_recipe(values, "my.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=12), st.sampled_from([(), ("model",), ("stages", 2)]))
def test_no_unknown_key_passes(key, place):
    if key in {*Recipe.model_fields, *ModelRecipe.model_fields, *StageRecipe.model_fields, *STAGE_KEYS}:
        return
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    target = values
    for part in place:
        target = target[part]
    target[key] = 1
    with pytest.raises(ValueError, match="unknown key"):
        parse_recipe(values)


def test_overrides_reach_stages_and_turn_into_numbers(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(str(path), ["stages.2.epochs=3", "stages.2.projector_lr=1e-4", "output=there", "seed=7"])
    assert recipe.stages[2].stage.epochs == 3
    assert recipe.stages[2].stage.projector_lr == 1e-4
    assert (recipe.output, recipe.seed) == ("there", 7)
    for bad in ("epochs", "=1", "seed.x=1", "stages.2.epochs=[", "stages.2.epoch=1"):
        with pytest.raises(ValueError, match=r"override|unknown key"):
            load_recipe(str(path), [bad])


def placed(path, value):
    """`MINIMAL`, as a text recipe would give it, with a value at a path of keys."""
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    target, (*path, last) = values, path
    for part in path:
        target = target.setdefault(part, {})
    target[last] = value
    return values


NAN, INFINITE = "it must be a finite number", (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        *(
            ((*place, key), value, NAN)
            for place, keys in {
                ("stages", 2): (
                    *("vision_tower_lr", "projector_lr", "language_model_lr", "noise", "epochs", "warmup", "min_lr"),
                    *("weight_decay", "beta1", "beta2", "max_grad_norm"),
                ),
                (): ("max_skipped", "feature_cache_gb"),
                ("lora",): ("dropout",),
            }.items()
            for key in keys
            for value in (*INFINITE, "nan", "-inf")
        ),
        (("model", "text"), {"hidden_size": 8, "rope": {"theta": math.nan}}, "model.text: rope.theta is nan"),
        (("model", "config"), {"projector_hidden_size": math.inf}, "model.config: projector_hidden_size is inf"),
        (("stages", 2, "data", "weight"), math.nan, "stages.2.data: weight is nan"),
        (("seed",), -1, "at least 0"),
        (("seed",), 2**32, "at most"),
        (("workers",), -1, "at least 0"),
        (("save_steps",), -5, "at least 0"),
        (("keep_checkpoints",), 1, "at least 2"),
        (("max_skipped",), -0.1, "at least 0"),
        (("max_skipped",), 1.1, "at most 1"),
        (("feature_cache_gb",), -1, "at least 0"),
        (("logging_steps",), 0, "at least 1"),
        (("output",), "", "must not be empty"),
        (("output",), 7, "output is 7; it must be text"),
        (("report_to",), "", "must not be empty"),
        (("model", "start"), "", "must not be empty"),
        (("model", "vision"), 7, "must be a name or a mapping"),
        (("model", "dtype"), "float31", "choose one of float32, bfloat16, float16"),
        (("model", "image_mean"), ["a", "b", "c"], "model.image_mean.0 is 'a'; it must be a number"),
        (("model", "image_mean"), [0.5, 0.5], "has 2 entries; it must have at least 3"),
        (("model", "image_mean"), [0.5] * 4, "has 4 entries; it must have at most 3"),
        (("model", "image_mean"), [0.5, 0.5, math.nan], NAN),
        (("model", "image_mean"), [0.5, 0.5, True], "must be a number"),
        (("model", "image_std"), [0.5, 0.5, 0], "greater than 0"),
        (("model", "image_std"), [0.5, 0.5, -0.5], "greater than 0"),
        (
            ("model", "tokenizer"),
            {"vocab_size": 3},
            f"model.tokenizer.vocab_size is 3; it must be at least {MIN_VOCAB_SIZE}",
        ),
        (("model", "tokenizer"), {"vocab_size": 300.0}, "whole number"),
        (("model", "tokenizer"), {"vocab": 300}, "choose one of vocab_size"),
        (("lora", "r"), 0, "at least 1"),
        (("lora", "alpha"), 0, "at least 1"),
        (("lora", "dropout"), 1.5, "less than 1"),
        (("lora", "modules"), [], "must have at least 1"),
        (("lora", "modules"), ["projektor"], "choose one of vision_tower, projector, language_model"),
        (("lora", "quantize"), "nf8", "choose one of nf4, int8"),
        (("stages", 2, "data", "source"), 7, "needs a `source`"),
        (("stages", 2, "device_batch_size"), 0, "at least 1"),
        (("stages", 2, "max_steps"), 0, "at least 1, or -1 for whole epochs"),
        (("stages", 2, "max_steps"), -2, "at least"),
        (("stages", 2, "max_tokens_per_row"), -1, "at least 0"),
        (("stages", 2, "max_length"), 0, "at least 1"),
        (("stages", 2, "expected_rows"), -1, "at least 1"),
        (("stages", 2, "augment"), 1, "true or false"),
        (("stages", 2, "attention_mode"), "prefx", "did you mean 'prefix'?"),
        (("stages", 2, "text_format"), "story", "choose one of caption, conversation"),
        (("stages", 2, "batch_size"), 0, "at least 1"),
        (("stages", 2, "batch_size"), 8.0, "whole number"),
        (("stages", 2, "projector_lr"), -1e-3, "at least 0"),
        (("stages", 2, "projector_lr"), True, "must be a number"),
        (("stages", 2, "min_lr"), 1e-2, "min_lr is 0.01; it must be at most the smallest learning rate, 5e-06"),
        (("stages", 2, "min_lr"), -1e-9, "at least 0"),
        (("stages", 2, "noise"), 1.0, "less than 1"),
        (("stages", 2, "warmup"), -0.1, "at least 0"),
        (("stages", 2, "epochs"), 0, "greater than 0"),
        (("stages", 2, "weight_decay"), -1, "at least 0"),
        (("stages", 2, "beta1"), 1, "less than 1"),
        (("stages", 2, "beta2"), -0.1, "at least 0"),
        (("stages", 2, "max_grad_norm"), -1, "at least 0"),
        (("stages", 2, "evaluation"), {"task": "easyvqa", "every_steps": 1}, "did you mean 'easy_vqa'?"),
        *(
            (("stages", 2, "evaluation"), {"task": "easy_vqa", "every_steps": 1, key: 0}, f"evaluation.{key} is 0; it must")
            for key in ("every_steps", "examples", "num_beams", "max_new_tokens", "batch_size")
        ),
    ],
)
def test_no_value_out_of_range_passes(path, value, says):
    with pytest.raises(ValueError, match=r"^my\.yaml: ") as caught:
        parse_recipe(placed(path, value), "my.yaml")
    assert says in str(caught.value)
    assert str(path[-1]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "key", "meant"),
    [
        ((), "max_skiped", "max_skipped"),
        (("model",), "visoin", "vision"),
        (("model", "config"), "atention_mode", "attention_mode"),
        (("lora",), "modul", "modules"),
        (("stages", 2), "epoch", "epochs"),
        (("stages", 2), "device_batchsize", "device_batch_size"),
        (("stages", 2, "evaluation"), "every_step", "every_steps"),
    ],
)
def test_unknown_keys_are_told_what_may_be_meant(path, key, meant):
    with pytest.raises(ValueError, match=f"unknown key {key}; did you mean '{meant}'"):
        parse_recipe(placed((*path, key), 1))


@pytest.mark.parametrize("key", [5, 1.5, True, None])
@pytest.mark.parametrize("place", [(), ("model",), ("lora",), ("stages", 2), ("stages", 2, "evaluation")])
def test_a_key_that_is_not_text_is_unknown(place, key):
    where = ".".join(map(str, ("my.yaml", *place))).replace("my.yaml.", "my.yaml: ")
    with pytest.raises(ValueError, match=rf"^{where}: unknown key {key}; choose one of"):
        parse_recipe(placed((*place, key), 1), "my.yaml")


@pytest.mark.parametrize("place", [("model", "config"), ("stages", 2, "data")])
def test_keys_of_what_others_read_are_text(place):
    where = ".".join(map(str, place))
    with pytest.raises(ValueError, match=rf"^my\.yaml: {where} has the key 5; keys must be text\.$"):
        parse_recipe(placed((*place, 5), 1), "my.yaml")


def test_recipe_names_are_told_too():
    with pytest.raises(ValueError, match="did you mean 'pathvqa'"):
        load_recipe("pathvqua")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "stages: {2: {epochs: 1, epochs: 2}}"])
def test_a_key_that_is_there_twice_is_refused(text, tmp_path):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"twice\.yaml is not valid YAML: the key \w+ is there twice"):
        load_recipe(str(tmp_path / "twice.yaml"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("stages.2.projector_lr=.nan", "stages.2.projector_lr is nan"),
        ("stages.2.max_steps=0", "stages.2.max_steps is 0"),
        ("stages.²=1", "unknown|stages has the key"),
        ("5=1", "unknown key 5"),
    ],
)
def test_overrides_are_checked_like_the_file(override, says, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError, match=says):
        load_recipe(str(tmp_path / "my.yaml"), [override])


def test_an_override_may_open_a_part_that_the_file_leaves_empty(tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**MINIMAL, "lora": None}))
    assert load_recipe(str(tmp_path / "my.yaml"), ["lora.r=4"]).lora == LoraRecipe(r=4)


def test_options_are_checked_like_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(str(tmp_path / "my.yaml"), ["output=there"], output="here", max_steps=3)
    assert (recipe.output, recipe.stages[2].max_steps) == ("here", 3)
    with pytest.raises(ValueError, match=r"my\.yaml: stages\.2\.max_steps is 0; it must be at least 1"):
        load_recipe(str(tmp_path / "my.yaml"), max_steps=0)


def test_a_value_that_is_set_later_is_checked_too():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(SettingsError, match=r"^workers is -1; it must be at least 0\.$"):
        recipe.workers = -1
    with pytest.raises(ValueError, match=r"^unknown key worker; did you mean 'workers'\?$"):
        recipe.worker = 1
    assert recipe.workers == 0


def test_names_are_those_of_what_reads_them():
    assert get_args(Dtype) == tuple(DTYPES)
    assert get_args(get_args(LoraRecipe.model_fields["quantize"].annotation)[0]) == tuple(QUANTIZED)
    size = len(train_tokenizer(["a"], 1))
    with pytest.raises(ValueError, match="is 260"):
        parse_recipe(changed(model={"vision": {}, "text": {}, "tokenizer": {"vocab_size": size - 1}}))
    parse_recipe(changed(model={"vision": {}, "text": {}, "tokenizer": {"vocab_size": size}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision", {"hidden_size": 8}),
        ("text", "some/decoder"),
        ("tokenizer", {"vocab_size": 300}),
        ("image_mean", [0.5] * 3),
        ("image_std", [0.5] * 3),
        ("image_size", 224),
        ("center_crop", True),
        ("config", {"projector_hidden_size": 8}),
    ],
)
def test_what_a_whole_model_already_has_is_not_given_again(key, value):
    with pytest.raises(ValueError, match=rf"^recipe: model has `start`, a whole model, and beside it {key}, which nothing"):
        parse_recipe(changed(model={"start": "somewhere", key: value}))
    nothing = {"config": {}, "center_crop": False}.get(key)
    parse_recipe(changed(model={"start": "somewhere", key: nothing, "dtype": "bfloat16"}))


@pytest.mark.parametrize("key", ["image_size", "center_crop"])
def test_pictures_of_random_weights_are_of_the_encoders_size(key):
    settings = {"vision": {}, "text": {}, "tokenizer": {"vocab_size": 300}, key: 1 if key == "image_size" else True}
    with pytest.raises(ValueError, match="model has image_size or center_crop, which are for a pretrained `vision`"):
        parse_recipe(changed(model=settings))


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("vision", {"hiden_size": 8}, "model.vision: unknown key hiden_size; did you mean 'hidden_size'?"),
        ("text", {"num_attn_heads": 8}, "model.text: unknown key num_attn_heads; did you mean 'num_attention_heads'?"),
        ("text", {"model_type": "llama", "mlp_bia": True}, "model.text: unknown key mlp_bia; did you mean 'mlp_bias'?"),
        ("text", {"model_type": "lama"}, "model.text: model_type is 'lama'; did you mean 'llama'?"),
        ("vision", {"image_size": 16, "patchsize": 8}, "model.vision: unknown key patchsize; did you mean 'patch_size'?"),
        ("text", {"eos_token_id": 3}, "model.text: eos_token_id comes from the tokenizer; leave it out."),
    ],
)
def test_fields_that_a_backbone_does_not_have_are_refused(part, values, says):
    model = {"vision": {}, "text": {}, "tokenizer": "some/tokenizer", part: values}
    with pytest.raises(ValueError, match=rf"^recipe: {re.escape(says)}"):
        parse_recipe(changed(model=model))


@pytest.mark.parametrize(
    "text",
    [
        {"rope_theta": 10_000.0, "rope_scaling": None, "attn_implementation": "eager", "dtype": "float32"},
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "mlp_bias": True},
        {"model_type": "gpt2", "n_embd": 8, "hidden_size": 8},
    ],
)
def test_fields_that_a_backbone_has_pass(text):
    model = {"vision": {"model_type": "clip_vision_model"}, "text": text, "tokenizer": "some/tokenizer"}
    assert parse_recipe(changed(model=model)).model.text == text


def test_the_attention_mode_is_that_of_the_stages():
    with pytest.raises(ValueError, match=r"model\.config: attention_mode is that of each stage; set it there"):
        parse_recipe(changed(model={"vision": {}, "text": {}, "config": {"attention_mode": "causal"}}))


def test_epochs_may_be_a_fraction():
    stages = {2: {**MINIMAL["stages"][2], "epochs": 2.5}}
    assert parse_recipe(changed(stages=stages)).stages[2].stage.epochs == 2.5


def test_files_that_are_no_recipe(tmp_path):
    broken = tmp_path / "broken.yaml"
    for text in ("a: [", "- 1", ""):
        broken.write_text(text)
        with pytest.raises(ValueError, match=r"broken.yaml"):
            load_recipe(str(broken))
    for missing in ("papr", str(tmp_path)):
        with pytest.raises(ValueError, match="There is no recipe"):
            load_recipe(missing)
