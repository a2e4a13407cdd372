"""In what order samples are seen: shuffled or grouped by length, the same in every process and after every interruption."""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

from prefixvlm.train.data.conversation import Conversation


class OrderedSamples(Dataset):
    """Samples asked for by (epoch, index, is_padding_sample), each with the seed of its own randomness.

    Args:
        samples: a sequence of `Conversation`s.
        indices: of the samples to train on.
        lengths: tokens of each of `indices`, to group them by; `None` to shuffle regardless of length.
        seed: for the order and the samples' own randomness.
        failed: seeds of samples that failed before the run was interrupted. Padding samples replace them again, even if
            their images can be read now.
    """

    def __init__(
        self, samples, indices: list[int], lengths: list[int] | None, seed: int, failed: Collection[str] = frozenset()
    ):
        self.samples, self.indices, self.lengths, self.seed = samples, indices, lengths, seed
        self.failed = failed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int, bool]) -> Conversation:
        epoch, index, is_padding_sample = key
        sample = self.samples[self.indices[index]]
        sample = replace(sample, seed=f"{self.seed}.{epoch}.{index}")
        return sample.as_padding_sample() if is_padding_sample or sample.seed in self.failed else sample


class EpochSampler(Sampler):
    """The keys of an `OrderedSamples` in the order of epoch `epoch`.

    Args:
        samples: the data set.
        batch_size: samples per optimiser step, of similar length if they are grouped.
        multiple: padding samples follow the last sample until the count is a multiple of this (processes times device
            batch), so that every process has as many full batches as the others and no sample counts twice.
    """

    def __init__(self, samples: OrderedSamples, batch_size: int, multiple: int):
        self.samples, self.batch_size, self.multiple = samples, batch_size, multiple
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.samples) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        generator = torch.Generator().manual_seed(self.samples.seed * 1_000_003 + self.epoch)
        if self.samples.lengths is None:
            order = torch.randperm(len(self.samples), generator=generator).tolist()
        else:
            order = self._grouped(self.samples.lengths, generator)
        padding = itertools.islice(itertools.cycle(order), len(self) - len(order))
        yield from ((self.epoch, index, False) for index in order)
        yield from ((self.epoch, index, True) for index in padding)

    def _grouped(self, lengths: list[int], generator: torch.Generator) -> list[int]:
        """Batches of similar length in random order: transformers' go from long to short, over and over, and where the
        length says something about the content, a model learns that order instead.

        The first stays the one with the longest sample, which shows at once whether memory suffices.
        """
        order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        first, *others = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        last = [others.pop()] if others and len(others[-1]) < self.batch_size else []
        shuffled = [others[place] for place in torch.randperm(len(others), generator=generator).tolist()]
        return [index for batch in (first, *shuffled, *last) for index in batch]


class StreamedSamples(IterableDataset):
    """The encoded samples of an endless stream; each is read by exactly one process and worker.

    Args:
        stream: a `Stream` or `MixedStream`.
        encode: takes a `Conversation`, gives what is yielded, and raises a ValueError if it cannot be trained on.
        report: called with the name and the reason of each sample of the first epoch that cannot, and with `read`, the
            number that this worker has read.
        seed: for the order and the samples' own randomness.
        rank, processes: the index of this process, and how many there are.
    """

    def __init__(self, stream, encode: Callable, report: Callable, seed: int, rank: int = 0, processes: int = 1):
        self.stream, self.encode, self.report, self.seed = stream, encode, report, seed
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.processes * workers, self.rank + self.processes * own
        for epoch in itertools.count():
            read = usable = 0
            for index, (name, make) in enumerate(self.stream.epoch(f"{self.seed}.{epoch}.{reader}", reader, readers)):
                read += 1
                try:
                    sample = self.encode(replace(make(), seed=f"{self.seed}.{epoch}.{reader}.{index}"))
                except ValueError as error:
                    if epoch == 0:
                        self.report(name, str(error), read=read)
                    continue
                usable += 1
                yield sample
            if not usable:
                raise ValueError(
                    f"The stream has no usable sample for each of {readers} readers; use fewer processes or workers."
                )
