"""Training in random subspaces: intrinsic dimension (Li et al. 2018, arXiv 1804.08838). Per round:

    m = beta m + grad                             momentum of one peer, local
    y = P^T m                                     d numbers; what the format packs of them is sent
    Y = mean of y over the counted offers
    theta = theta (1 - lr wd) - lr P Y / |Y|

P has d columns of signs, one element for each of all parameters, drawn from the number of the round's period:
it stays for `reseed_every` rounds, in which the replica moves along d directions and no others; 0: for ever,
as in the paper, theta = theta_0 + P z. Y has length 1 in every round, so that lr says how far an element
moves, about, and no scale of a loss matters.

P is nowhere kept. Either use of it draws d directions for every parameter (as `spsa` with d probes does),
which takes time for both: this is for small models, and for adapters of large ones.

A payload has what the compressor needs for d numbers, and 29 bytes of framing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import frexp, ldexp
from typing import Annotated, ClassVar, Final, Literal

import torch
from torch import Tensor

from ..compression.base import Compressor, Fields, Part, Payload, Turn
from ..compression.exact import exact_arithmetic, root, to_float32
from ..compression.numerics.noise import noise, update_pieces_
from ..compression.numerics.noise_layout import Piece, Probe, Update
from .auditing.evidence import Evidence
from .auditing.gradients import audited_gradient, compared
from .auditing.scores import cosines, mean_cosines, scored_parts
from .base import Draw, NamedParameters, Noise, Own, Parameter, Share, Strategy, refuse_names
from .facts import Facts, KnownUpdate
from .noise import noise_of
from .options import Number, Whole, keywords_of
from .parts.clip import total
from .parts.gradients import MeanGradient, backward
from .parts.ranks import is_sharded
from .robust.means import decode_mean
from .robust.options import NEW_RUNS, BoundedOptions
from .robust.weights import weighed

NUMBERS: Final = "numbers"
"""The one entry of a payload: y, packed."""

MOST_NUMBERS: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SubspaceOptions(BoundedOptions):
    """Of a run's `[strategy]`, and keyword arguments of `Subspace`."""

    compressor: Compressor
    """Of the d numbers, which are alike in size: the dense one suits them."""

    lr: Annotated[float, Number(at_least=0)] = 3e-3
    """Learning rate: how far an element moves in a round, about."""

    dimension: Annotated[int, Whole(1, MOST_NUMBERS)] = 256
    """d: numbers that a peer sends in a round, and directions that it moves along."""
    reseed_every: Annotated[int, Whole(0, 2**24)] = 1
    """Rounds, after which others are drawn; 0: never."""

    beta: Annotated[float, Number(at_least=0, below=1)] = 0.9
    """What is left of the momentum after a round."""

    weight_decay: Annotated[float, Number(at_least=0)] = 0.0
    """Of matrices and what has more dimensions, decoupled, times the learning rate. It leaves the
    subspace."""

    accumulate: Annotated[int, Whole(1, 2**16)] = 1
    """Micro-batches in a round."""

    max_grad_norm: Annotated[float, Number(at_least=0)] = 0.0
    """L2 norm of the mean gradient; 0: no limit."""

    clip: Annotated[float, Number(at_least=1)] = 10.0
    """Without `bound`: no offer's L1 norm or samples count for more than this many times their median in the
    round."""

    weights: Literal["equal", "samples"] = "equal"
    """Offers count alike, or by their samples, up to twice their median (without `bound`: `clip` times)."""


class Subspace(Strategy):
    """See the module's docstring. Replicated: the parameters. Local: the momentum.

    Counters: `dropped_batches` whose loss or gradient was not finite.
    """

    facts: ClassVar[Facts] = Facts(
        options=SubspaceOptions,
        batches=("accumulate",),
        batches_per_step=("accumulate",),
        changeable=("lr", "weight_decay", "max_grad_norm", "clip", "bound", "own_data_share"),
        in_runs=NEW_RUNS,
        small_model={"lr": 3e-3},
        bytes_per_parameter=lambda _options: 20.0,  # and the momentum, the same in a row, a direction
        compressor={"name": "dense", "bits": 8},
        known_updates={
            "subspace update": KnownUpdate(
                {"dimension": 19, "weight_decay": 0.1, "compressor": {"name": "dense"}}, 0xB8192191D244FD12
            )
        },
    )

    @keywords_of(SubspaceOptions)
    def __init__(self, named_parameters: NamedParameters, options: SubspaceOptions) -> None:
        self.compressor = options.compressor
        super().__init__(named_parameters, options)

    def begin_state(self, parameter: Parameter) -> None:
        super().begin_state(parameter)
        self._momentum(parameter)

    def fields(self, turn: Turn | None = None) -> Fields:
        return {NUMBERS: self.compressor.fields(self._numbers().part)}

    def _numbers(self) -> Parameter:
        """The d numbers, for whom a payload is about parameters: on the device of the first one."""
        first = self.parameters_in_order()[0]
        return Parameter(NUMBERS, 0, first.tensor, Part.whole((int(self.option("dimension")),)), first.group)

    def _key(self, turn: Turn) -> int:
        """Of all directions of the round: the same for all who know its number."""
        every = int(self.option("reseed_every"))
        period = (turn.round - 1) // every if every else 0
        words = hashlib.blake2b(b"thinwire subspace %d" % period, digest_size=8).digest()
        return int.from_bytes(words, "little")

    def _starts(self) -> list[int]:
        """Where each parameter, as far as this rank holds it, begins in a row of all."""
        parameters = self.parameters_in_order()
        before = accumulate((p.part.n_global for p in parameters), initial=0)
        return [start + p.part.start for p, start in zip(parameters, before, strict=False)]

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """A step of the momentum by the mean gradient of `accumulate` micro-batches, which is projected and
        packed. Uses and clears the gradients."""
        gradient, losses = MeanGradient(self.parameters_in_order(), self.ranks), list[float]()
        for _ in range(self.batches):
            self.zero_grad(set_to_none=True)
            loss = backward(draw(), self.ranks)
            if gradient.take_in(loss):
                losses.append(loss)
            else:
                self.count("dropped_batches")
        self.last_loss = sum(losses) / len(losses) if losses else None
        self.n_batches = self.batches
        payload = self._send(gradient, turn)
        self.zero_grad(set_to_none=True)
        return payload

    def propose_from_grad(self, turn: Turn) -> Payload:
        gradient = MeanGradient(self.parameters_in_order(), self.ranks)
        if not gradient.take_in(loss=0.0):
            self.count("dropped_batches")
        return self._send(gradient, turn)

    @torch.no_grad()
    def _send(self, gradient: MeanGradient, turn: Turn) -> Payload:
        scale, beta = gradient.scale(self.option("max_grad_norm")), float(self.option("beta"))
        for p in self.parameters_in_order():
            gradient.add_to(self._momentum(p), p.name, beta, scale)
        y = self._projected(self._momentum, turn)
        return {NUMBERS: self.compressor.pack(y, self._numbers().part, turn)}

    def _momentum(self, parameter: Parameter) -> Tensor:
        """Flat float32, zero before its first use."""
        state = self.state[parameter.tensor]
        if "momentum" not in state:
            shape, device = parameter.local.shape, parameter.local.device
            state["momentum"] = torch.zeros(shape, dtype=torch.float32, device=device)
        momentum: Tensor = state["momentum"]
        return momentum.view(-1)

    def _projected(self, of: Callable[[Parameter], Tensor], turn: Turn) -> Tensor:
        """P^T of a vector of all parameters, of which `of` is what this rank holds: flat. On the CPU."""
        key, d = self._key(turn), int(self.option("dimension"))
        sums = torch.zeros(d, dtype=torch.float64)
        for start, row in self._rows(of):
            stop, device = start + row.numel(), row.device
            dots = [torch.dot(noise("sign", key, 0, i, start, stop, device), row) for i in range(d)]
            sums += torch.stack(dots).to(sums)
        return torch.tensor(self.ranks.sums(sums.tolist()), dtype=torch.float32)

    def _rows(self, of: Callable[[Parameter], Tensor]) -> list[tuple[int, Tensor]]:
        """The vector in as few rows as there are, with where they begin: drawing for many small tensors would
        take longer than for a large one. What every rank has whole is rank 0's."""
        rows: list[tuple[int, list[Tensor]]] = []
        end = -1
        for start, p in zip(self._starts(), self.parameters_in_order(), strict=True):
            if self.ranks.index > 0 and not is_sharded(p.tensor):
                continue
            piece = of(p)
            if start == end and rows[-1][1][0].device == piece.device:
                rows[-1][1].append(piece)
            else:
                rows.append((start, [piece]))
            end = start + piece.numel()
        return [(start, torch.cat(pieces)) for start, pieces in rows]

    def audit(
        self, payloads: Sequence[Payload], draw: Draw, turns: Sequence[Turn], n_batches: int
    ) -> list[Evidence | None]:
        """Against the gradient, projected as the payloads are."""
        y = self._projected(audited_gradient(self, draw, n_batches), turns[0])
        numbers = self._numbers()
        expected = y.to(numbers.local.device)
        return [
            compared(self.compressor, [numbers], payload, turns[0], lambda _: expected, self.ranks)
            for payload in payloads
        ]

    def scored_parts(self, payloads: Sequence[Payload], turn: Turn) -> list[Payload]:
        return scored_parts([self._numbers()], payloads, turn.round)

    def scores(self, parts: Sequence[Payload], turn: Turn) -> list[float] | None:
        return mean_cosines(self.compressor, [self._numbers()], parts, turn, turn.round)

    def cosines(self, payload: Payload, others: Sequence[Payload], turn: Turn) -> list[float] | None:
        return cosines(self.compressor, [self._numbers()], payload, others, turn, turn.round)

    def noise(self, shares: Sequence[Share], turn: Turn) -> Noise | None:
        return noise_of(self.compressor, [self._numbers()], shares, turn, self.weighing, "momentum")

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        refuse_names(payload, [NUMBERS])
        with exact_arithmetic():
            self.compressor.check(payload[NUMBERS], self._numbers().part, turn)

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """One pass over the parameters. Where nothing was sent nothing changes, not even by weight decay."""
        numbers, cpu = self._numbers(), torch.device("cpu")
        w = self.weighing = weighed(self, self.compressor, [numbers], shares, turn, clips_norms=True)
        if not any(w.weights):
            return
        packs = [share.payload[NUMBERS] for share in shares]
        with exact_arithmetic():
            kind = self.option("aggregate")
            mean = decode_mean(kind, self.compressor, cpu, packs, w, numbers.part, turn)
        if steps := _of_length_one(mean.tolist()):
            self._move(steps, turn)

    def _move(self, steps: Sequence[float], turn: Turn) -> None:
        """`steps`: along each direction, of a rate of 1."""
        alike: dict[tuple[float, float], list[tuple[Parameter, int]]] = {}  # by (lr, weight decay)
        for p, start in zip(self.parameters_in_order(), self._starts(), strict=True):
            lr = float(p.group["lr"]) * turn.lr_factor
            wd = float(p.group["weight_decay"]) if p.decays else 0.0
            alike.setdefault((lr, wd), []).append((p, start))
        key = self._key(turn)
        for (lr, wd), placed in alike.items():
            probes = [Probe(key, i, to_float32(lr * step)) for i, step in enumerate(steps)]
            update = Update.of(probes, to_float32(1.0 - lr * wd))
            rows = [(p.local, p.local.contiguous()) for p, _ in placed]
            pieces = [Piece(row, 0, start) for (_, row), (_, start) in zip(rows, placed, strict=True)]
            with exact_arithmetic():
                update_pieces_(pieces, [update], "sign", turn.shared_seed)
                for theta, row in rows:
                    if not theta.is_contiguous():
                        theta.copy_(row)


def _of_length_one(values: Sequence[float]) -> list[float]:
    """Of float32 values the same by L2 norm; nothing, if all are zero. In Python floats, so that it is the
    same on every machine."""
    largest = max(map(abs, values))
    if largest == 0.0:
        return []
    shift = -frexp(largest)[1]  # exact, and the sum of squares is one that `root` takes
    scaled = [ldexp(v, shift) for v in values]
    norm = root(total(v * v for v in scaled))
    return [v / norm for v in scaled]
