"""Payloads of bad contents: each passes `check`, or is meant not to, and is made of an honest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from ....compression.base import Compressor, Packed, Part, Payload, Turn
from ....compression.exact import exact_arithmetic
from ....optim.base import Strategy
from ....optim.decoupled import Decoupled
from ....optim.diloco import Diloco
from ....optim.parts import byte_code
from ....optim.spsa import CODES

LARGEST: Final = 2.0**58
"""What compressors pack is below this."""

Values = Callable[[Tensor], Tensor]


class Contents(Protocol):
    """What can be made of one honest payload. Nothing is changed in place."""

    def scaled(self, factor: float) -> Payload:
        """The same direction, so many times as far; a negative factor is the opposite one."""
        ...

    def random(self, factor: float, rng: np.random.Generator) -> Payload:
        """Normal noise of the honest payload's size, times the factor."""
        ...

    def constant(self, factor: float) -> Payload:
        """The same value everywhere, of the honest payload's size, times the factor."""
        ...

    def not_finite(self) -> Payload:
        """What `check` has to refuse."""
        ...


def contents_of(strategy: Strategy, turn: Turn, payload: Payload) -> Contents:
    """`payload`: an honest one of the strategy for that turn."""
    if isinstance(strategy, Decoupled | Diloco):
        parts = {p.name: p.part.entire for p in strategy.parameters_in_order()}
        return TensorContents(strategy.compressor, parts, turn, payload)
    return ProbeContents(payload)


@dataclass(frozen=True, slots=True)
class TensorContents:
    """Of strategies whose payloads are packed tensors. `parts`: every parameter's, by name."""

    compressor: Compressor
    parts: dict[str, Part]
    turn: Turn
    payload: Payload

    def scaled(self, factor: float) -> Payload:
        return self._packed(lambda x: x * factor)

    def random(self, factor: float, rng: np.random.Generator) -> Payload:
        def noise(x: Tensor) -> Tensor:
            drawn = rng.standard_normal(x.numel(), dtype=np.float32)
            return torch.from_numpy(drawn) * (factor * _size(x))

        return self._packed(noise)

    def constant(self, factor: float) -> Payload:
        return self._packed(lambda x: torch.full_like(x, factor * _size(x)))

    def disjoint(self, factor: float) -> Payload:
        """What nobody else sends, the same in every round: a value of the honest payload's size, times the
        factor, at elements where that has nothing. It changes its sign from one to the next: the coefficient
        of the highest frequency, where all elements have something."""

        def elsewhere(x: Tensor) -> Tensor:
            value = factor * _size(x) * (1.0 - 2.0 * (torch.arange(x.numel()) % 2))
            return torch.where(x == 0.0, value, 0.0) if bool((x == 0.0).any()) else value

        return self._packed(elsewhere)

    def not_finite(self) -> Payload:
        def filled(t: Tensor) -> Tensor:
            return torch.full_like(t, float("nan")) if t.is_floating_point() else t

        return {name: tuple(map(filled, packed)) for name, packed in self.payload.items()}

    def _packed(self, change: Values) -> Payload:
        made: dict[str, Packed] = {}
        for name, packed in self.payload.items():
            part = self.parts[name]
            with exact_arithmetic():
                x = self.compressor.decode([packed], [1.0], part, self.turn)
            changed = change(x).nan_to_num().clamp(-LARGEST, LARGEST)
            made[name] = self.compressor.pack(changed, part, self.turn)
        return made


@dataclass(frozen=True, slots=True)
class ProbeContents:
    """Of SPSA: a code for each probe, whose range ends at 2^15.75."""

    payload: Payload

    def scaled(self, factor: float) -> Payload:
        return self._coded([factor * g for g in self._gradients()])

    def random(self, factor: float, rng: np.random.Generator) -> Payload:
        size = factor * self._size()
        return self._coded([size * float(x) for x in rng.standard_normal(len(self._gradients()))])

    def constant(self, factor: float) -> Payload:
        return self._coded([factor * self._size() for _ in self._gradients()])

    def not_finite(self) -> Payload:
        """There is one code that stands for nothing at all."""
        return {CODES: (torch.full_like(self.payload[CODES][0], byte_code.NEGATIVE),)}

    def most(self, n_probes: int) -> Payload:
        """So many probes, each as large as a code can say."""
        return {CODES: (torch.full((n_probes,), byte_code.NEGATIVE - 1, dtype=torch.uint8),)}

    def _gradients(self) -> list[float]:
        return [byte_code.decode(code) for code in self.payload[CODES][0].tolist()]

    def _size(self) -> float:
        sizes = [abs(g) for g in self._gradients()]
        return sum(sizes) / len(sizes)

    def _coded(self, gradients: list[float]) -> Payload:
        codes = [byte_code.encode(g, 0) for g in gradients]
        return {CODES: (torch.tensor(codes, dtype=torch.uint8),)}


def _size(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
