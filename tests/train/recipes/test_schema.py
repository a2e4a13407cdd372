"""Recipes are strict: what is not understood is refused, naming the file and the key."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixvlm.train.recipes.schema import Recipe, StageRecipe, load_recipe, parse_recipe
from prefixvlm.train.recipes.stages import PAPER_STAGES, Stage

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
        (changed(report_to="wandb"), "report_to is 'wandb'"),
        (changed(model={"start": "x", "visoin": "y"}), "model: unknown key visoin"),
        (changed(model={"vision": "x"}), "model needs `start`, or `vision` and `text`"),
        (changed(model=[]), "model must be a mapping"),
        (changed(stages={}), "`stages` must map"),
        (changed(stages={4: {"data": {"source": "llava"}}}), "stages has the key 4"),
        (changed(stages={"2": {"data": {"source": "llava"}}}), "stages has the key '2'"),
        (changed(stages={2: []}), "stages.2 must be a mapping"),
        (changed(stages={2: {}}), "stages.2: the key data is missing"),
        (changed(stages={2: {"data": {}}}), "stages.2.data needs a `source`"),
        (changed(stages={2: {"data": {"source": "llava"}, "epoch": 2}}), "stages.2: unknown key epoch"),
        (changed(stages={2: {"data": {"source": "llava"}, "epochs": "two"}}), "stages.2.epochs is 'two'"),
        (changed(stages={2: {"data": {"source": "llava"}, "epochs": -1}}), "stages.2: Stage 2: epochs"),
        (changed(stages={2: {"data": {"source": "llava"}, "device_batch_size": 0}}), "device_batch_size must be positive"),
        (changed(stages={2: {"data": {"source": "llava"}, "number": 3}}), "stages.2: unknown key number"),
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
    known = {f.name for cls in (Recipe, StageRecipe, Stage) for f in dataclasses.fields(cls)}
    known |= {"start", "vision", "text", "tokenizer", "image_mean", "image_std", "config", "dtype"}
    if key in known:
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
