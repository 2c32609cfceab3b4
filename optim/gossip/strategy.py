"""Gossip: every peer has a model of its own, and exchanges it with neighbours. Per round:

    x_i mixes with what neighbours sent in the round before       see `mixing` (plain, A2CiD2) and `choco`
    x_i = x_i after H inner steps                                 the inner optimizer's state stays there
    x_i, or what has changed of it, goes to this round's neighbours, peer to peer: see `topology`
    the offer has no payload but how far the neighbours' models are

and in rounds that merge (see `merging`), instead of an exchange,

    Delta_i = theta - x_i                                         the payload, in a dense format
    theta = theta - mean of the counted Delta_i                   weighted by their samples, bounded
    x_i = theta

The replica is the reference model theta: outside of `propose` it is what the model has, and `apply` changes
it at merges only. The peers' own models are local state. An exchange has the time from an offer to the next
round's work: who was counted in a commit has sent before, so that there is hardly anything to wait for.

Participation S (semi-decentralized learning): in a merge only some take part, each with probability S. S2S:
those take the mean, the others keep what they have; S2A: all take it.

A peer that comes in, or comes back without its local state, takes over the model of a neighbour: of some
that are asked the one whose way from theta is the median. That proves nothing, and changes no replica.

Sources: algorithms of arXiv 2306.08289 (A2CiD2), 1902.00340 (CHOCO-SGD), and "A single merging suffices".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, nan
from typing import Any, ClassVar, Final

import torch

from ...compression.base import Field, Fields, Packed, Payload, Turn
from ...compression.codecs.dense import Dense
from ...compression.errors import BadPayload, ConfigError
from ...compression.exact import exact_arithmetic
from ..base import Draw, NamedParameters, Own, Parameter, Share, refuse_names, wholes
from ..facts import Facts, KnownUpdate
from ..inner.optimizers import state_bytes
from ..inner.phase import InnerPhase
from ..inner.training import OwnTraining
from ..options import keywords_of
from ..parts.packing import pack_all
from ..parts.updating import updating
from ..robust.means import decode_mean
from ..robust.options import NEW_RUNS
from ..robust.weights import weighed
from .accounting import in_words, require_accountant
from .borrowing import Borrowed, median_of
from .choco import ChocoMixing
from .dadao import DadaoMixing
from .meeting import Meeting, meeting
from .merging import is_full, is_merge, last_merge, last_taken, takes_part
from .mixing import Mixed, Mixing, ModelMixing
from .neighbours import Exchange, Neighbours
from .options import EIGHT_BITS, IN_PAIRS, INNER, GossipOptions
from .private import Pairs, PrivateSteps, mixing_weights
from .topology import edges_of

_RECENT_ROUNDS: Final = 100
"""A neighbour's model that is older than that is not taken over."""

_COUNT_BITS: Final = 16

DISTANCE: Final = ":distance"
"""In the payload of a round that does not merge: L2, to the median neighbour's model when they last met."""


class Gossip(OwnTraining):
    """See the module's docstring. Replicated: the reference model. Local: x_i, the inner optimizer's state,
    A2CiD2's momentum.

    `step()` without a closure is one inner step; between such steps the model has x_i, and theta within
    `replica()`. Without a swarm there are no neighbours: local steps and merges.

    Counters: `applied`, the last round; `dropped_batches` whose loss or gradient was not finite;
    `dropped_rounds` whose x_i was not; `inner`, steps since the last round; `met`, `unheard`, `clipped` and
    `refused REASON`: neighbours' messages that were mixed in, were waited for in vain, were cut to size, and
    were not used; `borrowed`, models of neighbours that this peer went on from.
    """

    facts: ClassVar[Facts] = Facts(
        options=GossipOptions,
        batches=("inner_steps",),
        fitted="inner_steps",
        changeable=("lr", "weight_decay", "max_grad_norm", "clip", "bound", "own_data_share"),
        in_runs={**NEW_RUNS, "bound": 1.25, "weights": "work", "compressor": EIGHT_BITS},
        only_with={"edges": (), "topology_file": (), "mu": (), "smoothness": (), "privacy": ()},
        small_model={"lr": 1e-3},
        compressor=EIGHT_BITS,
        # Reference, own model, gradients; what is sent and what comes, packed, and a neighbour's model.
        bytes_per_parameter=lambda options: 18.0 + state_bytes(options.get("inner", INNER)),
        is_audited=False,  # a peer's model is its own
        known_updates={
            "gossip update": KnownUpdate(
                {"compressor": {"name": "dense"}, "merge_every": 1}, 0xCC511F00E7F6C8A6, is_slow=True
            )
        },
    )
    takes_bfloat16: ClassVar[bool] = False  # inner steps in bfloat16 would mostly be rounded away

    neighbours: Neighbours | None = None
    """Whom x_i mixes with; None: nobody."""

    met: Meeting | None = None
    """The last meeting, and what came of it; for people."""
    mixed: Mixed | None = None

    @keywords_of(GossipOptions)
    def __init__(self, named_parameters: NamedParameters, options: GossipOptions) -> None:
        self.compressor = options.compressor
        self.merging = options.compressor if isinstance(options.compressor, Dense) else Dense(bits=16)
        self._losses: list[float] = []
        self._phase = InnerPhase(self)
        self._open: tuple[Meeting, Exchange] | None = None
        super().__init__(named_parameters, options)
        self._refuse_what_does_not_fit()
        self.mixing = self._new_mixing()
        self._private = self._new_private()

    def told(self) -> str | None:
        privacy = None if self._private is None else in_words(self.option("privacy"))
        return "; ".join(filter(None, (super().told(), privacy))) or None

    def _new_private(self) -> PrivateSteps | None:
        privacy = self.option("privacy")
        if not privacy:
            return None
        require_accountant()
        return PrivateSteps(self.parameters_in_order(), float(privacy["clip"]), float(privacy["noise"]))

    def _refuse_what_does_not_fit(self) -> None:
        mixing = self.option("mixing")
        if mixing != "choco" and not isinstance(self.compressor, Dense):
            raise ConfigError(
                f'mixing = "{mixing}" sends whole models: compressor = {{ name = "dense", bits = 8 }}; '
                'mixing = "choco" takes the others'
            )
        if self.ranks.count > 1:
            raise ConfigError("gossip trains on one rank of a node: start it with --ranks 1")
        self._refuse_muon_alone()

    def _new_mixing(self) -> Mixing:
        if self.option("mixing") == "choco":
            return ChocoMixing(self, self._phase, self.compressor, float(self.option("gamma")))
        if self.option("mixing") == "dadao":
            return DadaoMixing(self, self.compressor, self.option("mu"), self.option("smoothness"))
        has_momentum = self.option("mixing") == "a2cid2"
        return ModelMixing(self, self._phase, self.compressor, has_momentum=has_momentum)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have no neighbours, and nothing under way."""
        left_out = ("neighbours", "_open", "mixing", "_phase", "_private")
        return {name: v for name, v in super().__getstate__().items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._phase, self._open = InnerPhase(self), None
        self.mixing, self._private = self._new_mixing(), self._new_private()

    def is_merge(self, turn: Turn) -> bool:
        """Whether the round changes the reference model."""
        return is_merge(self.option("merge_every"), turn.round, turn.n_rounds)

    def merged(self, round_: int, n_rounds: int) -> int:
        """The reference model changes at merges only."""
        return last_merge(self.option("merge_every"), round_, n_rounds)

    def counts_after(self, turn: Turn, seed_of: Callable[[int], int]) -> int | None:
        if self.option("weights") != "work" or not self.is_merge(turn):
            return None
        participation, all_take = self.option("participation"), self.option("takes") == "s2a"
        return last_taken(self.option("merge_every"), participation, all_take, turn, seed_of)

    def fields(self, turn: Turn | None = None) -> Fields:
        packs = {p.name: self.merging.fields(p.part.entire) for p in self.parameters_in_order()}
        if turn is None:
            return {**packs, DISTANCE: (Field(torch.float32, 1),)}
        return packs if self.is_merge(turn) else {DISTANCE: (Field(torch.float32, 1),)}

    def known_payload(self, fill: Any, salt: int) -> Payload:
        found = super().known_payload(fill, salt)
        return {name: packed for name, packed in found.items() if name != DISTANCE}

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """Inner steps, one drawn batch each, and the exchange. Puts the parameters back, and clears the
        gradients."""
        self._follow(turn)
        self.n_batches = 0
        is_new = not self.has_own_model
        with self._inner_training():
            self._mix_in(turn)
            if is_new:
                self._borrow(turn)
            if self._private is not None:
                self._private.begin()
            while self.n_batches < self.batches:
                self._train_on(draw(), turn)
                self.n_batches += 1
            self._round_is_trained()
            if self._private is not None and self.last_loss is not None:
                self.last_loss = nan  # it would say what the noise is to hide
            return self._send(turn)

    def _inner_step(self, loss: float, turn: Turn) -> bool:
        if not isinstance(self.mixing, DadaoMixing):
            return super()._inner_step(loss, turn)
        done = isfinite(loss) and self.mixing.step(turn)
        self.count("dropped_batches", not done)
        return done

    def _begin(self, turn: Turn) -> None:
        self._follow(turn)

    def _follow(self, turn: Turn) -> None:
        """What belongs to a replica that was moved to another round has nothing to do with it."""
        if turn.round != self.counters.get("applied", 0) + 1:
            self._forget(self.parameters_in_order())
            self._losses, self._open = [], None
            self.counters["applied"] = turn.round - 1

    def _forget(self, parameters: Sequence[Parameter]) -> None:
        """x_i is theta."""
        self._phase.forget(parameters)
        for p in parameters:
            self.mixing.merged(p)

    @torch.no_grad()
    def _send(self, turn: Turn) -> Payload:
        """After the local steps."""
        self._phase.finish()
        self.count("dropped_rounds", self._phase.start_over_unless_finite())
        self._make_private(turn)
        if self.is_merge(turn):
            return self._merge_payload(turn)
        self._meet(turn)
        distance = 0.0 if self.mixed is None or self.mixed.distance is None else self.mixed.distance
        return {DISTANCE: (torch.tensor([distance], dtype=torch.float32),)}

    def _merge_payload(self, turn: Turn) -> Payload:
        """theta - x_i; nothing of a peer that does not take part."""
        if not takes_part(self.option("participation"), turn, turn.own_seed):
            fields = self.fields(turn).items()
            return {name: tuple(torch.empty(0, dtype=f.dtype) for f in row) for name, row in fields}
        return pack_all(self.ranks, self.merging, self.parameters_in_order(), self._phase.moved, turn)

    def _make_private(self, turn: Turn) -> None:
        """See `private`. In a full merge all pairs of peers share noise, else those that exchange."""
        if self._private is None:
            return
        met = Meeting(turn) if self.neighbours is None else self._meeting(turn)
        names, edges = met.names, met.edges
        weights = mixing_weights(edges, in_pairs=self.option("mixing") in IN_PAIRS)
        if self.is_merge(turn):
            edges = edges_of("complete", len(names), 0, 0)
            edges = edges if is_full(self.option("participation"), turn) else []
            weights = (1.0 / max(1, len(names)),) * len(edges)
        secret = _no_secret if self.neighbours is None else self.neighbours.secret
        self._private.end(Pairs(met.me, names, edges, weights), secret, turn.round)

    # --------------------------------------------------------------------------------- neighbours

    def _meeting(self, turn: Turn) -> Meeting:
        assert self.neighbours is not None
        return meeting(
            self.option("topology"),
            self.neighbours.peers(turn.round - 1),
            self.neighbours.me,
            turn,
            in_pairs=self.option("mixing") in IN_PAIRS,
            degree=self.option("degree"),
            of_file=self.option("edges"),
        )

    def _meet(self, turn: Turn) -> None:
        """x_i goes to the round's neighbours."""
        self.met, self._open = None, None
        if self.neighbours is None:
            return
        self.met = self._meeting(turn)
        message = self.mixing.message(self.met)
        exchange = self.neighbours.exchange(turn.round, list(self.met.weights), message)
        if self.met.weights:
            self._open = self.met, exchange

    def _mix_in(self, turn: Turn) -> None:
        """What neighbours sent in the last round that this peer worked in, if no merge came since. Only where
        both ends' offers were counted, which both know: else one of them might go on alone."""
        opened, self._open = self._open, None
        if opened is None or self.neighbours is None:
            return
        met, exchange = opened
        counted = self.neighbours.peers(met.turn.round)
        if not self._is_of_this_theta(met.turn.round, turn):
            return
        heard = exchange.received()
        if not isinstance(self.mixing, ChocoMixing):  # which has to follow every change
            heard = [said for said in heard if said[0] in counted and self.neighbours.me in counted]
        mixed = self.mixed = self.mixing.mix(met, heard, float(self.option("clip_neighbours")))
        self.count("met", len(heard) - len(mixed.refused))
        self.count("unheard", len(met.weights) - len(heard))
        self.count("clipped", mixed.n_clipped)
        for reason in mixed.refused:
            self.count(f"refused {reason}")

    @torch.no_grad()
    def _borrow(self, turn: Turn) -> None:
        """A peer that has just come goes on from a neighbour's model, unless all have just begun at theta."""
        before = replace(turn, round=turn.round - 1)
        if self.neighbours is None or before.round == 0 or self.is_merge(before):
            return
        found = list[Borrowed]()
        for round_, data in self.neighbours.borrow():
            if self._is_of_this_theta(round_, turn):
                try:
                    model = self.mixing.model_of(data, replace(turn, round=round_))
                except BadPayload as e:
                    self.count(f"refused {e.reason}")
                    continue
                found += [] if model is None else [model]
        chosen = median_of(found)
        if chosen is not None:
            self.count("borrowed")
            for p in self.parameters_in_order():
                p.local.sub_(chosen[p.name].view(p.local.shape).to(p.local.device))

    def _is_of_this_theta(self, round_: int, turn: Turn) -> bool:
        """Whether no merge lies between that round's messages and the turn."""
        if not 0 < round_ <= turn.round <= round_ + _RECENT_ROUNDS:
            return False
        return not any(self.is_merge(replace(turn, round=r)) for r in range(round_, turn.round))

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        fields = self.fields(turn)
        refuse_names(payload, fields)
        with exact_arithmetic():
            if not self.is_merge(turn):
                _check_distance(payload[DISTANCE])
            elif not _is_silent(payload, fields):
                self.merging.check_all(payload, wholes(self.parameters_in_order()), turn)

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Parameter by parameter: scratch is a few times the largest one. Nothing changes without samples."""
        self._follow(turn)
        self.weighing = None
        if self.is_merge(turn):
            self._merge(shares, turn)
        self.counters["applied"] = turn.round

    def _merge(self, shares: Sequence[Share], turn: Turn) -> None:
        parameters, fields = self.parameters_in_order(), self.fields(turn)
        participation = self.option("participation")
        counted = [
            share
            for share in shares
            if takes_part(participation, turn, share.seed) and not _is_silent(share.payload, fields)
        ]
        w = weighed(self, self.merging, parameters, _in_range(counted), turn, clips_norms=True)
        self.weighing = w if len(counted) == len(shares) else None
        goes_on = is_full(participation, turn) or self.option("takes") == "s2a"
        goes_on = goes_on or takes_part(participation, turn, turn.own_seed)
        for p in parameters:
            if any(w.weights):
                with exact_arithmetic(), updating(p, turn) as theta:
                    packs = [share.payload[p.name] for share in counted]
                    kind, device = self.option("aggregate"), theta.device
                    theta.sub_(decode_mean(kind, self.merging, device, packs, w, p.part, turn))
            if goes_on:
                self._forget([p])


def _no_secret(peer: str) -> bytes:
    raise AssertionError("a peer that is alone has no pairs")


def _in_range(shares: Sequence[Share]) -> list[Share]:
    """Samples of any number of rounds, divided by a power of two until their median is a count that means are
    weighed by."""
    usual = sorted(share.n_samples for share in shares)[(len(shares) - 1) // 2] if shares else 0
    n_bits = max(0, usual.bit_length() - _COUNT_BITS)
    return [replace(share, n_samples=share.n_samples >> n_bits) for share in shares]


def _is_silent(payload: Payload, fields: Fields) -> bool:
    """Whether it is of a peer that does not take part: rows of no elements, of the right types."""
    return all(
        len(payload[name]) == len(row)
        and all(
            t.dtype == f.dtype and t.ndim == 1 and t.numel() == 0
            for t, f in zip(payload[name], row, strict=True)
        )
        for name, row in fields.items()
    )


def _check_distance(packed: Packed) -> None:
    """Raises BadPayload."""
    if len(packed) != 1 or packed[0].dtype != torch.float32 or packed[0].shape != (1,):
        raise BadPayload("shape", "one float32 is expected")
    if not bool(torch.isfinite(packed[0]).all()):
        raise BadPayload("nan", "the distance of neighbours")
