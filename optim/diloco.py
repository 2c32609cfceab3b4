"""DiLoCo (arXiv 2311.08105), Streaming DiLoCo (arXiv 2501.18512), SparseLoCo (2025). Per round:

    theta_i = theta after H inner steps on peer i           the inner optimizer's state stays there
    e     = decay e + theta - theta_i                       error feedback, local
    q     = select(e);  e = e - q                           what the compressor packs, decoded
    Delta = mean of q over the counted offers, weighted by their samples
    m     = mu m + Delta
    theta = theta - outer_lr (Delta + mu m)                 Nesterov; or m; or, with mu = 0, Delta

The replica is the outer parameters theta: outside of `propose` they are what the model has. An offer that
missed its commit goes back into e, as far as it would have decayed since.

Streaming: the parameters are dealt into `fragments`, and round r sends fragment (r - 1) mod fragments alone:
each one is synchronised after `fragments` times H inner steps, the others train on from where they are. A
fragment goes on from mix theta_i + (1 - mix) theta (alpha in the paper).

Overlap: while its offer travels a peer trains on, for `overlap` inner steps at most (tau), from its inner
parameters and with the round's learning rate. They are the first of the next round's H steps. The fragment
under way keeps the share `mix` of them, the others all. Only a swarm waits with time to spare: `step` blocks
in its collectives, and has no overlap.

SparseLoCo: compressor topk with 2 bits, the mean over the senders of a coefficient, feedback_decay 0.95,
outer_lr 1, outer_momentum 0: what new runs have with that compressor (see `rules`).
MuLoCo (arXiv 2505.23725): inner Muon, see `inner/muon`.
SCALLION, SCAFCOM (arXiv 2308.08165): control = "scaffold", for peers with uneven data, see `inner/control`.
What is not sent waits in the control variates then, not in e.

A payload has what the compressor needs for every parameter of the fragment, and 29 bytes of framing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from ..compression.base import Compressor, Fields, Packed, Part, Payload, Turn
from ..compression.errors import ConfigError
from ..compression.exact import exact_arithmetic, to_float32
from ..compression.kernels import use_numba
from .auditing.evidence import Evidence, excused
from .auditing.gradients import compared, no_gradients
from .auditing.scores import cosines, mean_cosines, scored_parts
from .base import Closure, Draw, NamedParameters, Noise, Own, Parameter, Share, refuse_names, wholes
from .facts import Facts, KnownUpdate
from .inner.aside import Aside
from .inner.control import MEAN as CONTROL_MEAN
from .inner.control import NONE, Control
from .inner.optimizers import check_inner, state_bytes
from .inner.phase import InnerPhase
from .inner.training import InnerTraining
from .noise import noise_of
from .options import Number, Whole, keywords_of
from .parts.clip import Weighing
from .parts.fragments import fragments_of
from .parts.gradients import backward
from .parts.packing import pack_all
from .parts.residual import Residual, refuse_other_packing
from .parts.updating import updating
from .robust.means import decode_mean
from .robust.options import NEW_RUNS, MeanOptions
from .robust.pace import Pace, by_pace, mean_scale
from .robust.weights import sender_floor_of, weighed
from .rules import DILOCO_RUNS

INNER: Final[dict[str, Any]] = {"name": "AdamW", "betas": [0.9, 0.95]}

LEFTOVER: Final = "leftover"
"""The entry of error feedback in the state."""


@dataclass(frozen=True, kw_only=True)
class DilocoOptions(MeanOptions):
    """Of a run's `[strategy]`, and keyword arguments of `Diloco`."""

    compressor: Compressor
    """In a run's file a table: {name = "dct_topk", k = 32}."""

    lr: Annotated[float, Number(at_least=0)] = 4e-4
    """The inner optimizer's; schedules act on it."""

    weight_decay: Annotated[float, Number(at_least=0)] = 0.1
    """The inner optimizer's."""

    inner: str | Mapping[str, Any] = field(default_factory=lambda: dict(INNER))
    """One of torch's optimizers and its options, but for lr and weight_decay, which stand above, or "lion" or
    "schedulefree" (extras of these names). "muon": Muon for matrices of numbered blocks, AdamW for the rest;
    `lr_ratio` is Muon's rate over lr."""

    inner_steps: Annotated[int, Whole(1, 2**16)] = 30
    """H, of one micro-batch each, in a round."""

    max_seconds: Annotated[float, Number(at_least=0)] = 0.0
    """Fewer steps, but one at least, where they take longer; 0: no limit. The time of steps made ahead is not
    part of it."""

    max_grad_norm: Annotated[float, Number(at_least=0)] = 1.0
    """L2 norm of an inner step's gradient; 0: no limit."""

    outer_lr: Annotated[float, Number(at_least=0)] = 0.7
    """Of the update by the mean of what peers changed."""
    outer_momentum: Annotated[float, Number(at_least=0, below=1)] = 0.9
    """What is left of the outer momentum after a round; 0: none is kept."""
    nesterov: bool = True
    """Nesterov's momentum, else the plain one."""
    error_feedback: bool = True
    """What was not sent waits for the next round, else it is lost."""
    feedback_decay: Annotated[float, Number(at_least=0, at_most=1)] = 1.0
    """What is left after a round of what waits."""
    fragments: Annotated[int, Whole(1, 2**10)] = 1
    """Parts of the model that take turns in being sent (Streaming DiLoCo)."""
    mix: Annotated[float, Number(at_least=0, below=1)] = 0.0
    """The share of the inner parameters in what a fragment goes on from."""

    overlap: Annotated[int, Whole(0, "inner_steps")] = 0
    """Inner steps made ahead while an offer travels, at most."""

    control: Literal["none", "scaffold"] = "none"
    """`scaffold`: every inner step is corrected by how far a peer's own rounds differ from the mean of all,
    for peers with uneven data (SCALLION, SCAFCOM). It takes the place of error feedback."""
    control_rate: Annotated[float, Number(above=0, at_most=1)] = 1.0
    """The share of a change of control that is sent (SCALLION's alpha)."""
    control_momentum: Annotated[float, Number(above=0, at_most=1)] = 1.0
    """The share of the newest round in what a peer takes for its own rounds (SCAFCOM's beta)."""
    control_decay: Annotated[float, Number(at_least=0, at_most=1)] = 0.95
    """What is left of all control after a round, so that the part of a peer that is gone fades."""

    weights: Literal["samples", "equal"] = "samples"
    """Offers count by their samples, up to twice their median (without `bound`: `clip` times), or alike."""

    pace: Pace = "none"
    """What offers of peers count for that do not offer in every round, as with the policy `async`. `favano`:
    times the rounds since the peer's last one, so that over many rounds all count by their work; `discount`:
    over the square root of that, as what is old."""

    clip: Annotated[float, Number(at_least=1)] = 10.0
    """Without `bound`: no offer's L1 norm or samples count for more than this many times their median in the
    round."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        check_inner(entries["inner"], entries["weight_decay"])
        if entries["overlap"] > 0 and entries["mix"] == 0:
            raise ConfigError(
                f"overlap = {entries['overlap']} with mix = 0: what a fragment learns while its offer "
                "travels would be lost: set mix, to 0.5 for example"
            )
        _check_control(cls, entries)


def _check_control(options: type[DilocoOptions], entries: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    if entries["control"] == NONE:
        defaults = options.defaults()
        for option in ("control_rate", "control_momentum", "control_decay"):
            if entries[option] != defaults[option]:
                raise ConfigError(f"{option} = {entries[option]!r} does nothing without control = 'scaffold'")
        return
    for option, needed in {"fragments": 1, "overlap": 0, "mix": 0.0, "mean": "all"}.items():
        if entries[option] != needed:
            raise ConfigError(
                f"control = {entries['control']!r} with {option} = {entries[option]!r}: a round's control is "
                f"the mean over all offers of whole rounds of all parameters: {option} = {needed!r} is needed"
            )


def _bytes_per_parameter(options: Mapping[str, Any]) -> float:
    """Outer and inner parameters, gradients, error feedback; the inner optimizer's state; outer momentum."""
    return (
        16.0 + state_bytes(options.get("inner", INNER)) + (4.0 if options.get("outer_momentum", 0.9) else 0.0)
    )


class Diloco(InnerTraining):
    """See the module's docstring. Replicated: the outer parameters, their momentum, the mean of control.
    Local: the inner optimizer's state, error feedback, sends of open fate, inner parameters that go on from
    round to round, this peer's control.

    `step()` without a closure is one inner step; between such steps the model has the inner parameters, and
    the outer ones within `replica()`.

    Counters: `applied`, the last round; `dropped_batches` whose loss or gradient was not finite;
    `dropped_rounds` whose inner parameters were not; `inner`, steps since the last round; `ahead`, steps of
    the next one; `corrected` by control since the last round; `decays F` of the error feedback of fragment F;
    `lost_sends` (see `Residual`).
    """

    facts: ClassVar[Facts] = Facts(
        options=DilocoOptions,
        batches=("inner_steps",),
        fitted="inner_steps",
        seconds="max_seconds",
        changeable=("lr", "weight_decay", "max_grad_norm", "outer_lr", "clip", "bound", "own_data_share"),
        # Honest payloads of as many steps are as long as each other.
        in_runs={**NEW_RUNS, **DILOCO_RUNS, "bound": 1.25},
        only_with={"control": ("control_rate", "control_momentum", "control_decay"), "pace": ()},
        small_model={"lr": 1e-3},
        bytes_per_parameter=_bytes_per_parameter,
        idle_bytes=8.0,
        # The first inner optimizer of torch's, made to check its options, takes a second to load.
        known_updates={
            "outer update": KnownUpdate({"compressor": {"name": "dense"}}, 0xE01E6085E2946613, is_slow=True),
            "outer update with control": KnownUpdate(
                {"compressor": {"name": "dense"}, "control": "scaffold"}, 0x25CCCA5633F20DE2, is_slow=True
            ),
        },
    )
    aside: Aside | None = None
    """Where outer parameters and error feedback wait while `propose` makes inner steps: 20 bytes per
    parameter instead of 28. This peer's own matter: nothing else changes."""

    takes_bfloat16: ClassVar[bool] = False  # inner steps in bfloat16 would mostly be rounded away

    @keywords_of(DilocoOptions)
    def __init__(self, named_parameters: NamedParameters, options: DilocoOptions) -> None:
        self.compressor = options.compressor
        self.clock = time.monotonic
        self._deadline_s: float | None = None
        self._losses: list[float] = []
        self._phase = InnerPhase(self)
        self._residual = Residual(self, self.compressor, LEFTOVER, self._kept)
        self._control = Control(self, self.compressor, self._phase)
        super().__init__(named_parameters, options)
        self.fragments()  # raises ConfigError for more than there are
        self._refuse_muon_alone()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        refuse_other_packing(state_dict, self.compressor)
        super().load_state_dict(state_dict)
        self._deadline_s = None

    def replicated_state(self, parameter: Parameter) -> dict[str, Tensor]:
        names = ["outer_momentum"] if self.option("outer_momentum") != 0.0 else []
        names += [CONTROL_MEAN] if self._control.is_on else []
        if not names:
            return {}
        state, theta = self.state[parameter.tensor], parameter.local
        for name in names:
            if name not in state:
                state[name] = torch.zeros(theta.shape, device=theta.device)
        return {name: state[name] for name in names}

    def begin_state(self, parameter: Parameter) -> None:
        super().begin_state(parameter)
        if self._control.is_on:
            self._control.of(parameter)
        elif self.option("error_feedback"):
            self._residual.of(parameter)

    # --------------------------------------------------------------------------------- fragments

    def fragments(self) -> list[list[Parameter]]:
        """The parameters of each fragment, in name order."""
        parameters = self.parameters_in_order()
        number = fragments_of([p.name for p in parameters], self.option("fragments"))
        return [[p for p in parameters if number[p.name] == i] for i in range(self.option("fragments"))]

    def _fragment(self, turn: Turn) -> tuple[list[Parameter], Turn]:
        """What a round sends, and the round as compressors see it: those that move on from round to round
        shall not skip what is in other fragments' rounds."""
        n = self.option("fragments")
        return self.fragments()[(turn.round - 1) % n], replace(turn, round=(turn.round - 1) // n + 1)

    def fields(self, turn: Turn | None = None) -> Fields:
        parameters = self.parameters_in_order() if turn is None else self._fragment(turn)[0]
        return {p.name: self.compressor.fields(p.part.entire) for p in parameters}

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """Inner steps, one drawn batch each. Puts the parameters back, and clears the gradients."""
        self._begin(turn)
        self.n_ahead = self.n_batches = self.counters.pop("ahead", 0)
        with self._inner_training(self._aside_now(), LEFTOVER):
            while self.n_batches == 0 or not self._is_enough(self.n_batches):
                self._train_on(draw(), turn)
                self.n_batches += 1
            self._round_is_trained()
            self.zero_grad(set_to_none=True)  # their memory is needed to send
            return self._send(turn)

    @torch.no_grad()
    def propose_again(self, turn: Turn) -> Payload | None:
        """What waits in the error feedback."""
        if self._control.is_on or not self.option("error_feedback") or self.option("fragments") > 1:
            return None
        self._follow(turn)
        fragment, its_turn = self._fragment(turn)
        for p in fragment:
            self._residual.put_back(p, its_turn)  # proposed once more for the same round
        return self._residual.send(fragment, its_turn, self.counters.get("decays 0", 0), 1.0)

    def work_ahead(self, draw: Draw, turn: Turn, sent: Payload | None = None) -> bool:
        """One inner step."""
        if self.counters.get("ahead", 0) >= self.option("overlap"):
            return False
        with self._inner_training():
            self._train_on(draw(), turn)
            self.count("ahead")
        return True

    @property
    def _has_begun(self) -> bool:
        return self._deadline_s is not None

    def _begin(self, turn: Turn) -> None:
        """The clock of the round starts."""
        self._follow(turn)
        self._deadline_s = self.clock() + float(self.option("max_seconds"))
        fragment, its_turn = self._fragment(turn)
        for p in fragment:
            if self._residual.is_open(p, its_turn):
                # Proposed once more for the same round: what was sent before never counted.
                self._residual.put_back(p, its_turn)
                self._forget([p])

    def _follow(self, turn: Turn) -> None:
        """Inner parameters of a replica that was moved to another round have nothing to do with it."""
        if turn.round != self.counters.get("applied", 0) + 1:
            self._forget(self.parameters_in_order())
            if self._control.is_on:
                self._control.forget()
            self.counters["applied"] = turn.round - 1

    def _forget(self, parameters: Sequence[Parameter]) -> None:
        """These start from the outer parameters, and with a whole round's steps."""
        self._phase.forget(parameters)
        self.counters.pop("ahead", None)
        self._losses = []

    def _is_enough(self, n_steps: int) -> bool:
        """Whether the round has had all its inner steps, or its time."""
        if super()._is_enough(n_steps):
            return True
        if self.option("max_seconds") == 0 or self._deadline_s is None:
            return False
        return any(self.ranks.sums([float(self.clock() >= self._deadline_s)]))  # all ranks stop together

    def _inner_step(self, loss: float, turn: Turn) -> bool:
        done = super()._inner_step(loss, turn)
        if done and self._control.is_on:
            self._control.correct()
        return done

    def _leave(self) -> None:
        self._phase.leave(self._keeps_inner)

    @property
    def _keeps_inner(self) -> bool:
        """Whether inner parameters go on from round to round."""
        return bool(self.option("fragments") > 1 or self.option("mix") > 0)

    def _aside_now(self) -> Aside | None:
        return None if self._keeps_inner or self._control.is_on else self.aside

    @torch.no_grad()
    def _send(self, turn: Turn) -> Payload:
        """What the fragment's inner parameters have moved by, and what error feedback kept."""
        fragment, its_turn = self._fragment(turn)
        self._phase.finish()
        is_void = self._phase.start_over_unless_finite()
        self.count("dropped_rounds", is_void)
        if self._control.is_on:
            return self._control.send(fragment, its_turn, is_void=is_void)
        decays = f"decays {(turn.round - 1) % self.option('fragments')}"
        self.count(decays)
        if not self.option("error_feedback"):
            for p in fragment:
                self._phase.bring_back(p)
            return pack_all(self.ranks, self.compressor, fragment, self._phase.moved, its_turn)
        if self._sends_in_one_pass(fragment):
            payload = {p.name: self._sent_in_one_pass(p) for p in fragment}
            self._residual.keep(fragment, its_turn, self.counters[decays], payload)
            return payload
        for p in fragment:
            self._phase.bring_back(p)
            self._phase.add_moved(p, self._residual.of(p), self.option("feedback_decay"))
            if not self._keeps_inner:
                self._phase.put_outer_back(p)  # its copy is gone before the next one's comes
        return self._residual.send(fragment, its_turn, self.counters[decays], 1.0)

    def _sends_in_one_pass(self, fragment: Sequence[Parameter]) -> bool:
        """Whether a kernel does all of it while a group is in the cache."""
        return (
            self.ranks.count == 1
            and not self._keeps_inner
            and self.compressor.takes_moved()
            and all(p.local.device.type == "cpu" and p.local.is_contiguous() for p in fragment)
        )

    def _sent_in_one_pass(self, parameter: Parameter) -> Packed:
        self._phase.bring_back(parameter)
        leftover = self._residual.of(parameter)
        return self._phase.send_moved(parameter, leftover, self.option("feedback_decay"), self.compressor)

    def _kept(self, parameter: Parameter, n_decays: int) -> float:
        """What would be left of a send in the error feedback if it had stayed there."""
        number = next(i for i, f in enumerate(self.fragments()) if parameter.name in {p.name for p in f})
        factor = 1.0
        for _ in range(self.counters.get(f"decays {number}", 0) - n_decays):
            factor *= self.option("feedback_decay")
        return factor

    def audit(
        self, payloads: Sequence[Payload], draw: Draw, turns: Sequence[Turn], n_batches: int
    ) -> list[Evidence | None]:
        """Against inner steps from the outer parameters, by an inner optimizer that begins: as far as the
        payload goes, a peer's own that has a past has gone the same way. It mostly has: where steps overshoot
        and rounds are short, its past decides. So what does not pass is compared with steps of an inner
        optimizer that has this replica's past, too, and passes if it passes there."""
        if self._phase.is_inside or self._control.is_on:
            return [None] * len(
                payloads
            )  # what is sent with control depends on what its peer has sent before
        closures = [draw() for _ in range(max(1, min(n_batches, self.most_batches)))]
        found = self._compared(payloads, closures, turns[0], with_past=False)
        if all(e is None or e.passed for e in found):
            return found
        again = self._compared(payloads, closures, turns[0], with_past=True)
        return [excused(*both) for both in zip(found, again, strict=True)]

    def _compared(
        self, payloads: Sequence[Payload], closures: Sequence[Closure], turn: Turn, with_past: bool
    ) -> list[Evidence | None]:
        """With a step for each closure."""
        fragment, its_turn = self._fragment(turn)
        with no_gradients(self), self._phase.fresh(with_past):
            self._phase.set_out()
            for closure in closures:
                self.zero_grad(set_to_none=True)
                self._phase.step(backward(closure, self.ranks), turn.lr_factor)
            self._phase.finish()
            return [
                compared(self.compressor, fragment, payload, its_turn, self._moved, self.ranks)
                for payload in payloads
            ]

    def _moved(self, parameter: Parameter) -> Tensor:
        return self._phase.moved(parameter).clone()

    def scored_parts(self, payloads: Sequence[Payload], turn: Turn) -> list[Payload]:
        if self._control.is_on:
            return super().scored_parts(payloads, turn)
        return scored_parts(self._fragment(turn)[0], payloads, turn.round)

    def scores(self, parts: Sequence[Payload], turn: Turn) -> list[float] | None:
        if self._control.is_on:
            return None
        fragment, its_turn = self._fragment(turn)
        return mean_cosines(self.compressor, fragment, parts, its_turn, turn.round)

    def cosines(self, payload: Payload, others: Sequence[Payload], turn: Turn) -> list[float] | None:
        fragment, its_turn = self._fragment(turn)
        return cosines(self.compressor, fragment, payload, others, its_turn, turn.round)

    def noise(self, shares: Sequence[Share], turn: Turn) -> Noise | None:
        if self._control.is_on:
            return None
        fragment, its_turn = self._fragment(turn)
        return noise_of(self.compressor, fragment, shares, its_turn, self.weighing, "pseudo-gradients")

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        fragment, its_turn = self._fragment(turn)
        refuse_names(payload, [p.name for p in fragment])
        with exact_arithmetic():
            self.compressor.check_all(payload, wholes(fragment), its_turn)

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Parameter by parameter: scratch is a few times the largest one. Nothing changes without samples."""
        self._follow(turn)
        fragment, its_turn = self._fragment(turn)
        pace: Pace = self.option("pace")
        w = weighed(self, self.compressor, fragment, shares, its_turn, clips_norms=True)
        w = self.weighing = by_pace(w, shares, pace)
        scale, n_lost = mean_scale(shares, pace), 0
        for p in fragment:
            n_lost = self._residual.settle(p, its_turn, own)
            if any(w.weights):
                if self._control.is_on:
                    self._control.follow(p, shares, its_turn, own, turn.own_seed)
                with exact_arithmetic(), updating(p, turn) as theta:
                    packs = [s.payload[p.name] for s in shares]
                    mean = self._mean(packs, w, p.part, its_turn, theta.device)
                    self._update(p, theta, mean if scale == 1.0 else mean.mul_(scale))
            self._phase.restart(p, self.option("mix"))
        self.count("lost_sends", n_lost)
        self.counters["applied"] = turn.round

    def _mean(
        self, packs: Sequence[Packed], w: Weighing, part: Part, turn: Turn, device: torch.device
    ) -> Tensor:
        kind, floor = self.option("aggregate"), sender_floor_of(self)
        return decode_mean(kind, self.compressor, device, packs, w, part, turn, floor)

    def _update(self, parameter: Parameter, theta: Tensor, step: Tensor) -> None:
        """By the round's mean, which is written over. One rounding per operation: no fused forms (`alpha=`,
        foreach)."""
        if self._control.is_on:
            self._control.outer(parameter, step)
        mu = to_float32(self.option("outer_momentum"))
        if mu > 0.0:
            momentum = self.replicated_state(parameter)["outer_momentum"].view(-1)
            if use_numba(theta, momentum, step):
                from .parts.outer_cpu import outer_step

                outer_lr = to_float32(self.option("outer_lr"))
                outer_step(theta, momentum, step, mu, outer_lr, self.option("nesterov"))
                return
            momentum.mul_(mu).add_(step)
            step = step.add_(momentum * mu) if self.option("nesterov") else momentum.clone()
        theta.sub_(step.mul_(to_float32(self.option("outer_lr"))))
