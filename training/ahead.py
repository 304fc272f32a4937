"""Work that depends on a number alone, done before it is asked for, by processes that do nothing else.

A step's data (changed voices, spectra, codes) cost a processor more than the step costs a GPU. Because they depend on
the step's number and nothing else, any process may make them, in any order; they arrive in order, bit for bit as the
trainer would have made them. The same serves the sentences of a corpus and the shards of lessons.

Notes
- The processes are those of torch's DataLoader, forked: they share what the trainer has loaded. They touch no GPU.
- Nothing is drawn from torch's global generator, so that a run draws the same with and without them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

T = TypeVar("T")


def cores() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0))


def spare_cores() -> int:
    """Processes that a trainer may have beside itself: all cores but its own; none where there are no more than two."""
    return cores() - 1 if cores() > 2 else 0


def is_helper() -> bool:
    """Does this run in one of the processes? They show no progress of their own."""
    return get_worker_info() is not None


class _Made(Dataset[T]):
    """What a function makes of each number."""

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> T:
        return self.make(number)


def _as_it_is(made: T) -> T:
    return made


def made(make: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """What `make` makes of each number, in order; by `workers` processes, or by the caller's own without any.

    An error of `make` is raised when its number is due.
    """
    if not workers:
        yield from map(make, numbers)
        return
    yield from DataLoader(
        _Made(make, max(numbers, default=-1) + 1),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the seeds of the processes come out of the trainer's own draws
        multiprocessing_context="fork",
    )


class Ahead(Generic[T]):
    """The data of a run's steps: called with a step's number. Steps in a row are made ahead."""

    def __init__(self, make: Callable[[int], T], steps: int, workers: int) -> None:
        self.make, self.steps, self.workers = make, steps, workers
        self._next = -1
        self._made: Iterator[T] = iter(())

    def __call__(self, step: int) -> T:
        """The data of a step."""
        if not self.workers:
            return self.make(step)
        if step != self._next:  # the first of this run, which may go on anywhere
            self._made = made(self.make, range(step, self.steps), self.workers)
        self._next = step + 1
        return next(self._made)
