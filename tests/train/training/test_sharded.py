"""Several processes train as one does, and share the weights under FSDP, a stream's samples and an epoch's batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from small_recipe import SMALL
from tiny import tiny_model
from torch.utils.data import BatchSampler, DataLoader

import prefixvlm.train.recipes.schema
from prefixvlm.inference.loading import load
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.order import EpochSampler, OrderedSamples, StreamedSamples
from prefixvlm.train.training import lora

SCRIPT = Path(__file__).with_name("two_processes.py")
CONFIGS = Path(prefixvlm.train.recipes.schema.__file__).with_name("accelerate")
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText

for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    torch.save(model.state_dict(), f"{folder}/loaded.pt")
"""


def run(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2] / "helpers"), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What three steps leave in `one` process, in `two`, and in two with a `sharded` model; and recipes trained so."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump({**SMALL, "output": str(folder / "recipe")}))
    stage = {**SMALL["stages"][2], "attention_mode": "causal", "language_model_lr": 1e-2}
    adapters = {**SMALL, "stages": {2: stage}, "lora": {"r": 2, "merge": False}, "save_steps": 1}
    (folder / "lora.yaml").write_text(yaml.safe_dump({**adapters, "output": str(folder / "lora")}))
    validated = {**SMALL["stages"][2], "max_steps": 3, "validation": {"share": 0.01, "every_steps": 1}}
    for name in ("validated", "validated_alone", "validated_sharded"):
        values = {**SMALL, "stages": {2: validated}, "logging_steps": 1, "output": str(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    shards = str(CONFIGS / "fsdp2.yaml")
    jobs = {
        "one": (1, None, ["steps", str(folder / "one"), "4"]),
        "two": (2, None, ["steps", str(folder / "two"), "2"]),
        "sharded": (2, shards, ["steps", str(folder / "sharded"), "2"]),
        "recipe": (2, shards, ["train", str(recipe), "--stages", "0,2"]),
        "lora": (2, shards, ["train", str(folder / "lora.yaml")]),
        "validated_alone": (1, None, ["train", str(folder / "validated_alone.yaml")]),
        "validated": (2, None, ["train", str(folder / "validated.yaml")]),
        "validated_sharded": (2, shards, ["train", str(folder / "validated_sharded.yaml")]),
    }
    for name, job in jobs.items():
        values = dict(zip(("processes", "sharded_by", "arguments"), job, strict=True))
        (folder / f"{name}.json").write_text(json.dumps(values))
    run(SCRIPT, *(folder / f"{name}.json" for name in jobs))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_equal_one(trained, name):
    one, two = (json.loads((trained / folder / "history.json").read_text()) for folder in ("one", name))
    assert len(one) == 3
    for entry, other in zip(one, two, strict=True):
        norms = [key for key in entry if key.startswith("grad_norm")]
        assert len(norms) == 4
        for key in ("loss", *norms):
            assert other[key] == pytest.approx(entry[key], rel=2e-5), key


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    """The weights that a process without this package finds in what was saved."""
    folders = {name: trained / "sharded" / name for name in ("checkpoint-2", "final")}
    run("-c", LOAD, *folders.values(), HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")))
    return {name: torch.load(folder / "loaded.pt") for name, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint-2", "final"])
def test_what_shards_save_loads_through_the_auto_class(trained, loaded, name):
    weights, before = loaded[name], tiny_model().state_dict()
    for key, expected in load_file(trained / "one" / name / "model.safetensors").items():
        # a softmax does not see one bias of all keys, so its gradient is rounding, which Adam makes as large as any other
        if not key.endswith("k_proj.bias"):
            assert (expected - before[key]).abs().max() > 4e-6, key
            assert (weights[key] - expected).abs().max() < 1e-6, key


@pytest.mark.slow
def test_a_recipe_runs_sharded_stage_after_stage(trained):
    shapes = []
    for number in (0, 2):
        weights = load_file(trained / "recipe" / f"stage-{number}" / "model.safetensors")
        shapes.append({key: weight.shape for key, weight in weights.items()})
    assert shapes[0] == shapes[1]
    for number, mode in ((0, "bidirectional"), (2, "prefix")):
        config = json.loads((trained / "recipe" / f"stage-{number}" / "config.json").read_text())
        assert config["attention_mode"] == mode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validated", "validated_sharded"])
def test_the_held_out_loss_and_the_best_are_those_of_one_process(trained, name):
    losses, best = [], []
    for folder in (trained / "validated_alone" / "stage-2", trained / name / "stage-2"):
        history = json.loads((folder / "history.json").read_text())
        losses.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
        best.append(json.loads((folder / "run.json").read_text())["validation"]["best_step"])
        ended, kept = (load_file(path / "model.safetensors") for path in (folder, folder / f"checkpoint-{best[-1]}"))
        assert all(torch.equal(weight, kept[key]) for key, weight in ended.items())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert best == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".", "checkpoint-1"])
def test_adapters_of_a_sharded_model_load_in_their_mode(trained, name):
    folder = trained / "lora" / "stage-2" / name
    start, _ = load(str(trained / "lora" / "start"))
    before = {key: weight.clone() for key, weight in start.state_dict().items()}
    after = lora.merged(folder, start)
    assert after.config.attention_mode == "causal"
    changed = {key.split(".")[0] for key, weight in after.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed == {"projector", "language_model"}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads_the_launch_configurations(name, kind):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind
    assert path.read_text().startswith("# ")


class Numbers:
    """A stream of numbered samples, in the same order every epoch."""

    def __init__(self, count: int):
        self.count = count

    def epoch(self, seed: str, reader: int, readers: int):
        for number in range(reader, self.count, readers):
            yield str(number), lambda number=number: Conversation(name=str(number))


def refuse(name, reason, read):
    raise AssertionError(f"{name} cannot be read: {reason}")


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_a_stream_is_read_once(processes, workers):
    count, seen = 13, []
    for rank in range(processes):
        samples = StreamedSamples(Numbers(count), lambda sample: sample, refuse, 0, rank, processes)
        loader = iter(DataLoader(samples, batch_size=None, num_workers=workers))
        # a worker's first epoch is no longer than the stream, and workers take turns
        read = [next(loader) for _ in range(count * max(1, workers))]
        seen += [int(sample.name) for sample in read if sample.seed.startswith("0.0.")]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [24, 25, 31])
def test_every_sample_is_trained_once_an_epoch(processes, count):
    device_batch = 4
    samples = OrderedSamples([Conversation(name=str(index)) for index in range(count)], list(range(count)), None, 0)
    sampler = EpochSampler(samples, 2 * device_batch * processes, device_batch * processes)
    for epoch in (0, 1):
        sampler.epoch = epoch
        trained, sizes = [], []
        for rank in range(processes):
            shard = BatchSamplerShard(BatchSampler(sampler, device_batch, drop_last=False), processes, rank)
            batches = [[samples[key] for key in batch] for batch in shard]
            trained += [int(sample.name) for batch in batches for sample in batch if not sample.is_padding_sample]
            sizes.append([len(batch) for batch in batches])
        assert sorted(trained) == list(range(count))
        assert sizes == [[device_batch] * len(sizes[0])] * processes
