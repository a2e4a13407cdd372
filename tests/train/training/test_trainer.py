"""The trainer: groups, schedule, freezing, and a loss that does not depend on how a batch is split."""

import dataclasses

import pytest
import torch
from tiny import random_batch, tiny_model
from transformers import Trainer, TrainingArguments

from prefixvlm.modeling_vlm import modeling_prefix_vlm
from prefixvlm.modeling_vlm.loss_prefix_vlm import head_and_loss
from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES
from prefixvlm.train.training.cost import training_flops
from prefixvlm.train.training.trainer import StageTrainer, _sample_lengths, cosine_with_floor, module_of


class Rows(torch.utils.data.Dataset):
    def __init__(self, model, count=8):
        batch = random_batch(model, [3 + 2 * (i % 4) for i in range(count)])
        labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 1), -100)
        self.rows = [
            {**{name: values[i] for name, values in batch.items()}, "labels": labels[i], "is_noised": labels[i] % 3 == 0}
            for i in range(count)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def stack_without_noise(rows):
    batch = stack(rows)
    del batch["is_noised"]
    return batch


def make_trainer(tmp_path, stage, collator=stack_without_noise, **arguments):
    model = tiny_model(stage.attention_mode)
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **{**options, **arguments}
    )
    return StageTrainer(model, stage, args, train_dataset=Rows(model), data_collator=collator)


@pytest.mark.parametrize("number", PAPER_STAGES)
def test_each_trainable_parameter_is_in_exactly_one_group(tmp_path, number):
    trainer = make_trainer(tmp_path, PAPER_STAGES[number])
    groups = trainer.create_optimizer().param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(trainable)
    for group in groups:
        assert group["lr"] == trainer.stage.learning_rates[group["module"]] > 0
        names = [trainable[id(p)] for p in group["params"]]
        assert {module_of(name) for name in names} == {group["module"]}
        plain = [name.endswith("bias") or "norm" in name for name in names]
        assert all(plain) if group["weight_decay"] == 0 else not any(plain)
        assert group["betas"] == (0.9, 0.999)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


def test_every_rate_ends_at_the_floor(tmp_path):
    trainer = make_trainer(tmp_path, dataclasses.replace(PAPER_STAGES[2], warmup=0.25))
    trainer.train()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(rates) == 2 * len(MODULES)
    assert rates == pytest.approx([1e-8] * len(rates), rel=1e-9)


def test_cosine_rises_falls_and_stays():
    assert [cosine_with_floor(step, 2, 10, 0.1) for step in (0, 1, 2)] == [0, 0.5, 1]
    assert cosine_with_floor(6, 2, 10, 0.1) == pytest.approx(0.55)
    assert cosine_with_floor(10, 2, 10, 0.1) == cosine_with_floor(99, 2, 10, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("number", PAPER_STAGES)
def test_frozen_modules_are_bit_identical_and_others_move(tmp_path, number):
    stage = dataclasses.replace(PAPER_STAGES[number], vision_tower_lr=PAPER_STAGES[number].vision_tower_lr * 100)
    trainer = make_trainer(tmp_path, stage)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {module: [] for module in MODULES}
    for name, parameter in trainer.model.named_parameters():
        moved[module_of(name)].append(not torch.equal(parameter, before[name]))
    for module, rate in stage.learning_rates.items():
        assert any(moved[module]) == (rate > 0), module


def test_batch_of_four_equals_two_batches_of_two(tmp_path):
    logs = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            PAPER_STAGES[2],
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    for other in logs[1:]:
        assert torch.tensor(other) == pytest.approx(torch.tensor(logs[0]), rel=2e-5)


def test_noised_and_clean_targets_are_logged_apart(tmp_path):
    trainer = make_trainer(tmp_path, PAPER_STAGES[0], collator=stack, max_steps=1, per_device_train_batch_size=8)
    batch = stack(trainer.train_dataset)
    model = trainer.model
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k not in ("is_noised", "labels")}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    asked, noised = batch["labels"][:, 1:] != -100, batch["is_noised"][:, 1:]
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss_noised" in entry)
    assert log["loss_noised"] == pytest.approx(losses[asked & noised].mean().item(), rel=1e-5)
    assert log["loss_clean"] == pytest.approx(losses[asked & ~noised].mean().item(), rel=1e-5)
    assert log["loss_noised"] != pytest.approx(log["loss_clean"], rel=1e-3)


def logged(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_gradient_norms_of_modules_are_those_before_clipping(tmp_path):
    model = tiny_model()
    batch = stack_without_noise(Rows(model).rows)
    model(**batch, use_cache=False).loss.backward()
    expected = {
        module: torch.stack([p.grad.norm() for p in getattr(model, module).parameters()]).norm().item()
        for module in MODULES
    }
    for limit in (1e-4, 1e4):
        stage = dataclasses.replace(PAPER_STAGES[2], max_grad_norm=limit)
        options = {"max_grad_norm": limit, "max_steps": 1, "per_device_train_batch_size": 8}
        (entry,) = logged(make_trainer(tmp_path, stage, **options))
        for module in MODULES:
            assert entry[f"grad_norm/{module}"] == pytest.approx(expected[module], rel=1e-4)


def test_frozen_modules_have_no_gradient_norm(tmp_path):
    entry = logged(make_trainer(tmp_path, PAPER_STAGES[1]))[0]
    assert [name for name in entry if name.startswith("grad_norm/")] == ["grad_norm/projector"]
    assert [name for name in entry if name.startswith("learning_rate/")] == ["learning_rate/projector"]


def test_throughput_counts_real_tokens_and_mfu_is_flops_over_time(tmp_path):
    trainer = make_trainer(tmp_path, PAPER_STAGES[2], max_steps=1, per_device_train_batch_size=8)
    trainer._peak_rate = 1e9
    batch = stack_without_noise(trainer.train_dataset.rows)
    (entry,) = logged(trainer)
    lengths = batch["attention_mask"].sum(dim=-1)
    seconds = 8 / entry["samples_per_second"]
    assert entry["tokens_per_second"] == pytest.approx(lengths.sum().item() / seconds, rel=1e-4)
    assert entry["real_token_share"] == pytest.approx(batch["attention_mask"].float().mean().item())
    trains = dict.fromkeys(MODULES, True)
    asked = (batch["labels"] != -100).sum().item()
    flops = training_flops(trainer.model, trains, 8, lengths.sum().item(), lengths.square().sum().item(), asked)
    assert entry["mfu"] == pytest.approx(flops / seconds / 1e9, rel=1e-4)
    assert 0 < entry["peak_memory_gib"] < 100


@pytest.mark.parametrize("packed", [False, True])
def test_samples_are_counted_by_their_own_lengths(packed):
    documents = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    mask = (documents > 0).long()
    lengths = _sample_lengths(mask, documents, documents if packed else None)
    assert sorted(lengths[lengths > 0].tolist()) == ([2, 3, 6] if packed else [5, 6])


@pytest.mark.parametrize("packed", [False, True])
def test_padding_samples_are_not_counted(packed):
    documents = torch.tensor([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    labels = torch.tensor([[-100, 7, -100, -100, -100], [-100, -100, -100, -100, -100]])
    lengths = _sample_lengths((documents > 0).long(), labels, documents if packed else None)
    assert lengths[lengths > 0].tolist() == [3 if packed else 5]


def test_evaluation_leaves_the_throughput_alone_and_gives_logits_to_metrics(tmp_path):
    shapes = []
    trainer = make_trainer(tmp_path, PAPER_STAGES[2], max_steps=1)
    trainer.compute_metrics = lambda found: shapes.append(found.predictions.shape) or {}
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    assert trainer._meter.sums["samples"] == 0
    assert shapes == [(8, trainer.train_dataset[0]["input_ids"].shape[0], trainer.model.config.text_config.vocab_size)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant must be",
        ),
    ],
)
def test_settings_that_train_something_else_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, PAPER_STAGES[2], **arguments)


def test_adapters_of_the_image_encoder_train_with_checkpointing_in_any_trainer(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r".*vision_tower.*\.(q_proj|fc1)")
    model = peft.get_peft_model(tiny_model(), config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        gradient_checkpointing=True,
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=Rows(model), data_collator=stack_without_noise).train()
    moved = [bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * 2
    assert all(moved)


def test_head_runs_on_supervised_positions_only(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, PAPER_STAGES[2], max_steps=1, per_device_train_batch_size=8)
    asked = sum(int((row["labels"][1:] != -100).sum()) for row in trainer.train_dataset)
    rows = []
    monkeypatch.setattr(
        modeling_prefix_vlm,
        "head_and_loss",
        lambda head, hidden, *others: rows.append(len(hidden)) or head_and_loss(head, hidden, *others),
    )
    trainer.train()
    assert rows == [asked]


def test_unknown_parameter_is_named():
    assert module_of("base_model.model.language_model.model.layers.0.lora_A.default.weight") == "language_model"
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        module_of("adapter.weight")
