"""Holding out: whole pictures, always the same ones, about as many samples as asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.held_out import hold_out
from prefixvlm.train.data.sources import InMemory, Mixture


def samples(pictures: list[int]) -> InMemory:
    """A sample of each of these pictures, which have numbers."""
    return InMemory(
        Conversation.about([f"{picture}.png"], [("user", ""), ("assistant", str(index))], f"row {index}")
        for index, picture in enumerate(pictures)
    )


def indices(part) -> list[int]:
    return [int(part[index].turns[1].text) for index in range(len(part))]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda pictures: len(set(pictures)) > 1),
    st.floats(0.01, 0.5),
    st.integers(0, 3),
)
def test_every_sample_is_in_one_part_and_every_picture_too(pictures, share, seed):
    whole = samples(pictures)
    try:
        training, held_out = hold_out(whole, share, seed)
        trained, held = indices(training), indices(held_out)
    except ValueError as error:
        assert "leaves none of its" in str(error)  # noqa: PT017
        return
    assert sorted(trained + held) == list(range(len(pictures)))
    assert trained
    assert not {pictures[index] for index in trained} & {pictures[index] for index in held}
    most = max(pictures.count(picture) for picture in pictures)
    assert max(1, share * len(pictures)) <= len(held) < share * len(pictures) + most
    assert [training.name(place) for place in range(len(training))] == [f"row {index}" for index in trained]


def test_data_share_and_seed_decide():
    first, again, other = (hold_out(samples(range(40)), 0.25, seed)[1] for seed in (0, 0, 1))
    assert indices(first) == indices(again) != indices(other)
    assert len(first) == 10
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert hold_out(samples(range(40)), 0.25, 0)[0].fingerprint != first.fingerprint


def test_the_same_pictures_are_held_out_of_other_rows_in_another_order():
    pictures = list(range(40))
    held = set(indices(hold_out(samples(pictures), 0.25, 0)[1]))
    backwards = hold_out(samples(pictures[::-1]), 0.25, 0)[1]
    assert {39 - index for index in indices(backwards)} == held


def test_a_mixture_that_repeats_a_small_source_holds_out_all_repetitions():
    mixed = Mixture([samples(range(5)), samples(range(100, 140))], [1, 1])
    training, held_out = hold_out(mixed, 0.3, 0)
    seen = [{part[index].images[0] for index in range(len(part))} for part in (training, held_out)]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("kind", ["bytes", "row", "pixels"])
def test_equal_pictures_are_one_picture_however_they_are_given(kind):
    def picture(number):
        data = bytes([number])
        return {"bytes": data, "row": {"bytes": data, "path": None}, "pixels": Image.new("RGB", (2, 2), (number, 0, 0))}[
            kind
        ]

    whole = InMemory(
        Conversation.about([picture(index % 4)], [("user", ""), ("assistant", str(index))], str(index))
        for index in range(12)
    )
    held = [int(sample.name) % 4 for sample in hold_out(whole, 0.25, 0)[1]]
    assert len(set(held)) == 1
    assert len(held) == 3


def test_rows_that_cannot_be_read_and_rows_without_a_picture_are_divided_too():
    class Rows(InMemory):
        def name(self, index):
            return str(index)

        def __getitem__(self, index):
            if index % 2:
                raise ValueError("broken")
            return super().__getitem__(index)

    whole = Rows(Conversation.about([], [("assistant", str(index))], str(index)) for index in range(20))
    training, held_out = hold_out(whole, 0.3, 0)
    assert len(held_out) == 6
    assert len(training) == 14


def test_one_picture_cannot_be_divided():
    training, _ = hold_out(samples([0] * 9), 0.1, 0)
    with pytest.raises(ValueError, match=r"a share of 0\.1 leaves none of its 1 pictures to train on"):
        len(training)
