"""SPSA with one byte per probe: Just One Byte (arXiv 2306.10015) on MeZO (arXiv 2305.17333).

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)          per probe: one batch, two forward passes
    send code(g)                                                 one byte
    theta = theta (1 - lr wd) - lr / n * sum over counted probes of decode(code(g)) * z       times m by rule

z is drawn from (the peer's seed of the round, probe number, parameter, element): seeds never travel. With
`shared_noise` it is drawn from the round's seed, and the g of all peers are added up before they meet z.
`lr_scale = "rule"`: m is how many probes a round is to have, see `rules`; lr is that of one probe.
A payload of n probes has n bytes and 32 of framing (34 at most, from 128 probes on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..compression.base import Field, Fields, Fill, Payload, Turn
from ..compression.errors import BadPayload, ConfigError
from ..compression.exact import exact_arithmetic, root, to_float32
from ..compression.kernels import kernels_for
from ..compression.numerics.noise import uniform_words, update_all_, update_pieces_
from ..compression.numerics.noise_layout import MAX_PROBES, NoiseKind, Piece, Purpose, Update
from .auditing.evidence import Evidence
from .auditing.probes import probe_evidence
from .base import Closure, Draw, NamedParameters, Own, Parameter, Round, Share, Strategy, refuse_names
from .facts import Facts, KnownUpdate
from .options import Number, Whole, keywords_of
from .parts import byte_code
from .parts.clip import Weighing, clip_limit, lower_median, relative, total, work_weights
from .parts.gradients import read_losses
from .parts.perturb import Direction, NotSubstituted, dry_run, evaluated
from .parts.subset import selected
from .parts.updating import updating
from .robust.means import BY_COORDINATE, statistic
from .robust.options import NEW_RUNS, BoundedOptions
from .robust.weights import terms_of
from .rules import SPSA_RUNS, LrScale

CODES = "codes"
"""The one entry of a payload: uint8 codes, in the order of the probes."""

MAX_BATCH_BYTES: Final = 1 << 14
"""Of payloads in a batch, for small models."""

MAX_BATCH_WORK: Final = 1 << 35
"""Parameters times payload bytes of a batch, for large ones. (16 probes are some 50 bytes.)"""


@dataclass(frozen=True, kw_only=True)
class SpsaOptions(BoundedOptions):
    """Of a run's `[strategy]`, and keyword arguments of `Spsa`."""

    lr: Annotated[float, Number(at_least=0)]
    """Learning rate: of a probe by rule (1e-6 for a large pretrained model), else of the mean."""
    lr_scale: LrScale = "none"
    """By rule it grows with the probes of a round, see `rules`: up to `probes` of every peer."""
    eps: Annotated[float, Number(above=0)] = 1e-3
    """How far a probe goes along z, to either side."""

    probes: Annotated[int, Whole(1, "max_probes")] = 16
    """Of this peer, in a round: each draws a batch and sends a byte."""

    max_probes: Annotated[int, Whole(1, MAX_PROBES)] = 4096
    """That a payload may carry."""

    weight_decay: Annotated[float, Number(at_least=0)] = 0.0
    """Of matrices and what has more dimensions, decoupled, times the learning rate."""
    clip: Annotated[float, Number(at_least=1)] = 10.0
    """No |g| counts for more than this many times the round's lower median of the peers' median |g| (without
    `bound`: than the median |g| of all probes)."""

    noise: NoiseKind = "sign"
    """What z is made of: +1 and -1, or normal numbers."""
    scale: Literal["mean", "sqrt"] = "mean"
    """What the sum over n probes is divided by: n, or the root of n as in the paper."""

    shared_noise: bool = False
    """All peers perturb along the same z in a probe, with batches of their own, as DeComFL does: that
    averages the noise of batches, else that of directions."""

    params: str = "*"
    """Which are trained, see `subset`; the rest stay what they are."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        if entries["scale"] == "sqrt" and entries["lr_scale"] == "rule":
            raise ConfigError("scale = 'sqrt' is a rule of its own: use lr_scale = 'none' with it")
        kind = entries["aggregate"]
        if kind == "mean" or (kind in BY_COORDINATE and entries["shared_noise"]):
            return
        if entries["shared_noise"]:
            raise ConfigError(f"aggregate = {kind!r}: spsa has mean, trimmed, median and vote")
        raise ConfigError(
            f"aggregate = {kind!r}: spsa has the mean alone, as every peer's directions are its own; with "
            "shared_noise = true also trimmed, median and vote"
        )


class Spsa(Strategy):
    """See the module's docstring. The replicated state is the parameters; there is no local state.

    The first `propose` makes a dry run, and raises NotSubstituted for a model that cannot be perturbed.
    Counters: `dropped_probes`, probes whose g was not finite.
    """

    facts: ClassVar[Facts] = Facts(
        options=SpsaOptions,
        batches=("probes",),
        fitted="probes",
        changeable=("lr", "weight_decay", "eps", "clip", "bound", "own_data_share"),
        in_runs={**NEW_RUNS, **SPSA_RUNS},
        small_model={"lr": 2e-3},
        bytes_per_parameter=lambda _options: 4.0,  # no gradients
        known_updates={"spsa update": KnownUpdate({"lr": 0.01, "weight_decay": 0.1}, 0x1D9C86B3E81B2A0E)},
    )
    needs_grad: ClassVar[bool] = False

    @keywords_of(SpsaOptions)
    def __init__(self, named_parameters: NamedParameters, options: SpsaOptions) -> None:
        self._is_first = True
        super().__init__(selected(named_parameters, options.params), options)

    # --------------------------------------------------------------------------------- local work

    def fields(self, turn: Turn | None = None) -> Fields:
        return {CODES: (Field(torch.uint8, self.option("max_probes")),)}

    def known_payload(self, fill: Fill, salt: int) -> Payload:
        return {CODES: (fill(torch.uint8, 5, salt) | 1,)}  # 0x80 is no code

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """Two evaluations per probe, each probe on a batch of its own. Parameters are not written to."""
        n, eps = self.batches, self.option("eps")
        words = uniform_words(turn.own_seed, Purpose.CODE, 0, n)
        pairs = self._pairs(draw, turn, n)
        if self._is_first and all(plus == minus for plus, minus in pairs):
            raise NotSubstituted(
                "no probe changed the loss: it does not depend on the parameters, or eps is too small"
            )
        self._is_first = False
        gradients = [(plus - minus) / (2 * eps) for plus, minus in pairs]
        kept = [(plus + minus) / 2 for (plus, minus), g in zip(pairs, gradients, strict=True) if isfinite(g)]
        self.last_loss = sum(kept) / len(kept) if kept else None
        self.count("dropped_probes", n - len(kept))
        codes = [byte_code.encode(g, int(word)) for g, word in zip(gradients, words, strict=True)]
        return {CODES: (torch.tensor(codes, dtype=torch.uint8),)}

    def audit(
        self, payloads: Sequence[Payload], draw: Draw, turns: Sequence[Turn], n_batches: int
    ) -> list[Evidence | None]:
        """The same probes once more, as many as a round of this run has; each payload has its own."""
        return [self._evidence(p, draw, turn) for p, turn in zip(payloads, turns, strict=True)]

    def _evidence(self, payload: Payload, draw: Draw, turn: Turn) -> Evidence | None:
        codes = payload[CODES][0].tolist()[: self.most_batches]
        pairs = self._pairs(draw, turn, max(1, len(codes)))
        again = [(plus - minus) / (2 * self.option("eps")) for plus, minus in pairs]
        return probe_evidence([byte_code.decode(code) for code in codes], again)

    def _pairs(self, draw: Draw, turn: Turn, n: int) -> list[tuple[float, float]]:
        """L(theta + eps z) and L(theta - eps z) of n probes."""
        seed = turn.shared_seed if self.option("shared_noise") else turn.own_seed
        # A GPU is given all forward passes before the first loss is read.
        losses = [loss for probe in range(n) for loss in self._losses(draw(), seed, probe)]
        means = read_losses(losses, self.ranks)
        return list(zip(means[::2], means[1::2], strict=True))

    def _losses(self, closure: Closure, seed: int, probe: int) -> tuple[Tensor, Tensor]:
        """L(theta + eps z) and L(theta - eps z)."""
        parameters, eps, kind = self.parameters_in_order(), self.option("eps"), self.option("noise")
        if self._is_first and probe == 0:
            dry_run(closure, parameters, Direction(kind, seed, probe, eps), self.ranks)
        ahead, behind = (Direction(kind, seed, probe, e) for e in (eps, -eps))
        plus = evaluated(closure, parameters, ahead)
        return plus, evaluated(closure, parameters, behind)

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        refuse_names(payload, [CODES])
        packed = payload[CODES]
        if len(packed) != 1 or packed[0].dtype != torch.uint8 or packed[0].ndim != 1:
            raise BadPayload("shape", "codes are one row of bytes")
        if packed[0].numel() > self.option("max_probes"):
            raise BadPayload("oversized", f"{packed[0].numel()} probes, {self.option('max_probes')} allowed")
        if bool((packed[0] == byte_code.NEGATIVE).any()):
            raise BadPayload("range", f"{byte_code.NEGATIVE:#x} is no code")

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Without a counted probe nothing changes, not even by weight decay."""
        self.apply_many([Round(shares, turn, own)])

    def apply_many(self, rounds: Sequence[Round]) -> None:
        """One pass over the parameters for all rounds: what a round adds depends on payloads alone."""
        steps = [step for r in rounds if (step := self._step(r))]
        if not steps:
            return
        alike: dict[tuple[float, float], list[Parameter]] = {}  # by (lr, weight decay)
        for parameter in self.parameters_in_order():
            lr = float(parameter.group["lr"])
            wd = float(parameter.group["weight_decay"]) if parameter.decays else 0.0
            alike.setdefault((lr, wd), []).append(parameter)
        for (lr, wd), parameters in alike.items():
            updates = [step.update(lr, wd) for step in steps]
            for parameter in self._updated_at_once(parameters, updates, steps):
                self._update(parameter, updates, steps)

    def _updated_at_once(
        self, parameters: Sequence[Parameter], updates: Sequence[Update], steps: Sequence[_Step]
    ) -> list[Parameter]:
        """On a GPU one launch for all float32 parameters, and one per round for those in bfloat16, which are
        rounded after it; on a CPU one call for all small ones. Returns those that are left."""
        pieces = {
            p.name: Piece(p.local, p.index, p.part.start)
            for p in parameters
            if p.local.is_contiguous() and kernels_for(p.local) != "torch"
        }
        wide = [p for p in pieces.values() if p.theta.dtype == torch.float32]
        halves = [p for p in pieces.values() if p.theta.dtype == torch.bfloat16]
        with exact_arithmetic():
            update_pieces_(wide, updates, self.option("noise"))
            for step, update in zip(steps, updates, strict=True):
                update_pieces_(halves, [update], self.option("noise"), step.turn.shared_seed)
        return [p for p in parameters if p.name not in pieces]

    def _update(self, parameter: Parameter, updates: Sequence[Update], steps: Sequence[_Step]) -> None:
        passes = [(steps[-1:], updates)]
        if parameter.local.dtype != torch.float32:  # is rounded after every round
            passes = [([step], [update]) for step, update in zip(steps, updates, strict=True)]
        for (last, *_), some in passes:
            with exact_arithmetic(), updating(parameter, last.turn) as theta:
                update_all_(theta, some, self.option("noise"), parameter.index, parameter.part.start)

    def batch_bytes(self) -> int:
        """A pass takes time for every parameter, and again for every probe: about a second in all, unless a
        single round takes longer."""
        n_params = sum(p.tensor.numel() for p in self.parameters_in_order())
        return min(MAX_BATCH_BYTES, MAX_BATCH_WORK // max(1, n_params))

    def _step(self, round: Round) -> _Step | None:
        """What a round's counted probes do; None without one."""
        shared_seed = round.turn.shared_seed if self.option("shared_noise") else None
        counted = list(_counted(round.shares, shared_seed))
        if self.option("bound") > 0.0:
            clipped, factor_S, n = self._bounded(round.shares, counted)
        else:
            self.weighing = None
            limit = clip_limit([abs(p.g) for p in counted], self.option("clip"))
            clipped = [p.with_g(min(max(p.g, -limit), limit)) for p in counted]
            factor_S, n = [1.0] * len(round.shares), float(len(counted))
        if n == 0.0:
            return None
        if shared_seed is None:
            terms = [(p.seed, p.number, p.g * factor_S[p.share]) for p in clipped]
        else:
            sums = _sums if self.option("aggregate") == "mean" else self._robust_sums
            terms = [(shared_seed, number, g) for number, g in sums(clipped, factor_S).items()]
        seeds, numbers, gradients = zip(*terms, strict=True)
        return _Step(
            np.array(seeds, dtype=np.uint64),
            np.array(numbers, dtype=np.int64),
            np.array(gradients, dtype=np.float64),
            _divisor(n, self.option("scale")) / self._times(counted, factor_S),
            round.turn,
        )

    def _times(self, probes: Sequence[_Probe], factor_S: Sequence[float]) -> float:
        """What lr is to be taken times."""
        if self.option("lr_scale") == "none":
            return 1.0
        if self.option("shared_noise"):
            return float(min(len({p.number for p in probes}), self.option("probes")))
        weight_S = [0.0] * len(factor_S)
        for p in probes:
            weight_S[p.share] += factor_S[p.share]
        return total(min(w, float(self.option("probes"))) for w in weight_S)

    def _robust_sums(self, probes: Sequence[_Probe], factor_S: Sequence[float]) -> dict[int, float]:
        """As `_sums`, of as many probes that all say what the statistic of the peers' g is."""
        numbers = list(dict.fromkeys(p.number for p in probes))
        column = {number: i for i, number in enumerate(numbers)}
        g_SP = torch.zeros(len(factor_S), len(numbers))
        sent_SP = torch.zeros(len(factor_S), len(numbers), dtype=torch.bool)
        for p in probes:
            g_SP[p.share, column[p.number]] = p.g
            sent_SP[p.share, column[p.number]] = True
        found = statistic(self.option("aggregate"), g_SP, factor_S, sent_SP).tolist()
        n = total(factor_S)
        return {number: g * n for number, g in zip(numbers, found, strict=True)}

    def _bounded(
        self, shares: Sequence[Share], counted: Sequence[_Probe]
    ) -> tuple[list[_Probe], list[float], float]:
        """The probes with their g clipped, what the g of each share is to be taken times, and how many probes
        all are to be taken for.

        A peer weighs as its probes, up to a limit, and shares that weight among them all. Unless all perturb
        along the same directions, two peers that send the same codes say different things: no copies.
        """
        sizes_S: list[list[float]] = [[] for _ in shares]
        for p in counted:
            sizes_S[p.share].append(abs(p.g))
        if not self.option("shared_noise"):
            shares = [replace(s, n_copies=1) for s in shares]
        # Within a peer the plain median: it is low already over few peers, and would cost honest ones.
        middle_S = [clip_limit(sizes, 1.0) for sizes in sizes_S]
        terms = terms_of(self)
        limit = self.option("clip") * lower_median(middle_S, shares, terms)
        n_S = [float(len(sizes)) for sizes in sizes_S]
        weight_S = work_weights(n_S, shares, terms)
        factor_S = [w / n if n else 0.0 for w, n in zip(weight_S, n_S, strict=True)]
        clipped = [p.with_g(min(max(p.g, -limit), limit)) for p in counted]
        norm_S, kept_S = [total(sizes) for sizes in sizes_S], [0.0] * len(shares)
        for p in clipped:
            kept_S[p.share] += abs(p.g) * factor_S[p.share]
        kept = tuple(k / norm if norm else 1.0 for k, norm in zip(kept_S, norm_S, strict=True))
        self.weighing = Weighing(weight_S, weight_S, 1.0, kept, relative(norm_S, shares, terms))
        return clipped, factor_S, total(weight_S)


@dataclass(frozen=True, slots=True)
class _Step:
    """A round's directions, in the ledger's order, with the sum of what g counts for after clipping."""

    seeds: npt.NDArray[np.uint64]
    numbers: npt.NDArray[np.int64]
    gradients: npt.NDArray[np.float64]
    divisor: float
    turn: Turn

    def update(self, lr: float, weight_decay: float) -> Update:
        """In float64, one rounding per operation as in Python floats; then rounded once to float32."""
        lr = lr * self.turn.lr_factor
        coefficients = (lr / self.divisor * self.gradients).astype(np.float32)
        return Update(self.seeds, self.numbers, coefficients, to_float32(1.0 - lr * weight_decay))


class _Probe(NamedTuple):
    """A probe with a code: the seed of its noise, its number, what it says, and whose share it is in."""

    seed: int
    number: int
    g: float
    share: int

    def with_g(self, g: float) -> _Probe:
        return _Probe(self.seed, self.number, g, self.share)


def _counted(shares: Sequence[Share], shared_seed: int | None) -> Iterator[_Probe]:
    """Every probe with a code, in the ledger's order."""
    for i, share in enumerate(shares):
        for probe, code in enumerate(share.payload[CODES][0].tolist()):
            if code != byte_code.NOTHING:
                seed = share.seed if shared_seed is None else shared_seed
                yield _Probe(seed, probe, byte_code.decode(code), i)


def _sums(probes: Sequence[_Probe], factor_S: Sequence[float]) -> dict[int, float]:
    """By the number of the direction, in the order of their first ones; summed in order in Python floats."""
    sums: dict[int, float] = {}
    for p in probes:
        sums[p.number] = sums.get(p.number, 0.0) + p.g * factor_S[p.share]
    return sums


def _divisor(n: float, scale: str) -> float:
    """n or its root."""
    return n if scale == "mean" else root(n)
