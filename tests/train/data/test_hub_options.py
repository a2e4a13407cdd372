"""`revision`, `token` and `cache_dir` of data sets on the Hub: passed on, refused for files, and the secret never kept."""

import datasets
import pytest

from prefixvlm.train.data.sources import load, without_token
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.training import run, starting_model

HUB = {"revision": "draft", "token": "secret", "cache_dir": "cache"}


@pytest.fixture
def asked(monkeypatch) -> list:
    """What `datasets` is asked for."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        rows = datasets.Dataset.from_list([{"image": "a.png", "question": "q", "answer": "a", "texts": "t"}])
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("source", ["llava", "vqa", "captions"])
@pytest.mark.parametrize("streaming", [False, True])
def test_options_for_the_hub_reach_datasets(asked, source, streaming):
    samples = load(source, path="someone/data", streaming=streaming, **HUB)
    [(path, options)] = asked
    assert path == "someone/data"
    assert options.items() >= HUB.items()
    if streaming:  # its rows are known by their name alone
        others = load(source, path="someone/data", streaming=True)
        assert samples.fingerprint != others.fingerprint
        assert samples.fingerprint == load(source, path="someone/data", streaming=True, **HUB | {"token": "x"}).fingerprint


def test_they_are_refused_for_files(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"rows.json is on this machine; leave out revision"):
        load("vqa", path=str(tmp_path / "rows.json"), revision="draft")


def test_a_missing_folder_is_not_asked_for_on_the_hub(asked):
    with pytest.raises(ValueError, match=r"/nope: there is no such file or folder"):
        load("vqa", path="/nope")
    assert not asked


def test_a_token_is_in_no_record(asked):
    data = {"source": "vqa", "path": "someone/data", **HUB}
    overrides = [f"model.{name}={value}" for name, value in HUB.items()]
    validation = {"data": data, "every_steps": 1}
    recipe = load_recipe("pathvqa", [*overrides, f"stages.3.data={data}", f"stages.3.validation={validation}"])
    kept = run._settings(recipe, 3, load(**data), load(**data), False)
    assert kept["validation"]["data"]["revision"] == kept["stage"]["data"]["revision"] == "draft"
    kept = str(kept)
    assert "secret" not in kept
    assert without_token({"parts": [data]}) == {"parts": [{key: value for key, value in data.items() if key != "token"}]}


def test_those_of_a_recipes_model_reach_what_is_loaded(monkeypatch):
    seen = []
    monkeypatch.setattr(starting_model, "load_start", lambda start, dtype, **options: seen.append(options))
    recipe = load_recipe("pathvqa", [f"model.{name}={value}" for name, value in HUB.items()])
    starting_model.build(recipe.model, [])
    assert seen == [HUB]
