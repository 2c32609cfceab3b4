"""The contract of compressors: tensors to few bytes and back.

A compressor has to say what its packs look like (`fields`), make them (`pack`), refuse bad ones (`check`) and
read them (`decode`). All else has plain defaults, which compressors with kernels of their own replace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from .exact import exact_arithmetic
from .numerics.reduce import l1_norm

Array = npt.NDArray[Any]

Packed = tuple[Tensor, ...]
"""What a compressor makes of one parameter: 1-d CPU tensors, as `Compressor.fields` describes them."""

Payload = Mapping[str, Packed]
"""Parameter name -> its packed tensors."""


@dataclass(frozen=True, slots=True)
class Part:
    """The slice of a flattened parameter that a rank holds: elements [start, stop) of prod(shape)."""

    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        return cls(tuple(shape), 0, prod(shape))

    @property
    def entire(self) -> Part:
        """The whole parameter that this is a part of."""
        n = prod(self.shape)
        return self if self.start == 0 and self.stop == n else Part(self.shape, 0, n)

    @property
    def n_global(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @property
    def n_local(self) -> int:
        """Elements of this part."""
        return self.stop - self.start


def refuse_part(part: Part) -> None:
    """Raises ValueError unless the part is a whole parameter."""
    if part != Part.whole(part.shape):
        raise ValueError(f"packs whole parameters only, not [{part.start}, {part.stop}) of {part.shape}")


@dataclass(frozen=True, slots=True)
class Turn:
    """What a round fixes for everybody. Seeds are unsigned 64-bit, `lr_factor` is a float32 value.
    `n_rounds`: of the run, as it was known when the round opened; 0: nobody knows how many there will be."""

    round: int
    shared_seed: int
    own_seed: int
    lr_factor: float
    n_rounds: int = 0


@dataclass(frozen=True, slots=True)
class Field:
    """One packed tensor as a receiver expects it: 1-d, `dtype`, at most `n_elements` long.

    `n_elements` is also the length that a sender normally uses: only other lengths cost header bytes.
    """

    dtype: torch.dtype
    n_elements: int


Fields = Mapping[str, tuple[Field, ...]]
"""Parameter name -> what is expected for it; drives the decoding of a payload."""


Fill = Callable[[torch.dtype, int, int], Tensor]
"""Well-mixed values, the same on every machine: `fill(dtype, n_elements, salt)` is a row on the CPU of uint8,
or of finite float32 with denormal ones among them."""


@dataclass(frozen=True, slots=True)
class KnownDecoding:
    """A case of the self-test: what the mean of two packs, whose bits are fixed, decodes to.

    `options`: of the compressor. `answer`: unsigned 64-bit `parameter_sum` of the values.
    """

    options: Mapping[str, Any]
    answer: int


@dataclass(frozen=True, slots=True)
class Senders:
    """Of a mean over those that sent a coefficient: what each pack weighs among them, and what they weigh
    together at the least, above 0. float32 values."""

    weights: Sequence[float]
    least: float


@dataclass(frozen=True, slots=True)
class Step:
    """target = target * decay - scale * x, or scale * sign(x). Factors are float32 values."""

    scale: float = 1.0
    decay: float = 1.0
    sign: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What takes a step: `x`, contiguous flat float32, is this part of the parameter that payloads have under
    this name."""

    x: Tensor
    part: Part
    name: str
    step: Step


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be packed: all of a parameter, flat, on any device.

    For `fused_send` contiguous float32, and `gradient` comes to it `factor` times, if there is one.
    """

    part: Part
    x: Tensor
    gradient: Tensor | None = None
    factor: float = 0.0


@dataclass(frozen=True, slots=True)
class Moved:
    """A whole parameter before local training and after it, and what waits in error feedback: flat,
    contiguous float32 on the CPU."""

    part: Part
    leftover: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True, slots=True)
class Change:
    """Before packing x = decay x + scale factor gradient; after it x = x - alpha q, where q is what the pack
    says. `scale`: a float32 on the device; 0 leaves gradients out, whatever they are."""

    decay: float
    scale: Tensor
    alpha: float


class PendingPacks(Protocol):
    """Packs on their way to the host."""

    def packs(self) -> list[Packed]:
        """Waits for them. Raises ValueError for values that cannot be sent."""
        ...


@dataclass(frozen=True, slots=True)
class Entries:
    """The coefficients that one peer chose to send: E of them, rising in position, none twice.

    Positions count the compressor's coefficients, group by group; group g has the entries
    [offsets[g], offsets[g + 1]).
    """

    position_E: Array  # int64
    value_E: Array  # float32, exact
    offsets: Array  # int64, G + 1 of them


Reduce = Callable[[Sequence[tuple[Array, Array]], int], Tensor]
"""From everybody's entries among n positions, as (position in [0, n), value), to a float32 value per
position: exact, in the order of the peers."""


class Compressor(ABC):
    """Packs one flattened parameter and decodes the mean of what peers packed, or a rank's part of it.

    `turn.round` counts the rounds in which the parameter is sent: compressors that select by it come to every
    element that way.
    """

    __slots__ = ()

    known_decodings: ClassVar[Mapping[str, KnownDecoding]] = {}
    """The self-test's cases of `decode`, by the names that people are told."""

    selects_its_own: ClassVar[bool] = False
    """Whether every peer selects the coefficients that it sends; else all send the same ones."""

    @abstractmethod
    def fields(self, part: Part) -> tuple[Field, ...]:
        """The packed tensors of this parameter as a receiver expects them, `n_elements` being the most."""

    @abstractmethod
    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Local, may be inexact. `x`: float32, 1-d, a whole parameter; not changed. Result on the CPU.

        Raises ValueError for values that `check` would refuse.
        """

    @abstractmethod
    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        """Raises `BadPayload` for anything that `decode` must not see; as exact as `decode`."""

    def check_all(self, payload: Payload, parts: Mapping[str, Part], turn: Turn) -> None:
        """`check` of each of these in order, maybe sooner. Raises for the first bad one."""
        for name, part in parts.items():
            self.check(payload[name], part, turn)

    @abstractmethod
    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Exact: sum of w q over sum of w, in order. float32, 1-d, `part.n_local` long, never -0, on the CPU.

        Raises ValueError without packs, and for weights of which no mean can be taken.
        """

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Sum of the absolute values that `packed` stands for: exact, in no order, the same on any device.

        Of the whole parameter, whatever the part. Strategies without sign clip by it: `packed` was checked.
        """
        with exact_arithmetic():
            return l1_norm(self.decode([packed], [1.0], part.entire, turn))

    def magnitudes(
        self, payloads: Sequence[Payload], parts: Mapping[str, Part], turn: Turn
    ) -> list[list[float]]:
        """`magnitude` of each of these parameters in each of the payloads, maybe sooner."""
        return [
            [self.magnitude(payload[name], part, turn) for payload in payloads]
            for name, part in parts.items()
        ]

    def known_packed(self, fill: Fill, salt: int, part: Part) -> Packed:
        """Fixed bits that `check` accepts, for `known_decodings`; another pack for every salt.

        By default all elements that `fields` allows are filled.
        """
        return tuple(fill(f.dtype, f.n_elements, salt + i) for i, f in enumerate(self.fields(part)))

    def n_sent(self, part: Part) -> int:
        """Coefficients that a pack of the parameter holds if none of its groups is zero."""
        return part.n_global

    def moved_share(self, part: Part, n_packs: int) -> float:
        """About what share of a parameter's elements the mean of so many packs moves: in Python floats with
        + - * / only, the same on every machine."""
        return 1.0

    # ------------------------------------------------------------------------------- packing, local

    def pack_many(self, sources: Iterable[Source], turn: Turn) -> list[Packed]:
        """`pack` of each, maybe in fewer calls of kernels. Sources are made one by one, as they are taken."""
        return [self.pack(source.x, source.part, turn) for source in sources]

    def strongest(self, packed: Packed, part: Part, share: float) -> Packed:
        """Of what `pack` made about this share, above 0, of the coefficients: those that weigh most.

        All of it from compressors whose peers have to send the same coefficients.
        """
        return packed

    def has_fused_send(self, sources: Sequence[tuple[Part, Tensor]]) -> bool:
        """Whether `fused_send` takes these whole parameters. (Only their devices and shapes are looked
        at.)"""
        return False

    def fused_send(self, sources: Sequence[Source], change: Change) -> PendingPacks:
        """Takes gradients in, packs, and takes what was packed away again, in one read and one write.

        Changes every `source.x`, all on one device; the host waits for no GPU. Only after `has_fused_send`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fused send")

    def takes_moved(self) -> bool:
        """Whether there is a `send_moved`."""
        return False

    def send_moved(self, moved: Moved, decay: float) -> Packed:
        """leftover = decay leftover + (start - end) is packed, and what was packed is taken away again, in
        one pass; end = start. The bits of doing it step by step. Only after `takes_moved`.

        Raises ValueError for values that cannot be sent.
        """
        raise NotImplementedError(f"{type(self).__name__} sends step by step")

    # ------------------------------------------------------------------------------- receiving, exact

    def fused_update(
        self,
        targets: Sequence[Target],
        payloads: Sequence[Payload],
        weights: Sequence[float],
        turn: Turn,
        senders: Senders | None = None,
    ) -> None:
        """Exact: each target takes its step in place, x being what the payloads' packs `decode` to, or with
        `senders`, if the compressor `selects_its_own`, that of `decode_senders`.

        One rounding per operation: no fused multiply-add.
        """
        with exact_arithmetic():
            for t in targets:
                packs = [payload[t.name] for payload in payloads]
                x = self._mean_of(t, packs, weights, turn, senders)
                if t.step.sign:
                    x.sign_()
                if t.step.scale != 1.0:
                    x.mul_(t.step.scale)
                if t.step.decay != 1.0:
                    t.x.mul_(t.step.decay)
                t.x.sub_(x)

    def decode_on(
        self, device: torch.device, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn
    ) -> Tensor:
        """`decode` for whom the values are on a device, with the same bits."""
        return self.decode(packs, weights, part, turn).to(device)

    def _mean_of(
        self,
        t: Target,
        packs: Sequence[Packed],
        weights: Sequence[float],
        turn: Turn,
        senders: Senders | None,
    ) -> Tensor:
        if senders is not None:
            x = self.decode_senders(t.x.device, packs, weights, senders, t.part, turn)
            if x is not None:
                return x
        return self.decode(packs, weights, t.part, turn).to(t.x.device)

    def decode_senders(
        self,
        device: torch.device,
        packs: Sequence[Packed],
        weights: Sequence[float],
        senders: Senders,
        part: Part,
        turn: Turn,
    ) -> Tensor | None:
        """Exact, as `decode_on`, but that each coefficient has a divisor of its own: the sum of w q over the
        larger of `senders.least` and the sum of what its senders weigh, both in order.

        None where all peers send the same coefficients: their mean over the senders is the mean over all.
        """
        return None

    def entries(self, packed: Packed, part: Part) -> Entries | None:
        """The coefficients in a pack that was checked, of the whole parameter; None where all peers send the
        same ones, so that who sent them says nothing."""
        return None

    def decode_entries(self, entries: Sequence[Entries], reduce: Reduce, part: Part) -> Tensor:
        """Exact: what the coefficients stand for that `reduce` makes of everybody's. As `decode`, on the CPU.

        Only for compressors that have `entries`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no entries")
