"""The order of an epoch: a shuffle or groups of similar lengths, the same for the same seed, nothing lost."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.order import EpochSampler, OrderedSamples


def ordered(count: int, lengths=None, seed: int = 0) -> OrderedSamples:
    samples = [
        Conversation.about(["a.png"], [("user", ""), ("assistant", str(index))], f"row {index}") for index in range(count)
    ]
    return OrderedSamples(samples, list(range(count)), lengths, seed)


def order(sampler: EpochSampler, epoch: int = 0) -> list[int]:
    sampler.epoch = epoch
    return [index for _, index, is_padding_sample in sampler if not is_padding_sample]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.booleans(), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_every_sample_comes_once_and_padding_samples_make_up_the_multiple(count, grouped, batch_size, multiple, epoch):
    sampler = EpochSampler(ordered(count, list(range(count)) if grouped else None), batch_size, multiple)
    sampler.epoch = epoch
    keys = list(sampler)
    assert len(keys) == len(sampler)
    assert len(keys) % multiple == 0
    assert len(keys) - count < multiple
    assert sorted(index for _, index, is_padding_sample in keys if not is_padding_sample) == list(range(count))
    assert [is_padding_sample for _, _, is_padding_sample in keys] == [False] * count + [True] * (len(keys) - count)


def test_order_depends_on_seed_and_epoch_alone():
    one, again, other = (EpochSampler(ordered(50, seed=seed), 4, 1) for seed in (1, 1, 2))
    assert order(one, 3) == order(again, 3)
    assert len({tuple(order(one, epoch)) for epoch in range(5)} | {tuple(order(other))}) == 6


def test_grouped_batches_hold_similar_lengths():
    lengths = [(37 * index) % 101 for index in range(400)]
    sampler = EpochSampler(ordered(400, lengths), 8, 1)
    indices = order(sampler)
    batches = [[lengths[index] for index in indices[start : start + 8]] for start in range(0, 400, 8)]
    spread = [max(batch) - min(batch) for batch in batches[1:]]  # the first also holds the longest of all
    assert sum(spread) / len(spread) < 12  # of 100


def test_grouped_batches_come_in_no_order_of_length():
    lengths = [(37 * index) % 101 for index in range(405)]
    indices = order(EpochSampler(ordered(405, lengths), 8, 1))
    means = [sum(lengths[index] for index in indices[start : start + 8]) / 8 for start in range(0, 400, 8)]
    rising = sum(after > before for before, after in itertools.pairwise(means))
    assert 15 < rising < 35  # of 49; sorted ones would have none
    assert lengths[indices[0]] == max(lengths)  # what fits into memory shows in the first step
    assert len(set(indices)) == 405


def test_a_sample_has_a_seed_of_its_own_in_each_epoch():
    samples = ordered(3)
    seeds = {samples[(epoch, index, False)].seed for epoch in range(3) for index in range(3)}
    assert len(seeds) == 9
    assert samples[(1, 2, False)].seed == ordered(3)[(1, 2, False)].seed
    padding = samples[(0, 0, True)]
    assert padding.is_padding_sample
    assert not padding.images


def test_only_chosen_samples_are_seen():
    samples = OrderedSamples([Conversation(name=str(index)) for index in range(6)], [1, 4], None, 0)
    names = {samples[key].name for key in EpochSampler(samples, 2, 1)}
    assert names == {"1", "4"}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_the_epoch(workers):
    from torch.utils.data import DataLoader

    samples = ordered(5)
    sampler = EpochSampler(samples, 2, 1)
    for epoch in (0, 1):
        sampler.epoch = epoch
        loader = DataLoader(samples, sampler=sampler, batch_size=2, num_workers=workers, collate_fn=list)
        assert {sample.seed.split(".")[1] for batch in loader for sample in batch} == {str(epoch)}
