"""The noise of stage 0: what replaces a word, and that it differs between workers, epochs and samples."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from small_recipe import SMALL
from tiny import FIRST_WORD, tiny_model, tiny_processor, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from prefixvlm import PrefixVLMForConditionalGeneration
from prefixvlm.cli import main
from prefixvlm.inference.loading import load
from prefixvlm.train.data import Conversation, ConversationCollator, add_mask_token
from prefixvlm.train.recipes.schema import load_recipe

SAMPLES = [Conversation.about([], [("assistant", "word " * 30)], f"row {number}") for number in range(6)]


def with_mask_token():
    processor = tiny_processor()
    processor.tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return processor


def noise_in(processor, token: str) -> set[int]:
    collator = ConversationCollator(processor, "caption", noise=0.5, noise_token=token, seed=0)
    batch = collator(SAMPLES)
    return set(batch["input_ids"][batch["is_noised"]].tolist())


def test_each_kind_of_noise_is_what_it_says():
    plain, masked = tiny_processor(), with_mask_token()
    pad, mask = plain.tokenizer.pad_token_id, masked.tokenizer.mask_token_id
    assert noise_in(plain, "auto") == noise_in(plain, "pad") == noise_in(masked, "pad") == {pad}
    assert noise_in(masked, "auto") == noise_in(masked, "mask") == {mask}


def test_random_noise_is_many_words_and_never_a_control_token():
    processor = with_mask_token()
    processor.tokenizer.add_tokens(["<tool_call>"])
    found = noise_in(processor, "random")
    assert len(found) > 50
    assert min(found) >= FIRST_WORD
    assert max(found) < processor.tokenizer.mask_token_id


def test_a_token_that_is_not_there_is_refused():
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"no mask token to serve as noise.*add_mask_token"):
        ConversationCollator(processor, "caption", noise=0.2, noise_token="mask")
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        ConversationCollator(processor, "caption", noise=0.2, noise_token="pad")
    ConversationCollator(processor, "caption")  # which has no use for one


@pytest.mark.parametrize("spare", [False, True])
def test_a_mask_token_comes_with_its_embedding(tmp_path, spare):
    model, processor = tiny_model(), tiny_processor()
    if not spare:
        processor.tokenizer.add_tokens([f"<extra {index}>" for index in range(4)])  # all rows of the embeddings are taken
    rows = model.get_input_embeddings().num_embeddings
    add_mask_token(model, processor.tokenizer)
    assert processor.tokenizer.mask_token == "<|mask|>"
    assert model.get_input_embeddings().num_embeddings == rows + (not spare)
    model.save_pretrained(tmp_path)
    loaded = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.tensor([[processor.tokenizer.mask_token_id, 9, 8]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    before = len(processor.tokenizer)
    add_mask_token(model, processor.tokenizer)
    assert len(processor.tokenizer) == before


def masks(collator, workers: int, epochs: int = 2) -> list[tuple]:
    """Where the noise is in each sample of each epoch."""
    loader = DataLoader(SAMPLES, batch_size=1, collate_fn=collator, num_workers=workers)
    return [tuple(batch["is_noised"][0].tolist()) for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 3])
def test_noise_differs_by_worker_epoch_and_sample(workers, seed):
    collator = ConversationCollator(tiny_processor(), "caption", noise=0.3, seed=seed)
    torch.manual_seed(1)
    assert len(set(masks(collator, workers))) == 2 * len(SAMPLES)


@pytest.mark.parametrize("workers", [0, 2])
def test_noise_follows_from_torchs_seed(workers):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(masks(ConversationCollator(tiny_processor(), "caption", noise=0.3), workers))
    assert found[0] == found[1] != found[2]


def test_without_randomness_none_is_drawn():
    before = torch.get_rng_state()
    ConversationCollator(tiny_processor(), "caption")(SAMPLES)
    assert torch.get_rng_state().equal(before)


def trained(folder, workers: int, resume: str | None = None) -> dict[str, torch.Tensor]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
        learning_rate=1e-2,
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    collator = ConversationCollator(tiny_processor(), "caption", noise=0.3)
    trainer = Trainer(tiny_model(), arguments, train_dataset=SAMPLES, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_trainer_resumes_with_the_same_noise(tmp_path, workers):
    whole = trained(tmp_path / "whole", workers)
    resumed = trained(tmp_path / "resumed", workers, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_a_recipe_names_the_noise(tmp_path):
    rows = [{"texts": [f"a caption, number {index}"]} for index in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = {"source": "captions", "path": str(tmp_path / "rows.jsonl"), "allow_text_only": True}
    stage = {"data": data, "batch_size": 2, "device_batch_size": 2}
    stages = {0: {**stage, "noise_token": "mask"}, 1: stage}
    values = {"model": {**SMALL["model"], "tokenizer": str(tmp_path / "tokenizer")}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / "out")}))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    model, processor = load(str(tmp_path / "out" / "stage-1"))
    assert processor.tokenizer.mask_token == "<|mask|>"
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)


def test_bad_names_are_refused(tmp_path):
    for override, message in (
        ("stages.0.noise_token=eos", "stages.0.noise_token is 'eos'; choose one of auto, mask, pad, random"),
        ("stages.1.noise_token=pad", "noise_token is 'pad', but noise is 0"),
    ):
        with pytest.raises(ValueError, match="noise_token") as caught:
            load_recipe("quickstart", [override])
        assert message in str(caught.value)


def test_a_samples_own_seed_decides_whatever_the_worker():
    samples = [replace(sample, seed=f"0.{number}") for number, sample in enumerate(SAMPLES)]
    found = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = DataLoader(
            samples,
            batch_size=1,
            collate_fn=ConversationCollator(tiny_processor(), "caption", noise=0.3),
            num_workers=workers,
        )
        found.append([batch["is_noised"][0].tolist() for batch in loader])
    assert found[0] == found[1]
