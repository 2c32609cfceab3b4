"""Decoupled momentum: DeMo (arXiv 2411.19870), FlexDeMo (arXiv 2502.06728). Per parameter and round:

    theta = theta (1 - lr wd)
    delta = beta delta + lr grad                  local momentum, never sent whole
    q     = select(delta)                         what the compressor packs, decoded
    delta = delta - alpha q                       what is sent leaves the momentum
    G     = mean of q over all counted offers
    theta = theta - lr sign(G), or without sign   theta = theta - G        (lr by rule: see `rules`)

`base = "adamw"`: delta = beta delta + grad, and sign(G) or G is the gradient of an AdamW whose moments are
replicated (parts/adamw.py). `replicate_every = n`: theta stays as it is for n steps of the momentum, then one
exchange. An offer that missed its commit goes back into the momentum: delta += beta^lag alpha q, once.

`overlap = 1`: the gradients of round r are taken before commit r - 1 is applied (parts/ahead.py), at the
weights after round r - 2 moved by the peer's own offer of round r - 1, as if it alone had counted. They come
to the momentum once the commit is applied, which has said what became of that offer.

A payload has what the compressor needs for every parameter, and 29 bytes of framing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from ..compression.base import Compressor, Fields, Packed, Part, Payload, Senders, Step, Target, Turn
from ..compression.errors import ConfigError
from ..compression.exact import exact_arithmetic, to_float32
from .auditing.evidence import Evidence
from .auditing.gradients import gradient_evidence
from .auditing.scores import cosines, mean_cosines, scored_parts
from .base import Draw, NamedParameters, Noise, Own, Parameter, Share, Strategy, refuse_names, wholes
from .facts import Facts, KnownUpdate
from .noise import noise_of
from .options import Number, Whole, keywords_of
from .parts.adamw import ENTRIES, AdamW
from .parts.ahead import Ahead
from .parts.clip import Weighing
from .parts.fused_send import FusedSend, Gain, has_fused_send
from .parts.gradients import MeanGradient, backward
from .parts.gradients_device import DeviceGradient, backward_at_once
from .parts.residual import Residual, refuse_other_packing
from .parts.sender_mean import senders_of
from .parts.updating import updating
from .robust.means import BY_COORDINATE, decode_mean
from .robust.options import NEW_RUNS, MeanOptions
from .robust.weights import n_moving, sender_floor_of, weighed
from .rules import DECOUPLED_RUNS, LrScale, sign_factor


@dataclass(frozen=True, kw_only=True)
class DecoupledOptions(MeanOptions):
    """Of a run's `[strategy]`, and keyword arguments of `Decoupled`."""

    compressor: Compressor
    """In a run's file a table: {name = "dct_topk", k = 32}."""

    lr: Annotated[float, Number(at_least=0)] = 3e-3
    """Learning rate; with sign, how far every element moves in a round (by rule: on average)."""
    lr_scale: LrScale = "none"
    """With sign and base sgd: by rule few elements that a round moves go farther, see `rules`."""
    beta: Annotated[float, Number(at_least=0, below=1)] = 0.999
    """What is left of the momentum after a step."""
    beta_warmup: Annotated[float, Number(at_least=0)] = 0.0
    """With W of it a peer's n-th step leaves n / (n + W) at the most: what it knew at the beginning fades."""

    alpha: Annotated[float, Number(at_least=0, at_most=1)] = 1.0
    """The share of what is sent that leaves the momentum."""

    sign: bool = True
    """Update by the sign of the mean, else by the mean itself."""
    weight_decay: Annotated[float, Number(at_least=0)] = 0.0
    """Of matrices and what has more dimensions, decoupled, times the learning rate."""
    accumulate: Annotated[int, Whole(1, 2**16)] = 1
    """Micro-batches per step of the momentum; `step()` without a closure has the gradients of as many as its
    loop gathered."""

    max_grad_norm: Annotated[float, Number(at_least=0)] = 0.0
    """L2 norm of the mean gradient; 0: no limit."""

    clip: Annotated[float, Number(at_least=1)] = 10.0
    """Without `bound`, and without sign: no offer counts for more than this many times the median L1 norm of
    the round."""

    base: Literal["sgd", "adamw"] = "sgd"
    """What the update is made by: the mean itself, or an AdamW whose moments are replicated."""
    weights: Literal["equal", "samples"] = "equal"
    """Offers count alike, or by their samples, up to twice their median (without `bound`: `clip` times)."""

    replicate_every: Annotated[int, Whole(1, 2**16)] = 1
    """Steps of the momentum in a round."""

    overlap: Annotated[int, Whole(0, 1)] = 0
    """1: a round's gradients are taken while the commit of the round before is under way, and offered as soon
    as it is there: a round takes as long as the longer one of the two."""

    adam_beta1: Annotated[float, Number(at_least=0, below=1)] = 0.9
    """Of `adamw`: what is left of the first moment."""
    adam_beta2: Annotated[float, Number(at_least=0, below=1)] = 0.999
    """Of `adamw`: what is left of the second moment."""
    adam_eps: Annotated[float, Number(above=0)] = 1e-8
    """Of `adamw`: added to the root of the second moment."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        if entries["mean"] == "senders" and not entries["sign"] and entries["base"] == "sgd":
            raise ConfigError("mean = 'senders' diverges without sign: use sign = true or mean = 'all'")
        is_plain = entries["sign"] and entries["base"] == "sgd" and entries["replicate_every"] == 1
        if entries["overlap"] and not is_plain:  # without sign an auditor would be moved by whatever is sent
            raise ConfigError("overlap = 1 needs base = 'sgd', sign = true and replicate_every = 1")


TESTED: Final[Mapping[str, Any]] = {"lr": 0.003, "weight_decay": 0.1, "compressor": {"name": "dense"}}


class Decoupled(Strategy):
    """See the module's docstring. Replicated: the parameters, for `adamw` also its moments and number of
    updates. Local: momentum and sends of open fate.

    Counters: `decays` of the momentum; `dropped_batches` whose loss or gradient was not finite; `unsent`, the
    steps of the momentum since the last exchange; `lost_sends` (see `Residual`).
    """

    facts: ClassVar[Facts] = Facts(
        options=DecoupledOptions,
        batches=("accumulate", "replicate_every"),
        batches_per_step=("accumulate",),
        changeable=("lr", "weight_decay", "max_grad_norm", "clip", "bound", "own_data_share"),
        in_runs={**NEW_RUNS, **DECOUPLED_RUNS},
        only_with={"overlap": ()},
        small_model={"lr": 3e-3},
        bytes_per_parameter=lambda _options: 12.0,  # and the momentum
        known_updates={
            "sign update": KnownUpdate(TESTED, 0x8EDBFF4D3FB665AA),
            "adamw update": KnownUpdate({**TESTED, "base": "adamw", "sign": False}, 0xF272736F1B853EB4),
        },
    )

    @keywords_of(DecoupledOptions)
    def __init__(self, named_parameters: NamedParameters, options: DecoupledOptions) -> None:
        self.compressor = options.compressor
        self._momentum = Residual(self, self.compressor, "momentum", self._kept)
        self._ahead = Ahead(self)
        super().__init__(named_parameters, options)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        refuse_other_packing(state_dict, self.compressor)
        super().load_state_dict(state_dict)

    def replicated_state(self, parameter: Parameter) -> dict[str, Tensor]:
        if self.option("base") == "sgd":
            return {}
        state = self.state[parameter.tensor]
        if "moment1" not in state:
            state.update(self._adamw().new_state(parameter.local))
        return {entry: state[entry] for entry in ENTRIES}

    def begin_state(self, parameter: Parameter) -> None:
        super().begin_state(parameter)
        self._momentum.of(parameter)

    def fields(self, turn: Turn | None = None) -> Fields:
        return {p.name: self.compressor.fields(p.part.entire) for p in self.parameters_in_order()}

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """`replicate_every` steps of the momentum, each from the mean gradient of `accumulate` micro-batches;
        packs what is selected of it, which thereby leaves it. Uses and clears the gradients."""
        losses: list[float] = []
        for parameter in self.parameters_in_order():
            # Proposed once more for the same round: what was packed before never counted.
            self._momentum.put_back(parameter, turn)
        self.n_ahead = 0
        if self.staleness and (found := self._ahead.take(turn.round)) is not None:
            return self._propose_ahead(*found, turn)
        if has_fused_send(self, self.compressor, self.parameters_in_order()):
            return self._propose_fused(draw, turn)
        n_micro = max(1, self.batches // self.option("replicate_every"))
        for _ in range(self.option("replicate_every")):
            gradient = MeanGradient(self.parameters_in_order(), self.ranks)
            for _ in range(n_micro):
                self.zero_grad(set_to_none=True)
                loss = backward(draw(), self.ranks)
                if gradient.take_in(loss):
                    losses.append(loss)
                else:
                    self.count("dropped_batches")
            self._step(gradient, turn)
        self.last_loss = sum(losses) / len(losses) if losses else None
        self.n_batches = self.option("replicate_every") * n_micro
        self.zero_grad(set_to_none=True)
        return self._send(turn)

    def _propose_fused(self, draw: Draw, turn: Turn) -> Payload:
        """`propose` where a kernel does the last step of the momentum, too: the host waits for a GPU once,
        for the payload and the losses."""
        parameters, n_steps = self.parameters_in_order(), int(self.option("replicate_every"))
        n_micro = max(1, self.batches // n_steps)
        losses: list[Tensor] = []
        for step in range(1, n_steps + 1):
            gradient = DeviceGradient(parameters, n_micro)
            for _ in range(n_micro):
                self.zero_grad(set_to_none=True)
                gradient.take_in(backward_at_once(draw()))
            losses += gradient.losses
            if step < n_steps:
                self.count("decays")
                scale = gradient.scale(self.option("max_grad_norm"))
                for p in parameters:
                    factor = scale * self._gain(p, turn)
                    gradient.add_to(self._momentum.of(p), p, self._beta(), factor)
        self.zero_grad(set_to_none=True)
        self.n_batches = n_steps * n_micro
        payload, values = self._send_fused(gradient, losses, turn)
        kept = [loss for loss in values if isfinite(loss)]
        self.last_loss = sum(kept) / len(kept) if kept else None
        self.count("dropped_batches", len(losses) - len(kept))
        return payload

    @property
    def staleness(self) -> int:
        return int(self.option("overlap"))

    def work_ahead(self, draw: Draw, turn: Turn, sent: Payload | None = None) -> bool:
        """A micro-batch of the next round."""
        if not self.staleness or self._ahead.is_done(turn.round + 1, self.batches):
            return False
        known = self._momentum.sent(self.parameters_in_order(), turn)
        with self.moved_by(known if sent is None else sent, turn):
            self._ahead.work(draw, turn.round + 1)
        return True

    @contextmanager
    def moved_by(self, sent: Payload | None, turn: Turn) -> Iterator[None]:
        """The weights as if this offer alone had counted: nearer to those after the commit."""
        if sent is None:
            yield
            return
        parameters = self.parameters_in_order()
        kept = [p.local.clone() for p in parameters]
        self._move([Share(turn.own_seed, 1, sent)], Weighing([1.0], [1.0]), turn)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(parameters, kept, strict=True):
                    p.local.copy_(before)

    def _propose_ahead(self, found: MeanGradient, n_batches: int, loss: float | None, turn: Turn) -> Payload:
        """From what `work_ahead` has found."""
        self.n_ahead = self.n_batches = n_batches
        self.last_loss = loss
        if has_fused_send(self, self.compressor, self.parameters_in_order()):
            gradient = DeviceGradient.of_mean(found, nan if loss is None else loss)
            return self._send_fused(gradient, gradient.losses, turn)[0]
        self._step(found, turn)
        return self._send(turn)

    def _send_fused(
        self, gradient: DeviceGradient, losses: Sequence[Tensor], turn: Turn
    ) -> tuple[Payload, list[float]]:
        """The last step of the momentum before an exchange, and the sending. Waits for it and the losses."""
        self.count("decays")
        parameters, n_decays = self.parameters_in_order(), self.counters["decays"]
        scale = gradient.scale(self.option("max_grad_norm"))
        gain = Gain(self._beta(), scale, lambda p: self._gain(p, turn), gradient.of)
        alpha = self.option("alpha")
        sending = FusedSend(
            self.compressor, parameters, self._momentum.of, gain, alpha, torch.stack(list(losses))
        )
        payload = sending.payload()
        self._momentum.keep(parameters, turn, n_decays, payload)
        return payload, sending.losses()

    def absorb_gradients(self, turn: Turn) -> bool:
        if self.counters.get("unsent", 0) + 1 >= self.option("replicate_every"):
            return False
        self._take_gradients(turn)
        self.count("unsent")
        return True

    def propose_from_grad(self, turn: Turn) -> Payload:
        self.counters.pop("unsent", None)
        self.n_batches = self.option("replicate_every")
        if has_fused_send(self, self.compressor, parameters := self.parameters_in_order()):
            gradient = DeviceGradient(parameters, n_batches=1)
            gradient.take_in(torch.zeros((), device=parameters[0].local.device))
            payload, (loss,) = self._send_fused(gradient, gradient.losses, turn)
            self.count("dropped_batches", not isfinite(loss))
            return payload
        self._take_gradients(turn)
        return self._send(turn)

    def _take_gradients(self, turn: Turn) -> None:
        gradient = MeanGradient(self.parameters_in_order(), self.ranks)
        if not gradient.take_in(loss=0.0):
            self.count("dropped_batches")
        self._step(gradient, turn)

    def _step(self, gradient: MeanGradient, turn: Turn) -> None:
        """One step of the momentum."""
        self.count("decays")
        scale = gradient.scale(self.option("max_grad_norm"))
        for parameter in self.parameters_in_order():
            factor = self._gain(parameter, turn) * scale
            gradient.add_to(self._momentum.of(parameter), parameter.name, self._beta(), factor)

    def _beta(self, n: int | None = None) -> float:
        """What is left of the momentum at its n-th step; None: at the last one that was counted."""
        beta, warmup = float(self.option("beta")), float(self.option("beta_warmup"))
        n = self.counters.get("decays", 0) if n is None else n
        return min(beta, n / (n + warmup)) if warmup > 0 else beta

    def _gain(self, parameter: Parameter, turn: Turn) -> float:
        """How often a gradient comes to the momentum."""
        return float(parameter.group["lr"]) * turn.lr_factor if self.option("base") == "sgd" else 1.0

    def _send(self, turn: Turn) -> Payload:
        n_decays, alpha = self.counters.get("decays", 0), self.option("alpha")
        return self._momentum.send(self.parameters_in_order(), turn, n_decays, alpha)

    def _kept(self, parameter: Parameter, n_decays: int) -> float:
        """alpha times every beta since: what would be left of a send if it had stayed in the momentum."""
        factor = float(self.option("alpha"))
        for n in range(n_decays, self.counters.get("decays", 0)):
            factor *= self._beta(n + 1)
        return factor

    def audit(
        self, payloads: Sequence[Payload], draw: Draw, turns: Sequence[Turn], n_batches: int
    ) -> list[Evidence | None]:
        """Against the gradient: of a momentum its fast part is sent, and that is mostly what is new."""
        return gradient_evidence(self, self.compressor, payloads, draw, turns[0], n_batches)

    def scored_parts(self, payloads: Sequence[Payload], turn: Turn) -> list[Payload]:
        return scored_parts(self.parameters_in_order(), payloads, turn.round)

    def scores(self, parts: Sequence[Payload], turn: Turn) -> list[float] | None:
        return mean_cosines(self.compressor, self.parameters_in_order(), parts, turn, turn.round)

    def cosines(self, payload: Payload, others: Sequence[Payload], turn: Turn) -> list[float] | None:
        return cosines(self.compressor, self.parameters_in_order(), payload, others, turn, turn.round)

    def noise(self, shares: Sequence[Share], turn: Turn) -> Noise | None:
        parameters = self.parameters_in_order()
        return noise_of(self.compressor, parameters, shares, turn, self.weighing, "momentum")

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        parameters = self.parameters_in_order()
        refuse_names(payload, [p.name for p in parameters])
        with exact_arithmetic():
            self.compressor.check_all(payload, wholes(parameters), turn)

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Large parameters one by one: scratch is a few times the largest one. No shares, no change."""
        parameters, signed = self.parameters_in_order(), self.option("sign")
        w = self.weighing = weighed(self, self.compressor, parameters, shares, turn, clips_norms=not signed)
        n_lost = 0
        for parameter in parameters:
            n_lost = self._momentum.settle(parameter, turn, own)
        self.count("lost_sends", n_lost)
        if shares and w.dilution != 0.0:
            self._move(shares, w, turn)

    def _move(self, shares: Sequence[Share], w: Weighing, turn: Turn) -> None:
        """The parameters, by the round's mean."""
        parameters = self.parameters_in_order()
        targets: list[Target] = []
        payloads = [s.payload for s in shares]
        by_mean, n_moved = self._moves_by_the_mean, n_moving(w)
        with exact_arithmetic():
            for parameter in parameters:
                theta = parameter.local
                if by_mean and theta.dtype == torch.float32 and theta.is_contiguous():
                    step = self._step_of(parameter, turn, w, n_moved)
                    targets.append(Target(theta.view(-1), parameter.part, parameter.name, step))
                else:
                    with updating(parameter, turn) as row:
                        self._update(parameter, row, payloads, w, turn)
            self.compressor.fused_update(targets, payloads, w.weights, turn, self._senders(w))

    @property
    def _moves_by_the_mean(self) -> bool:
        """Whether a round adds a multiple of the mean, or its signs, to the parameters."""
        by_mean = self.option("mean") == "all" or self.compressor.selects_its_own
        return bool(
            self.option("base") == "sgd" and by_mean and self.option("aggregate") not in BY_COORDINATE
        )

    def _senders(self, w: Weighing) -> Senders | None:
        floor = sender_floor_of(self)
        return None if floor is None else senders_of(w, floor)

    def _step_of(self, parameter: Parameter, turn: Turn, w: Weighing, n_moved: int) -> Step:
        lr = float(parameter.group["lr"]) * turn.lr_factor
        wd = parameter.group["weight_decay"] if parameter.decays else 0.0
        scale = to_float32(lr * self._times(parameter, n_moved)) if self.option("sign") else w.dilution
        return Step(scale, to_float32(1.0 - lr * wd), self.option("sign"))

    def _times(self, parameter: Parameter, n_moved: int) -> float:
        """What lr is to be taken times for a step by signs. `n_moved`: see `n_moving`."""
        if self.option("lr_scale") == "none":
            return 1.0
        return sign_factor(self.compressor, parameter.part, n_moved)

    def _update(
        self, parameter: Parameter, theta: Tensor, payloads: Sequence[Payload], w: Weighing, turn: Turn
    ) -> None:
        """One rounding per operation: no fused forms (`alpha=`, foreach)."""
        if self._moves_by_the_mean:
            step_ = self._step_of(parameter, turn, w, n_moving(w))
            target = Target(theta, parameter.part, parameter.name, step_)
            self.compressor.fused_update([target], payloads, w.weights, turn, self._senders(w))
            return
        lr = float(parameter.group["lr"]) * turn.lr_factor
        wd = parameter.group["weight_decay"] if parameter.decays else 0.0
        packs = [payload[parameter.name] for payload in payloads]
        step = self._mean(packs, w, parameter.part, turn, theta.device)
        if self.option("sign"):
            step.sign_()
        if self.option("base") == "adamw":
            step = self._adamw().step(self.replicated_state(parameter), step, lr)
        elif self.option("sign"):
            step.mul_(to_float32(lr * self._times(parameter, n_moving(w))))
        if wd != 0.0:
            theta.mul_(to_float32(1.0 - lr * wd))
        theta.sub_(step)

    def _mean(
        self, packs: Sequence[Packed], w: Weighing, part: Part, turn: Turn, device: torch.device
    ) -> Tensor:
        kind, floor = self.option("aggregate"), sender_floor_of(self)
        return decode_mean(kind, self.compressor, device, packs, w, part, turn, floor)

    def _adamw(self) -> AdamW:
        return AdamW(self.option("adam_beta1"), self.option("adam_beta2"), self.option("adam_eps"))
