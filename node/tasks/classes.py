"""Training data by class, so that they can be dealt out unevenly.

The classes of examples with labels are these labels. Text has none: its classes are sections, so many pieces
of equal length, one after the other. Corpora are in the order of their documents (files by name, topics by
name), so that neighbours are alike, and sections less so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Piece:
    """What stands in [start, stop) of a class, in the units of `Classes.sizes`."""

    number: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Classes:
    """`names`, `sizes`: of each class, in `unit`s. `taken`: these pieces as `Task.load` takes a corpus.
    `held_out`: what is evaluated on, of every class as much as it is of all."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    unit: str
    taken: Callable[[Sequence[Piece]], bytes]
    held_out: bytes


@runtime_checkable
class Divisible(Protocol):
    """What a task has besides whose training data can be dealt out by class."""

    def divide(self, n_sections: int) -> Classes:
        """At the coordinator. From now on `held_out` gives some of every class. `n_sections`: of data without
        labels. Raises ConfigError."""
        ...


@dataclass(frozen=True, slots=True)
class Section:
    """Of a row: [start, border) is trained on, [border, stop) held out."""

    start: int
    border: int
    stop: int

    @property
    def n_trained(self) -> int:
        return self.border - self.start


def sections(size: int, n_held_out: int, n: int) -> list[Section]:
    """`n` of equal length, as even as can be; each holds out its share, from its end."""
    ends = [size * i // n for i in range(n + 1)]
    held_out = [n_held_out * i // n for i in range(n + 1)]
    return [
        Section(start, stop - (h1 - h0), stop)
        for (start, stop), (h0, h1) in zip(pairwise(ends), pairwise(held_out), strict=True)
    ]


def section_names(n: int) -> tuple[str, ...]:
    return tuple(f"section {i + 1}" for i in range(n))
