"""Batches: what is supervised, what is noised, and what augmentation may change."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_processor

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.noise import special_token_ids

PROCESSOR = tiny_processor()
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


def sample(*turns, images=1):
    return Conversation.about([Image.new("RGB", (16, 16), (9 * i, 0, 0)) for i in range(images)], list(turns), "row 1")


def supervised_text(batch, row):
    labels = batch["labels"][row]
    return PROCESSOR.decode(labels[labels != -100])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4))  # a blank answer is none
def test_conversation_labels_are_the_answers_and_their_end_tokens(pairs):
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    batch = ConversationCollator(PROCESSOR, "conversation")([sample(*turns), sample(("user", "a"), ("assistant", "b"))])
    expected = "".join(answer + "<|im_end|>" for _, answer in pairs)
    assert supervised_text(batch, 0) == expected
    assert supervised_text(batch, 1) == "b<|im_end|>"


@settings(max_examples=40, deadline=None)
@given(TEXT.filter(str.strip))  # a blank caption is none, and reported before
def test_caption_labels_are_the_whole_caption_and_its_end(caption):
    batch = ConversationCollator(PROCESSOR, "caption")(
        [sample(("user", ""), ("assistant", caption)), sample(("user", ""), ("assistant", "x" * 30))]
    )
    assert supervised_text(batch, 0) == caption + "<|endoftext|>"
    assert (batch["input_ids"][0] == PROCESSOR.image_token_id).sum() == PROCESSOR.num_image_tokens
    # image first, padding last and never supervised, though the end token is also the padding token
    assert (batch["input_ids"][0, : PROCESSOR.num_image_tokens] == PROCESSOR.image_token_id).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_typed_end_of_text_is_a_word_and_no_end():
    batch = ConversationCollator(PROCESSOR, "caption")([sample(("user", ""), ("assistant", "a <|endoftext|> b"))])
    assert supervised_text(batch, 0) == "a <|endoftext|> b<|endoftext|>"
    assert (batch["labels"] == PROCESSOR.tokenizer.eos_token_id).sum() == 1


def test_noise_hits_a_fifth_of_the_text_and_nothing_else():
    samples = [sample(("user", ""), ("assistant", "word " * 50)), sample(("user", ""), ("assistant", "w " * 20))] * 20
    clean = ConversationCollator(PROCESSOR, "caption")(samples)
    noised = ConversationCollator(PROCESSOR, "caption", noise=0.2, seed=1)(samples)
    assert torch.equal(clean["labels"], noised["labels"])
    assert torch.equal(clean["attention_mask"], noised["attention_mask"])
    changed = clean["input_ids"] != noised["input_ids"]
    assert torch.equal(changed, noised["is_noised"])
    assert noised["input_ids"][changed].unique().numel() == 1
    special = torch.isin(clean["input_ids"], torch.tensor(sorted(special_token_ids(PROCESSOR.tokenizer))))
    assert not (changed & (special | (clean["attention_mask"] == 0))).any()
    text = ~special & clean["attention_mask"].bool()
    share, count = (changed.sum() / text.sum()).item(), text.sum().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / count) ** 0.5


def test_same_seed_same_noise():
    samples = [sample(("user", ""), ("assistant", "word " * 20))]
    first, again, other = (
        ConversationCollator(PROCESSOR, "caption", noise=0.2, seed=seed)(samples)["is_noised"] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padding_samples_alone_make_a_batch_without_images_or_labels():
    for text_format in ("caption", "conversation"):
        padding = sample(("user", "q"), ("assistant", "a"), images=3).as_padding_sample()
        for max_tokens_per_row in (0, 50):
            collator = ConversationCollator(PROCESSOR, text_format, max_tokens_per_row=max_tokens_per_row)
            batch = collator([padding, padding])
            assert "pixel_values" not in batch
            assert (batch["labels"] == -100).all()


def test_augmentation_turns_and_mirrors_pictures():
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    turns = [("user", "q"), ("assistant", "a")]
    original = ConversationCollator(PROCESSOR, "conversation")([Conversation.about([image], turns)])["pixel_values"][0]
    eight = [lay.rot90(k, dims=(-2, -1)) for lay in (original, original.flip(-1)) for k in range(4)]
    collator = ConversationCollator(PROCESSOR, "conversation", augment=True)
    seen = set()
    for _ in range(60):
        batch = collator([Conversation.about([image], turns)])
        seen.add(next(i for i, lay in enumerate(eight) if torch.equal(lay, batch["pixel_values"][0])))
    assert seen == set(range(8))


def test_a_sample_with_a_seed_comes_out_the_same_in_any_batch():
    samples = [replace(sample(("user", "q" * n), ("assistant", "word " * n)), seed=f"0.{n}") for n in range(1, 6)]
    options = {"noise": 0.3, "augment": True}
    together = ConversationCollator(PROCESSOR, "caption", seed=1, **options).encoded(samples)
    for expected, one in zip(together, samples, strict=True):
        (alone,) = ConversationCollator(PROCESSOR, "caption", seed=2, **options).encoded([one])
        assert torch.equal(alone.input_ids, expected.input_ids)
        assert torch.equal(alone.pixel_values, expected.pixel_values)
    (other,) = ConversationCollator(PROCESSOR, "caption", **options).encoded([replace(samples[-1], seed="1.5")])
    assert not torch.equal(other.input_ids, together[-1].input_ids)


def test_a_bad_image_is_named():
    bad = Conversation.about(["/no/such/picture.png"], [("user", "q"), ("assistant", "a")], "data.json, row 7")
    with pytest.raises(ValueError, match=r"data.json, row 7.*picture.png.*no such image file"):
        ConversationCollator(PROCESSOR, "conversation")([bad])


def test_images_without_a_user_turn_are_refused():
    with pytest.raises(ValueError, match="row 1: the conversation has images"):
        ConversationCollator(PROCESSOR, "conversation")([sample(("assistant", "a"))])
